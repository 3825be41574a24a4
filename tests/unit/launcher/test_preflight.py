"""What the verdict makes of facts and measurements; tests/cluster/test_hosts.py asks real hosts."""

from pathlib import Path
from typing import Any

import pytest

from launcher.pairs import rounds
from launcher.preflight import judge, slow, stores

NOW = 1_000.0


def facts(**changed: Any) -> dict[str, dict[str, Any]]:
    values = {
        "name": "x",
        "python": "3.11.2",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "code": "abc",
        "config": "def",
        "time": NOW,
        "disk_gib": 100.0,
        "peers": [],
        "shared": True,
        **changed,
    }
    return {name: {"value": value} for name, value in values.items()}


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"python": "3.12.0"}, "python", "3.12.0, elsewhere 3.11.2"),
        ({"code": "xyz"}, "code", "xyz, elsewhere abc"),
        (
            {"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}},
            "packages",
            "torch 2.12.0, elsewhere 2.13.0",
        ),
        ({"time": NOW + 60}, "time", "60 s off"),
        ({"time": NOW - 60}, "time", "60 s off"),
        ({"disk_gib": 1.0}, "disk_gib", "1.0 GiB are free"),
        ({"peers": ["node9"]}, "peers", "does not know node9"),
        ({"shared": False}, "shared", "is not there"),
    ],
)
def test_a_host_that_differs_is_named(changed: dict[str, Any], check: str, said: str) -> None:
    known = {"a": facts(), "b": facts(**changed), "c": facts()}
    (finding,) = judge(known, (NOW, NOW + 0.1))
    assert (finding.host, finding.check, finding.bad) == ("b", check, True)
    assert said in finding.said and finding.remedy


def test_what_could_not_be_done_is_said_with_its_remedy() -> None:
    known = facts()
    known["writes"] = {"error": "PermissionError: Access Denied"}
    (finding,) = judge({"a": facts(), "b": known}, (NOW, NOW))
    assert (finding.host, finding.check) == ("b", "writes")
    assert "Access Denied" in finding.said and "credentials" in finding.remedy


def test_equal_hosts_pass() -> None:
    assert judge({"a": facts(), "b": facts()}, (NOW, NOW)) == []


def test_the_slow_host_is_named() -> None:
    def reply(step: float, rate: float) -> dict[str, Any]:
        return {"step_seconds": step, "pairs": [[0, 1e-4, rate], [1, 1e-4, rate]]}

    hosts = ["a", "b", "c"]
    even = {h: reply(0.1, 1e9) for h in hosts}
    assert slow(hosts, even) == []
    (finding,) = slow(hosts, {**even, "b": reply(0.2, 1e9)})
    assert (finding.host, finding.check, finding.bad) == ("b", "step", False)
    # A narrow link is narrow in each pair of its host; in the others' one pair of two.
    rates = {h: reply(0.1, 1e9) for h in hosts}
    rates["c"] = {"step_seconds": 0.1, "pairs": [[0, 1e-4, 1e7], [1, 1e-4, 1e7]]}
    (finding,) = slow(hosts, rates)
    assert (finding.host, finding.check) == ("c", "link")
    # One far away: its pairs answer late, of the others' one pair of two.
    late = {h: reply(0.1, 1e9) for h in hosts}
    for near in ("a", "b"):
        late[near] = {"step_seconds": 0.1, "pairs": [[0, 1e-4, 1e9], [2, 2e-2, 1e9]]}
    late["c"] = {"step_seconds": 0.1, "pairs": [[0, 2e-2, 1e9], [1, 2e-2, 1e9]]}
    (finding,) = slow(hosts, late)
    assert (finding.host, finding.check) == ("c", "latency") and "20.0 ms" in finding.said


@pytest.mark.parametrize("hosts", [2, 3, 5, 8, 40])
def test_the_rounds_of_pairs(hosts: int) -> None:
    met = [pair for pairs in rounds(hosts) for pair in pairs]
    assert len(set(met)) == len(met)
    for pairs in rounds(hosts):
        names = [rank for pair in pairs for rank in pair]
        assert len(set(names)) == len(names) and max(names) < hosts
    for rank in range(hosts):
        assert sum(rank in pair for pair in met) >= min(hosts - 1, 7)


def test_the_stores_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {train: 's3://b/train.json'}\n")
    (tmp_path / "run.yaml").write_text(
        "base: base.yaml\ncheckpoint: {copy_to: 's3://b/copies'}\ntracking: {uri: 'http://m:5000'}\n"
    )

    class Launch:
        code, config, output = str(tmp_path), "run.yaml", "s3://b/run"
        argv = ("python", "--set", "data.extra=https://h/x.json")

    writes, reads, server = stores(Launch(), {})  # type: ignore[arg-type]
    assert writes == ["s3://b/copies", "s3://b/run"]
    assert reads == ["https://h/x.json", "s3://b/train.json"]
    assert server == "http://m:5000"
    assert stores(Launch(), {"MLFLOW_TRACKING_URI": "http://n"})[2] == "http://n"  # type: ignore[arg-type]
