"""What a training run told its journal is in MLflow once and in order, whatever happened to the
server meanwhile: a real one, over PostgreSQL and SeaweedFS, behind fault proxies."""

import contextlib
import json
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain import mlflow_env, tracking
from pretrain.tracking.journal import Event, Journal, JournalReader
from tests.conftest import require_programs_now
from tests.support import faulty_run, postgres
from tests.support import s3 as s3_support
from tests.support.faultproxy import FaultProxy, Weather
from tests.support.faulty_run import SAMPLES, SIGTERM, Attempt, Fault
from tests.support.postgres import Postgres
from tests.support.s3 import S3Server
from tests.support.tracking_server import TrackingServer

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]

STORM = Weather(p_503=0.3, p_stall=0.08, stall_seconds=5.0)
# Two runs of one seed differ in these.
TIMES = ("images_per_second", "evaluation_seconds", "mfu", "system/")
SETTINGS = (
    "training.log_every_samples=16",
    "checkpoint.every_samples=1000000",
    "tracking.system_seconds=0.2",
    "watchdog.timeout_seconds=0",  # it waits at the faults
)


@dataclass
class Site:
    """The server, and the ways to it and to its store that fail.

    Attributes:
        server: itself.
        proxy, s3_proxy: before MLflow and before S3.
        password: the file that clients read theirs from.
    """

    server: TrackingServer
    proxy: FaultProxy
    s3_proxy: FaultProxy
    password: Path
    database: Postgres

    def client(self) -> dict[str, str]:
        """A trainer's variables."""
        return {
            **s3_support.environment(self.s3_proxy.url),
            "MLFLOW_TRACKING_URI": self.proxy.url,
            "MLFLOW_TRACKING_USERNAME": "trainer",
            "MLFLOW_TRACKING_PASSWORD_FILE": str(self.password),
        }


@pytest.fixture(scope="module")
def site(s3: S3Server) -> Iterator[Site]:
    """A server that is starting."""
    postgres.find_programs()
    require_programs_now("initdb", "postgres")
    # PostgreSQL's own user must be able to enter: pytest's folders are its user's alone.
    folder = Path("/tmp") / f"diffdis-tracking-{os.getpid()}"
    (folder / "postgres").mkdir(parents=True)
    folder.chmod(0o755)
    try:
        with Postgres(folder / "postgres") as database:
            server = TrackingServer(
                folder / "server",
                database.make_database("mlflow"),
                database.make_database("users"),
                f"s3://{S3Server.BUCKET}/mlflow",
                s3_support.environment(s3.url),
            )
            server.start()
            try:
                with FaultProxy(server.port, STORM) as proxy, FaultProxy(s3.port) as s3_proxy:
                    yield Site(server, proxy, s3_proxy, folder / "password", database)
            finally:
                server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


TIMED = 15_000  # samples of each run whose time is taken: some minutes, of which 2% are seconds


@dataclass
class Story:
    """A run that went through everything, and the same run that nothing befell, without a server.

    Attributes:
        faulty, plain: their output folders.
        tracker_seconds: that each call of the tracker took, in training.
        step_seconds: of training, all steps of the two attempts together.
    """

    faulty: Path
    plain: Path
    tracker_seconds: list[float]
    step_seconds: float


