"""Real servers for the tests of this folder; where a program is missing, tests/conftest.py says
what happens."""

from collections.abc import Iterator

import pytest

from tests.conftest import require_programs_now
from tests.support import s3 as s3_support
from tests.support.faultproxy import FaultProxy
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
