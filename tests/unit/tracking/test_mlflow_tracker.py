"""What is journaled reaches MLflow once, in order, and never holds up the training."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import mlflow_env, tracking
from pretrain.errors import ConfigError
from pretrain.tracking import NullTracker, TrackingConfig, mlflow_tracker
from pretrain.tracking import sender as sender_module
from pretrain.tracking.journal import Journal, JournalReader
from pretrain.tracking.mlflow_tracker import MlflowTracker
from pretrain.tracking.sender import Sender

NOWHERE = "http://127.0.0.1:9"  # the discard port: the connection is refused


def start(uri: str | None, output: Path, **config: Any) -> Any:
    settings = TrackingConfig(uri=uri, **config)
    tracker = tracking.build(settings, str(output), rank=0)
    tracker.start(settings.run_info(str(output), {"preset": "debug"}))
    return tracker


def run_of(uri: str, output: Path) -> Any:
    return client(uri).get_run(tracking.recorded_run(str(output)).run_id)


def client(uri: str) -> Any:
    return mlflow_env.load().MlflowClient(uri)


def history(uri: str, output: Path, name: str) -> list[tuple[int, float]]:
    run_id = tracking.recorded_run(str(output)).run_id
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, name)]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def journaled(output: Path, uri: str, metrics: int = 5) -> Journal:
    """A journal of a run that was never sent."""
    journal = Journal(str(output), uri)
    journal.start(TrackingConfig().run_info(str(output)))
    for i in range(metrics):
        journal.metrics({"loss": i / 2}, samples=i * 8)
    return journal


def drain(sender: Sender) -> None:
    while sender.step():
        pass


def test_all_is_sent_in_order_once_and_a_resumed_run_is_the_same_run(
    uri: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    before = time.time()
    tracker = start(uri, output, run_name="first")
    tracker.params({"optimizer": {"lr": 1e-3}, "long": "x" * 9000})
    for i in range(450):  # more than two batches
        tracker.metrics({"loss": 1 / (i + 1), "recall@5": float(i)}, samples=i * 8)
    (output / "grid.png").write_bytes(b"png")
    tracker.artifact(str(output / "grid.png"), "grids")
    tracker.finish("preempted")
    assert tracker.unsent == 0

    run = run_of(uri, output)
    assert run.info.run_name == "first" and run.info.status == "KILLED"
    assert run.data.params == {"optimizer.lr": "0.001", "long": "x" * 6000}
    assert run.data.tags["preset"] == "debug" and run.data.tags["pretrain.status"] == "preempted"
    assert history(uri, output, "loss") == [(i * 8, 1 / (i + 1)) for i in range(450)]
    assert history(uri, output, "recall_at_5") == [(i * 8, i) for i in range(450)]
    times = [m.timestamp for m in client(uri).get_metric_history(run.info.run_id, "loss")]
    events = [e for e in JournalReader(tracker.path).read() if e.kind == "metrics"]
    assert times == [int(event.time * 1000) for event in events]  # its own, not the sender's
    assert before * 1000 - 1 <= times[0] and times == sorted(times)
    assert [a.path for a in client(uri).list_artifacts(run.info.run_id, "grids")] == [
        "grids/grid.png"
    ]
    assert (tmp_path / "mlartifacts").is_dir()  # beside the database, not in the working directory

    again = start(uri, output, run_name="another")
    again.params({"optimizer": {"lr": 2e-3}, "new": 1})
    again.metrics({"loss": 0.0}, samples=4000)
    again.finish("finished")
    assert again.unsent == 0
    resumed = run_of(uri, output)
    assert resumed.info.run_id == run.info.run_id and resumed.info.status == "FINISHED"
    assert resumed.data.params == {**run.data.params, "new": "1"}  # the first value stays
    assert history(uri, output, "loss") == [
        *[(i * 8, 1 / (i + 1)) for i in range(450)],
        (4000, 0.0),
    ]
    assert len(client(uri).search_runs([resumed.info.experiment_id])) == 1


def test_a_dead_server_never_blocks_and_sync_delivers_later(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    tracker = start(NOWHERE, output, drain_seconds=1)
    seconds, printed = [], ""
    for i in range(1000):
        began = time.perf_counter()
        tracker.metrics({f"loss/{k}": float(i) for k in range(10)}, samples=i)
        seconds.append(time.perf_counter() - began)
    # The 99th of 100 and not the worst: other processes may hold both cores for some milliseconds.
    assert sorted(seconds)[990] < 0.005 and max(seconds) < 0.5

    def warned() -> bool:
        nonlocal printed
        printed += capfd.readouterr().err
        return "WARNING tracking: MLflow at http://127.0.0.1:9" in printed

    wait_for(warned, 30)
    time.sleep(1)  # long enough for more tries
    began = time.perf_counter()
    tracker.finish("failed")
    assert time.perf_counter() - began < 3
    assert (printed + capfd.readouterr().err).count("WARNING tracking") == 1  # one cause, one line
    assert tracker.unsent == 1002 and "1002 of 1002 events have not reached MLflow" in caplog.text
    with pytest.raises(ConfigError, match=r"no MLflow run yet; first run `python -m pretrain sync"):
        tracking.recorded_run(str(output))

    assert tracking.sync(str(output), NOWHERE, patience=0) == 1002
    assert tracking.sync(str(output), uri) == 0
    assert history(uri, output, "loss/3") == [(i, float(i)) for i in range(1000)]
    assert run_of(uri, output).info.status == "FAILED"
    assert tracking.sync(str(output), uri) == 0  # nothing is sent twice
    assert len(history(uri, output, "loss/3")) == 1000


def test_a_trainer_that_is_killed_has_its_last_events_sent(uri: str, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pretrain import tracking\n"
        f"config, output = tracking.TrackingConfig(uri={uri!r}), {str(tmp_path / 'run')!r}\n"
        "tracker = tracking.build(config, output, 0)\n"
        "tracker.start(config.run_info(output))\n"
        "for i in range(20): tracker.metrics({'loss': i}, samples=i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    sent = tmp_path / "run" / "journal" / "sent.json"
    wait_for(lambda: sent.exists() and sent.read_text() == '{"sequence": 21}', 30)
    assert history(uri, tmp_path / "run", "loss") == [(i, float(i)) for i in range(20)]


def test_a_lost_acknowledgement_stores_nothing_twice(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journaled(tmp_path, uri).params({"a": 1})
    with monkeypatch.context() as patch:
        # All is sent, and the sender dies before it can note any of it, even the run's id.
        patch.setattr(Sender, "_write", lambda *_: None)
        drain(Sender(str(tmp_path), uri))
    drain(Sender(str(tmp_path), uri))
    assert history(uri, tmp_path, "loss") == [(i * 8, i / 2) for i in range(5)]
    run = run_of(uri, tmp_path)
    assert run.data.params == {"a": "1"}
    assert len(client(uri).search_runs([run.info.experiment_id])) == 1


def test_a_failing_call_is_taken_up_where_it_failed(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journaled(tmp_path, uri)
    journal.params({"a": 1})
    journal.metrics({"loss": 9.0}, samples=99)
    sender = Sender(str(tmp_path), uri)
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "_send_params", lambda *_: (_ for _ in ()).throw(ConnectionError()))
        for _ in range(3):
            with pytest.raises(ConnectionError):
                sender.step()
    assert sender.sent == 6 and history(uri, tmp_path, "loss") == [(i * 8, i / 2) for i in range(5)]
    drain(sender)
    assert sender.sent == 8 and history(uri, tmp_path, "loss")[-1] == (99, 9.0)


def test_what_mlflow_refuses_is_dropped_and_named_and_the_rest_is_sent(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = journaled(tmp_path, uri)
    journal.metrics({"a//b": 1.0}, samples=1)  # MLflow wants a path that is its own normal form
    journal.artifact("/no/such/file")
    journal.metrics({"loss": 7.0}, samples=77)
    sender = Sender(str(tmp_path), uri)
    drain(sender)
    assert sender.sent == journal.sequence
    assert [level for _, level, _ in caplog.record_tuples] == [30, 30]
    assert "refused event 7 (metrics)" in caplog.text and "/no/such/file is gone" in caplog.text
    assert history(uri, tmp_path, "loss")[-1] == (77, 7.0)


def test_a_run_that_was_deleted_waits_until_it_is_restored(uri: str, tmp_path: Path) -> None:
    journal = journaled(tmp_path, uri)
    sender = Sender(str(tmp_path), uri)
    drain(sender)
    client(uri).delete_run(sender.run_id)
    journal.metrics({"loss": 9.0}, samples=99)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was deleted; restore it there"):
            drain(sender)
    client(uri).restore_run(sender.run_id)
    drain(sender)
    assert history(uri, tmp_path, "loss")[-1] == (99, 9.0)


def test_files_that_cannot_be_sent_are_owed_and_hold_up_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing store is made up here; for a real one see tests/cluster/test_tracking.py."""
    journal = journaled(tmp_path, uri)
    for name in ("bad", "good"):
        (tmp_path / name).write_text(name)
        journal.artifact(str(tmp_path / name))
    journal.metrics({"loss": 9.0}, samples=99)
    true = Sender._send_artifact

    def store(self: Sender, to: Any, events: Any) -> None:
        if events[0].payload["path"] == "bad":
            raise ConnectionError("the store is down")
        true(self, to, events)

    with monkeypatch.context() as patch:
        patch.setattr(Sender, "_send_artifact", store)
        sender = Sender(str(tmp_path), uri)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                drain(sender)
        assert history(uri, tmp_path, "loss")[-1] == (99, 9.0)
        run_id = sender.run_id
        assert [f.path for f in client(uri).list_artifacts(run_id)] == ["good"]
        assert sender.unsent == 1
    again = Sender(str(tmp_path), uri)  # another process, from what is written down
    assert again.unsent == 1
    drain(again)
    assert again.unsent == 0
    assert [f.path for f in client(uri).list_artifacts(run_id)] == ["bad", "good"]