@pytest.fixture(scope="module")
def story(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("runs")
    faulty, plain = folder / "run", folder / "elsewhere" / "run"
    plain.parent.mkdir()
    site.password.write_text("not-made-yet")
    # The server is not up yet. It is: 48 samples in; the password expires. That is seen: 96 samples
    # in; the server is killed. SIGTERM at 144.
    expires, dies = Fault("step", 0, samples=48), Fault("step", 0, samples=96)
    first = start(faulty, site, (expires, dies, Fault("step", SIGTERM, samples=144)), drain=2)
    undisturbed = Attempt(plain, 1, (*SETTINGS, "tracking.kind=none"))
    try:
        site.server.wait()
        site.password.write_text(site.server.secrets()["trainer_password"])
        first.wait_at(expires, 400)
        wait_for(lambda: sent(faulty) >= 3, "the first events", 400)
        site.server.set_password("trainer", "a-second-password")
        first.go_on(expires)
        first.wait_at(dies, 400)
        wait_for(lambda: "not authenticated" in first.rank_text(0), "a refusal", 400)
        site.server.kill()
        first.go_on(dies)
        assert first.codes(400) == [75], first.text()
        assert sent(faulty) < len(events(faulty))
        site.server.start()
        site.password.write_text("a-second-password")
        second = start(faulty, site, (), drain=400)
        assert second.codes(600) == [0], second.text()
        assert undisturbed.codes(400) == [0], undisturbed.text()
    finally:
        first.kill()
        undisturbed.kill()
    told = [json.loads(path.read_text()) for a in (first, second) for path in a.own.glob("timed")]
    seconds = [s for entry in told for s in entry["tracker"]]
    return Story(faulty, plain, seconds, sum(entry["steps"] for entry in told))


def start(
    output: Path, site: Site, faults: tuple[Fault, ...], drain: float, *settings: str
) -> Attempt:
    tracked = ("tracking.kind=mlflow", f"tracking.drain_seconds={drain}")
    # (Another kind of tracking replaces what was said of the one before.)
    settings = (*tracked, *SETTINGS, *settings)
    return Attempt(
        output,
        1,
        settings,
        faults,
        environment=site.client(),
        function=f"{__name__}:timed_attempt",
    )


def timed_attempt(*arguments: Any) -> None:
    """`faulty_run.attempt`, on a rank, which also notes how long the tracker's calls took."""
    from pretrain.engine import Engine
    from pretrain.tracking.mlflow_tracker import MlflowTracker

    noted: dict[str, list[float]] = {"tracker": [], "steps": [], "drain": []}

    def timed(method: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*given, **named)
            finally:
                noted[what].append(time.perf_counter() - began)

        return call

    for name in ("start", "params", "metrics", "artifact"):
        setattr(MlflowTracker, name, timed(getattr(MlflowTracker, name), "tracker"))
    for owner, name, what in ((MlflowTracker, "finish", "drain"), (Engine, "step", "steps")):
        setattr(owner, name, timed(getattr(owner, name), what))
    try:
        faulty_run.attempt(*arguments)
    finally:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        sums = {name: sum(noted[name]) for name in ("drain", "steps")}
        sender = children.ru_utime + children.ru_stime
        tree = {**sums, "tracker": noted["tracker"], "sender_cpu": sender}
        (Path(arguments[5]) / "timed").write_text(json.dumps(tree))


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"no {what} in {seconds} s"
        time.sleep(0.05)


def events(output: Path) -> list[Event]:
    return JournalReader(output / "journal" / "events.jsonl").read()


def sent(output: Path) -> int:
    path = output / "journal" / "sent.json"
    return int(json.loads(path.read_text())["sequence"]) if path.exists() else 0


Points = dict[str, list[tuple[int, int, str]]]


def journaled(output: Path) -> Points:
    """(samples, milliseconds, value as text, for NaN's sake) of each metric, in order, as the
    journal has them."""
    found: Points = {}
    for event in events(output):
        for name, value in event.payload["values"].items() if event.kind == "metrics" else ():
            point = (event.payload["samples"], int(event.time * 1000), repr(value))
            found.setdefault(mlflow_env.key(name), []).append(point)
    return found


@pytest.fixture
def as_admin(site: Site, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An MLflow client that asks the server itself, which is up."""
    site.server.wait()
    for name, value in {**site.client(), **site.server.admin()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD_FILE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.server.url)
    return mlflow_env.load().MlflowClient(site.server.url)


def stored(client: Any, run_id: str) -> Points:
    """The same, as MLflow has them."""
    names = client.get_run(run_id).data.metrics
    return {
        name: [
            (m.step, m.timestamp, repr(m.value)) for m in client.get_metric_history(run_id, name)
        ]
        for name in names
    }


def run_id(output: Path) -> str:
    return str(json.loads((output / "journal" / "run.json").read_text())["run_id"])


@pytest.mark.soak  # with `story`, two minutes
def test_every_metric_is_there_once_in_order_and_a_requeued_run_is_one_run(
    story: Story, site: Site, as_admin: Any
) -> None:
    assert json.loads((story.faulty / "journal" / "sent.json").read_text()) == {
        "sequence": len(events(story.faulty))
    }
    told = journaled(story.faulty)
    assert stored(as_admin, run_id(story.faulty)) == told
    # Samples 16, 32, ..., 192, each once: the run was stopped at 144 and taken up again.
    assert [samples for samples, _, _ in told["generate/loss"]] == list(range(16, SAMPLES + 1, 16))
    assert "system/node-0/cpu_utilization_percentage" in told
    run = as_admin.get_run(run_id(story.faulty))
    assert run.info.status == "FINISHED"
    experiment = run.info.experiment_id
    assert [r.info.run_id for r in as_admin.search_runs([experiment])] == [run.info.run_id]
    # In PostgreSQL itself: no row too many, of this run or another.
    rows = site.database.query("SELECT run_uuid, count(*) FROM metrics GROUP BY run_uuid")
    assert rows == [(run.info.run_id, sum(map(len, told.values())))]
    for fault in ("503", "stall"):
        assert site.proxy.counts[fault] > 0, site.proxy.counts


@pytest.mark.soak
def test_no_step_waited_for_any_of_it(story: Story) -> None:
    """(A whole run's time against one without faults: `test_the_time_of_a_run`.)"""
    calls = sorted(story.tracker_seconds)
    assert len(calls) > 15
    # One slow call may be the machine's.
    assert statistics.median(calls) < 0.002 and sum(calls[:-1]) < 0.02 * story.step_seconds


@pytest.mark.soak
def test_files_go_straight_to_the_object_store(
    story: Story, site: Site, s3: S3Server, as_admin: Any
) -> None:
    run = as_admin.get_run(run_id(story.faulty))
    place = f"s3://{S3Server.BUCKET}/mlflow/"
    assert run.info.artifact_uri.startswith(place)
    key = f"{run.info.artifact_uri.removeprefix(f's3://{S3Server.BUCKET}/')}/config.json"
    body = s3.client().get_object(Bucket=S3Server.BUCKET, Key=key)["Body"].read()
    assert body == (story.faulty / "config.json").read_bytes()
    assert site.s3_proxy.counts["PUT"] >= 1  # by the trainer's way to the store
    asked = [line for line in site.server.log().splitlines() if "HTTP/1.1" in line]
    assert asked and not [line for line in asked if "artifact" in line]


@pytest.mark.soak
def test_a_run_without_a_server_sent_later_equals_the_one_logged_live(
    story: Story, site: Site, as_admin: Any
) -> None:
    """The other run had the same seed, and nothing befell it: its values are those of the run that
    was killed, requeued, and logged live, to the bit."""
    assert tracking.sync(str(story.plain), site.server.url) == 0
    live, later = (stored(as_admin, run_id(o)) for o in (story.faulty, story.plain))
    assert later == journaled(story.plain) and live.keys() == later.keys()
    for name in live:
        if not name.startswith(TIMES):
            plain = [(samples, value) for samples, _, value in later[name]]
            assert [(samples, value) for samples, _, value in live[name]] == plain, name
    one, other = (as_admin.get_run(run_id(o)).data for o in (story.faulty, story.plain))
    differ = {k for k in one.params.keys() | other.params if one.params[k] != other.params[k]}
    assert differ == {"output", "tracking.kind", "tracking.drain_seconds"}  # what `story` sets
    assert tracking.sync(str(story.plain), site.server.url) == 0
    assert stored(as_admin, run_id(story.plain)) == later  # again, and nothing new


def test_two_runs_at_once_from_two_clusters_do_not_mix(
    site: Site, as_admin: Any, tmp_path: Path
) -> None:
    """The same experiment, name and output folder of a container; at the same time."""
    folders = [tmp_path / cluster for cluster in ("one", "other")]
    for number, folder in enumerate(folders):
        journal = Journal(str(folder / "run"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "folder", Path("/runs/1/journal"))  # what each of them says
            patch.setattr(time, "time", lambda: 1.8e9)
            journal.start(tracking.TrackingConfig(experiment="both").run_info("/runs/1"))
        for step in range(300):
            journal.metrics({"loss": float(number)}, samples=step)
        journal.finish("finished")
    with ThreadPoolExecutor() as pool:
        outputs = [str(folder / "run") for folder in folders]
        assert list(pool.map(lambda o: tracking.sync(o, site.server.url), outputs)) == [0, 0]
    ids = [run_id(folder / "run") for folder in folders]
    assert ids[0] != ids[1]
    for number, (found, folder) in enumerate(zip(ids, folders, strict=True)):
        assert stored(as_admin, found) == journaled(folder / "run")
        assert {value for _, _, value in stored(as_admin, found)["loss"]} == {repr(float(number))}


@pytest.mark.soak
def test_a_store_that_is_down_holds_up_no_metric(
    site: Site, as_admin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    journal = Journal(str(tmp_path))
    journal.start(tracking.TrackingConfig().run_info(str(tmp_path)))
    (tmp_path / "grid.png").write_bytes(b"png")
    journal.artifact(str(tmp_path / "grid.png"), "grids")
    journal.metrics({"loss": 1.0}, samples=1)
    journal.finish("finished")
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, site.s3_proxy, "weather", Weather())
        site.s3_proxy.weather = Weather(down=True)
        assert tracking.sync(str(tmp_path), site.server.url, patience=0) == 1
    found = run_id(tmp_path)
    assert stored(as_admin, found) == journaled(tmp_path)
    assert as_admin.get_run(found).info.status == "FINISHED"
    assert tracking.sync(str(tmp_path), site.server.url) == 0
    assert [f.path for f in as_admin.list_artifacts(found, "grids")] == ["grids/grid.png"]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_time_of_a_run(site: Site, as_admin: Any, tmp_path: Path) -> None:
    """Runs in turn, through faults and without any; each from its start to its end, with the wait
    for what is unsent.

    What tracking can take from a run: its calls, the wait at the end, and the sender's own work.
    """
    site.server.wait()
    site.server.nice = 10  # elsewhere it has a machine of its own
    password = site.server.secrets()["trainer_password"]
    site.password.write_text(password)
    table: list[dict[str, float]] = []
    for number, faults in enumerate((False, True, True, False)):
        output = tmp_path / f"{number}"
        began = time.monotonic()
        site.proxy.weather = STORM if faults else Weather()
        attempt = start(
            output, site, (), 60, f"training.samples={TIMED}", "tracking.system_seconds=1"
        )
        if faults:
            password = through_faults(output, site, TIMED, number)
        assert attempt.codes(1800) == [0], attempt.text()
        wall = time.monotonic() - began
        told = json.loads((attempt.own / "timed").read_text())
        calls = told.pop("tracker")
        table.append({"faults": faults, "wall": wall, **told, "calls": sum(calls), "n": len(calls)})
        print(table[-1], flush=True)
        assert tracking.sync(str(output), site.server.url) == 0
        assert stored(as_admin, run_id(output)) == journaled(output)
        site.password.write_text(password)
    for row in table:
        assert row["calls"] < 0.005 * row["wall"]
    with_faults, without = (
        statistics.median(r["wall"] for r in table if r["faults"] == f) for f in (True, False)
    )
    print(f"wall time {with_faults / without:.3f}")
    # All that a run waits for, apart from what else the machine does in these minutes.
    waited = [
        statistics.median(r["calls"] + r["drain"] for r in table if r["faults"] == f)
        for f in (True, False)
    ]
    print(f"waited for tracking {waited[0]:.1f} s through faults, {waited[1]:.1f} s without")
    assert waited[0] - waited[1] <= 0.02 * without
    assert with_faults <= 1.02 * without


def through_faults(output: Path, site: Site, samples: int, number: int) -> str:
    """The password expires, the server is killed and started again, the password is renewed; the
    new one."""

    def reached(part: float) -> Callable[[], bool]:
        return lambda: any(
            e.kind == "metrics" and e.payload["samples"] >= part * samples for e in events(output)
        )

    password = f"a-password-of-run-{number}"
    wait_for(reached(0.2), "progress", 1800)
    site.server.set_password("trainer", password)
    wait_for(reached(0.35), "progress", 1800)
    site.server.kill()
    site.server.start()
    wait_for(reached(0.5), "progress", 1800)
    site.password.write_text(password)
    return password
