"""What the preflight asks of each host about an object store, against a real S3 server: whether the
job's credentials, and no others of that host, can write and read there."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support import s3 as s3_support
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def facts(s3: S3Server, url: str, **changed: str) -> dict[str, Any]:
    """As `python -m launcher.host` answers, asked with the job's variables."""
    request = {
        "do": "facts",
        "output": url,
        "config": "configs/debug.yaml",
        "peers": [],
        "writes": [url],
        "reads": [url + "/data.json"],
        "mlflow": None,
        "token": "t",
        "env": {**s3_support.environment(s3.url), **changed},
    }
    done = subprocess.run(
        [sys.executable, "-m", "launcher.host"],
        input=json.dumps(request),
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1])["facts"])


def test_credentials_are_tried(s3: S3Server) -> None:
    url = s3.put("preflight/data.json", b"{}").rpartition("/")[0]
    found = facts(s3, url)
    assert found["writes"] == {"value": [url]}
    assert found["reads"] == {"value": [url + "/data.json"]}
    assert "disk_gib" not in found and "shared" not in found
    listed = s3.client().list_objects_v2(Bucket=s3.BUCKET, Prefix="preflight/")["Contents"]
    assert [entry["Key"] for entry in listed] == ["preflight/data.json"]  # nothing is left there
    wrong = facts(s3, url, AWS_SECRET_ACCESS_KEY="wrong")
    for check in ("writes", "reads"):
        assert wrong[check]["error"].startswith("PermissionError"), wrong
    missing = facts(s3, url + "/no-such-folder")["reads"]
    assert missing["error"].startswith("FileNotFoundError"), missing