def test_a_server_that_fails_now_and_then_is_not_waited_for(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call fails every other time: no wait grows while something is done."""
    journaled(tmp_path, uri, metrics=3)
    for kind in ("start", "params", "metrics"):
        true = getattr(Sender, f"_send_{kind}")
        calls = iter(range(1000))

        def flaky(self: Any, *args: Any, true: Any = true, calls: Any = calls) -> None:
            if next(calls) % 2 == 0:
                raise ConnectionError
            true(self, *args)

        monkeypatch.setattr(Sender, f"_send_{kind}", flaky)
    assert tracking.sync(str(tmp_path), uri) == 0
    assert history(uri, tmp_path, "loss") == [(i * 8, i / 2) for i in range(3)]


def test_what_one_request_has_sent_is_not_sent_again_for_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are as large as MLflow takes; smaller while they fail, as a slow server's do by its
    time; of those that came through none is repeated."""
    journal = Journal(str(tmp_path), uri)
    journal.start(TrackingConfig().run_info(str(tmp_path)))
    for i in range(130):
        journal.metrics({f"m{j}": float(i) for j in range(20)}, samples=i)
    sizes: list[int] = []
    fails = iter([False, True, True, False, True, False, False])
    true = mlflow_env.load().MlflowClient.log_batch

    def log_batch(self: Any, run_id: str, metrics: Any = (), **named: Any) -> None:
        sizes.append(len(metrics))
        if next(fails, False):
            raise TimeoutError
        true(self, run_id, metrics=metrics, **named)

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", log_batch)
    sender = Sender(str(tmp_path), uri)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            drain(sender)
    drain(sender)
    assert sizes == [1000, 1000, 500, 240, 500, 240, 500, 620]
    assert history(uri, tmp_path, "m19") == [(i, float(i)) for i in range(130)]


def test_an_end_that_failed_halfway_is_not_begun_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tag is there already; only the status is sent again. Each end has a tag of its own."""
    journal = journaled(tmp_path, uri)
    tags, fails = [], iter([True, True])
    set_tag = mlflow_env.load().MlflowClient.set_tag
    set_terminated = mlflow_env.load().MlflowClient.set_terminated

    def tag(self: object, run_id: str, key: str, value: str, **named: Any) -> None:
        tags.append(value)
        set_tag(self, run_id, key, value, **named)

    def terminated(self: object, *given: Any, **named: Any) -> None:
        if next(fails, False):
            raise ConnectionError
        set_terminated(self, *given, **named)

    monkeypatch.setattr("mlflow.MlflowClient.set_tag", tag)
    monkeypatch.setattr("mlflow.MlflowClient.set_terminated", terminated)
    sender = Sender(str(tmp_path), uri)
    journal.finish("preempted")
    for _ in range(2):
        with pytest.raises(ConnectionError):
            drain(sender)
    drain(sender)
    journal.start(TrackingConfig().run_info(str(tmp_path)))
    journal.finish("finished")
    drain(sender)
    assert tags == ["preempted", "finished"]
    assert run_of(uri, tmp_path).info.status == "FINISHED"


def test_the_trainer_that_has_finished_is_not_kept_waiting(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long wait ends with the run, and those after it are short."""
    journal = journaled(tmp_path, uri)
    monkeypatch.setattr(sender_module, "_LONGEST_WAIT_SECONDS", 1000.0)
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *_: 1000.0)
    failures = iter([True, True, True])
    true = Sender.step

    def step(self: Sender) -> int:
        if next(failures, False):
            raise ConnectionError
        return true(self)

    monkeypatch.setattr(Sender, "step", step)
    threading.Timer(1.0, journal.finish, ["finished"]).start()
    began = time.monotonic()
    assert tracking.sync(str(tmp_path), uri, patience=3600) == 0
    assert time.monotonic() - began < 30
    assert run_of(uri, tmp_path).info.status == "FINISHED"


