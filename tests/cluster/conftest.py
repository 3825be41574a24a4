"""Real servers for the tests of this folder; where a program is missing, tests/conftest.py says
what happens."""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import require_programs_now
from tests.support import hosts as host_support
from tests.support import s3 as s3_support
from tests.support.faultproxy import FaultProxy
from tests.support.hosts import Hosts
from tests.support.s3 import S3Server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with an empty bucket, for the whole session: keys must not collide."""
    s3_support.add_scripts_to_path()
    require_programs_now("weed")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What s3:// goes through in this test and in its child processes."""
    with FaultProxy(s3.port) as proxy:
        for name, value in s3_support.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        # A file system is kept by its options, and the endpoint comes from the environment.
        s3_support.forget_clients()
        yield proxy
    s3_support.forget_clients()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts, up while a file's tests last."""
    with _hosts(tmp_path_factory, 2) as hosts:
        yield hosts


@pytest.fixture
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three more, for one test."""
    with _hosts(tmp_path_factory, 3) as hosts:
        yield hosts


def _hosts(tmp_path_factory: pytest.TempPathFactory, count: int) -> Hosts:
    if "/usr/sbin" not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + "/usr/sbin"
    require_programs_now("sshd", *host_support.PROGRAMS)
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    return Hosts(tmp_path_factory.mktemp("hosts"), count)
