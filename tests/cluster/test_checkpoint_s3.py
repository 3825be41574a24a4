"""Checkpoints copied to a real S3 server beside the training, through a network that fails: rows of
docs/RELIABILITY.md."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from pretrain import storage
from pretrain.checkpoint import CheckpointConfig, Checkpointer
from pretrain.errors import CheckpointError
from pretrain.mirror import Mirror
from tests.support import s3 as s3_support
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.faulty_run import (
    EVERY,
    SAMPLES,
    SIGTERM,
    Attempt,
    Fault,
    positions,
    resume_until_done,
    trajectory,
    unequal,
)
from tests.support.plain import PlainEngine, same
from tests.support.s3 import S3Server

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.timeout(600)]

DOWN, UP = Weather(down=True), Weather()
QUICK = storage.Retry(deadline_seconds=20, attempt_seconds=2, first_wait_seconds=0.05)


def index(s3: S3Server, folder: str) -> list[str]:
    """What the index at the server names; read past the proxy."""
    try:
        answer = s3.client().get_object(Bucket=s3.BUCKET, Key=f"{folder}/index.json")
    except s3.client().exceptions.NoSuchKey:
        return []
    return list(json.loads(answer["Body"].read())["committed"])


def name(samples: int) -> str:
    return f"samples-{samples:012d}"


def wait_until_copied(s3: S3Server, folder: str, samples: int) -> None:
    deadline = time.monotonic() + 60
    while name(samples) not in index(s3, folder):
        assert time.monotonic() < deadline, index(s3, folder)
        time.sleep(0.05)


@pytest.mark.soak  # a storm, and being down at the start, are below
def test_down_in_mid_run_and_back_again_then_resumed_from_s3_alone(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    """A copy that fails is a warning; the next one is made; a machine with an empty disk goes on
    from it, and ends as a run without S3. Down at the end, it is a warning too."""
    copies = (f"checkpoint.copy_to=s3://{s3.BUCKET}/run", "checkpoint.copy_seconds=2.0")
    environment = s3_support.environment(proxy.url)
    reference = resume_until_done(tmp_path / "reference", 2)

    holds = [Fault("load", 0, 0, samples) for samples in (64, 112)]
    stop = Fault("load", SIGTERM, 0, 3 * EVERY)
    first = Attempt(tmp_path / "first", 2, copies, faults=[*holds, stop], environment=environment)
    try:
        first.wait_at(holds[0])
        wait_until_copied(s3, "run", EVERY)  # beside the training, which waits here
        proxy.weather = DOWN
        first.go_on(holds[0])
        first.wait_at(holds[1])
        gave_up = tmp_path / "first" / "checkpoints" / name(2 * EVERY) / "receipts"
        first.wait_for(gave_up / "rank-00000.not-copied")
        first.wait_for(gave_up / "rank-00001.not-copied")
        proxy.weather = UP
        first.go_on(holds[1])
        assert first.codes() == [75, 75], first.text()
    finally:
        first.kill()
    assert f"WARNING: {name(96)} was not copied" in first.rank_text(0)
    assert index(s3, "run") == [name(n) for n in (EVERY, 3 * EVERY, 3 * EVERY + 16)]

    hold = Fault("load", 0, 0, SAMPLES - 16)
    second = Attempt(tmp_path / "second", 2, copies, faults=[hold], environment=environment)
    try:
        second.wait_at(hold)
        proxy.weather = DOWN
        began = time.monotonic()
        second.go_on(hold)
        assert second.codes() == [0, 0], second.text()
        print(f"measured: ended {time.monotonic() - began:.1f} s after the server went down")
    finally:
        second.kill()
    said = second.rank_text(0)
    assert f"fetching s3://{s3.BUCKET}/run/{name(160)}" in said
    assert f"WARNING: {name(SAMPLES)} was not copied" in said
    assert positions(trajectory([first, second])) == list(range(SAMPLES))
    assert unequal(reference.folder, second.folder) == []


def test_down_at_the_start_is_an_error_that_says_what_to_do(
    proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.weather = DOWN
    settings = ("checkpoint.copy_to=s3://bucket/never", "checkpoint.copy_seconds=1.0")
    attempt = Attempt(tmp_path / "run", 2, settings, environment=s3_support.environment(proxy.url))
    assert attempt.codes() == [2, 2], attempt.text()
    said = attempt.rank_text(0)
    assert "checkpoint.copy_to='s3://bucket/never'" in said and "Traceback" not in said


def save(folder: Path, url: str, samples: int, **settings: object) -> tuple[PlainEngine, list[str]]:
    """A state of its own, saved at that count and copied; what was said."""
    said: list[str] = []
    config = CheckpointConfig(copy_to=url, **settings)  # type: ignore[arg-type]
    checkpointer = Checkpointer(folder, config, said.append)
    engine = PlainEngine(seed=samples)
    engine.step()
    checkpointer.save(engine, samples, {}, last=True)  # type: ignore[arg-type]
    return engine, said


def test_a_copy_through_a_storm_is_whole(s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.weather = Weather(p_503=0.2, p_reset=0.2, p_truncate=0.2)
    url = f"s3://{s3.BUCKET}/storm"
    for samples in (8, 16, 24):
        engine, said = save(tmp_path / "a", url, samples)
        assert said == []
    assert index(s3, "storm") == [name(16), name(24)]  # keep=2
    listed = s3.client().list_objects_v2(Bucket=s3.BUCKET, Prefix=f"storm/{name(8)}/")
    assert listed["KeyCount"] == 0
    config = CheckpointConfig(copy_to=url)
    other = PlainEngine(seed=99)
    found = Checkpointer(tmp_path / "b", config).restore(other)  # type: ignore[arg-type]
    assert found is not None and found.samples == 24 and same(other.state(), engine.state())
    assert proxy.counts["503"] and proxy.counts["reset"]


def test_what_was_changed_at_the_server_is_refused(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"s3://{s3.BUCKET}/changed"
    save(tmp_path / "a", url, 8)
    key = f"changed/{name(8)}/weights/rank-00000.safetensors"
    data = bytearray(s3.client().get_object(Bucket=s3.BUCKET, Key=key)["Body"].read())
    data[-1] ^= 1
    s3.put(key, bytes(data))
    with pytest.raises(CheckpointError, match="is not what the manifest says"):
        Checkpointer(tmp_path / "b", CheckpointConfig(copy_to=url)).restore(PlainEngine())  # type: ignore[arg-type]
    assert not list((tmp_path / "b").glob("*/COMMITTED"))


def test_a_rank_that_gave_up_is_not_waited_for(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Rank 0 has copied its part and waits for rank 1's: it learns within seconds that it will not
    come, and goes on with the next checkpoint."""
    save(tmp_path, f"s3://{s3.BUCKET}/elsewhere", 8)
    folder = tmp_path / name(8)
    mirror = Mirror(f"s3://{s3.BUCKET}/two", 2, QUICK)
    mirror.submit(folder, 0, 2)
    threading.Timer(0.5, (folder / "receipts" / "rank-00001.not-copied").touch).start()
    began = time.monotonic()
    (warning,) = mirror.finish()
    assert "rank 1 did not copy its part" in warning and time.monotonic() - began < 30
    assert index(s3, "two") == []


def test_a_stopped_run_does_not_wait_for_a_copy_for_ever(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    save(tmp_path, f"s3://{s3.BUCKET}/elsewhere2", 8)
    proxy.weather = DOWN
    mirror = Mirror(f"s3://{s3.BUCKET}/late", 2, QUICK)
    mirror.submit(tmp_path / name(8), 0, 1)
    began = time.monotonic()
    assert mirror.finish(0.5) == [f"the newest is not copied to s3://{s3.BUCKET}/late after 0.5 s"]
    assert time.monotonic() - began < 5
    proxy.weather = UP
    assert mirror.finish() == [] and index(s3, "late") == [name(8)]
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.url