def test_a_sender_that_was_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "_RESPAWN_SECONDS", 0.0)
    tracker = start(NOWHERE, tmp_path, drain_seconds=0)
    child = tracker._child
    child.kill()
    child.wait()
    tracker.metrics({"loss": 1.0}, samples=1)
    assert tracker._child is not child and tracker._child.poll() is None
    tracker.finish("failed")


def test_secrets_in_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD_FILE", str(file))
    for written, known in [(None, ""), ("one\n", "one"), ("two", "two"), ("", "two")]:
        if written is not None:
            file.write_text(written)
        mlflow_env.read_credentials()
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] == known


def test_only_rank_0_tracks(tmp_path: Path) -> None:
    tracker = tracking.build(TrackingConfig(), str(tmp_path), rank=1)
    assert isinstance(tracker, NullTracker)
    tracker.start(TrackingConfig().run_info(str(tmp_path)))
    tracker.metrics({"loss": 1.0}, samples=1)
    tracker.finish("finished")
    assert list(tmp_path.iterdir()) == []


def test_kind_none_journals_and_can_be_sent_later(uri: str, tmp_path: Path) -> None:
    tracker = start(None, tmp_path / "run", kind="none")
    tracker.metrics({"loss": 1.0}, samples=1)
    tracker.finish("finished")
    assert tracking.sync(str(tmp_path / "run"), uri) == 0
    assert history(uri, tmp_path / "run", "loss") == [(1, 1.0)]
    with pytest.raises(ConfigError, match="holds no journal"):
        tracking.sync(str(tmp_path / "nothing"), uri)


def test_the_uri_is_the_configs_then_the_environments_then_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uri_of(config: TrackingConfig) -> str:
        tracker = tracking.build(config, str(tmp_path), rank=0)
        assert isinstance(tracker, MlflowTracker)
        return tracker.uri

    assert uri_of(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert uri_of(TrackingConfig()) == "http://server"
    assert uri_of(TrackingConfig(uri="http://other")) == "http://other"


def test_no_password_is_written_down(tmp_path: Path) -> None:
    secret = "https://user:hunt@er2@host:5000/mlflow"
    assert mlflow_env.public(secret) == "https://host:5000/mlflow"
    assert mlflow_env.public("sqlite:////a/b@c/mlflow.db") == "sqlite:////a/b@c/mlflow.db"
    tracker = MlflowTracker(str(tmp_path), secret, 0)
    Journal.start(tracker, TrackingConfig().run_info(str(tmp_path)))
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"host:5000" in text and b"er2" not in text


def test_importing_tracking_is_light() -> None:
    code = (
        "import sys, pretrain.tracking\n"
        "print([name for name in ('mlflow', 'torch', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
