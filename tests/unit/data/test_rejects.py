"""Refusals: every one counted, logged and printed within bounds; too many stop the run."""

import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path

import pytest

from pretrain.data import rejects
from pretrain.data.rejects import Ledger
from pretrain.errors import DataError
from pretrain.types import Reject


def refused(reason: str, shard: str = "0.tar", count: int = 1) -> list[Reject]:
    return [Reject(reason, shard, f"k{i}") for i in range(count)]


def ledger(folder: Path | None = None, max_rate: float = 0.1, **options: object) -> Ledger:
    return Ledger(folder, max_rate, say=lambda line: None, **options)


def merged(*lists: list[Reject], **options: object) -> Ledger:
    made = ledger(**options)
    for listed in lists:
        made.add(listed)
        made.merge([made.take()])
    return made


def test_ranks_that_exchange_what_is_new_agree_on_the_totals() -> None:
    ranks = [ledger(rank=r) for r in range(3)]
    for step in range(4):
        for r, one in enumerate(ranks):
            one.add(refused("no image", f"{r}.tar", r))
            one.add(refused("link", count=step))
        taken = [one.take() for one in ranks]
        for one in ranks:
            one.merge(taken)
    expected = {"rejects/no image": 12.0, "rejects/link": 18.0, "rejects/rate": 30 / 600}
    assert all(one.metrics(600) == expected for one in ranks)
    assert all(one.state_dict() == ranks[0].state_dict() for one in ranks)
    assert sum(ranks[0].state_dict().values()) == 30


def test_counts_survive_a_resume_and_what_was_not_merged_is_met_again() -> None:
    before = merged(refused("link", count=3))
    before.add(refused("link", count=5))  # after the last log: a resume reads those samples again
    after = ledger()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    after.add(refused("no image"))
    after.merge([after.take()])
    assert after.by_reason() == {"link": 3, "no image": 1}


def test_counts_of_an_older_checkpoint_are_taken() -> None:
    made = ledger()
    made.load_state_dict({"no image": 3})
    assert made.by_reason() == {"no image": 3}


def test_the_error_names_rate_limit_and_the_worst_shards() -> None:
    made = merged(
        refused("undecodable image", "s3://b/7.tar", 90),
        refused("no caption", "s3://b/7.tar", 10),
        refused("link", "s3://b/3.tar", 40),
        *(refused("link", f"s3://b/x{i}.tar", 2) for i in range(30)),
        max_rate=0.05,
    )
    made.check(4_000)
    with pytest.raises(DataError) as caught:
        made.check(2_000)
    text = str(caught.value)
    assert "data.max_reject_rate=0.05" in text and "200 refusals in 2,000 samples are 0.1" in text
    assert "s3://b/7.tar (100, mostly undecodable image), s3://b/3.tar (40, mostly link)" in text
    assert "and 27 more" in text and "100 × link, 90 × undecodable image" in text
    assert "data verify" in text


def test_few_samples_are_not_judged_and_a_rate_at_the_limit_passes() -> None:
    made = merged(refused("link", count=10), max_rate=0.1, min_samples=100)
    made.check(99)
    made.check(100)
    made.merge([{"link\t0.tar": 1}])
    with pytest.raises(DataError):
        made.check(100)


def test_every_refusal_is_a_line_whatever_its_key(tmp_path: Path) -> None:
    first, other = ledger(tmp_path / "run"), ledger(tmp_path / "run", rank=2)
    odd = [Reject("link", "s", 'a\nb"c'), Reject("link", "s", "caf\udce9 \u2028")]
    first.add(odd)
    first.add([])
    first.add(refused("no image"))
    other.add(refused("no caption"))
    lines = (tmp_path / "run/rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ['a\nb"c', "caf\udce9 \u2028", "k0"]
    assert json.loads(lines[-1]) == {"reason": "no image", "shard": "0.tar", "key": "k0"}
    assert len((tmp_path / "run/rejects-2.jsonl").read_text().splitlines()) == 1
    ledger(tmp_path / "run").add(refused("link"))  # resumed
    assert len((tmp_path / "run/rejects.jsonl").read_text().splitlines()) == 4


def test_no_file_is_made_for_nothing(tmp_path: Path) -> None:
    ledger(tmp_path / "run").add([])
    ledger(None).add(refused("link"))
    assert list(tmp_path.iterdir()) == []


def _write(folder: str) -> None:
    made = Ledger(folder, 1.0, say=lambda line: None)
    while True:
        made.add([Reject("link", "s" * 300, "k" * 300)] * 5)


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # the parts under test start no thread
    writers = [context.Process(target=_write, args=(str(tmp_path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 30
    path = tmp_path / "rejects.jsonl"
    while not path.exists() or path.stat().st_size < 300_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for writer in writers:
        writer.kill()
        writer.join()
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert len(lines) >= 200 and all(json.loads(line)["key"] == "k" * 300 for line in lines)


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    said: list[str] = []
    made = Ledger(tmp_path / "run", 1.0, say=said.append)
    made.add(refused("link"))
    made.add(refused("link"))
    assert made.take() == {"link\t0.tar": 2}
    assert sum("no longer written" in line for line in said) == 1


def test_what_is_printed_is_bounded() -> None:
    said: list[str] = []
    made = Ledger(None, 1.0, say=said.append)
    made.add(refused("link", count=5_000))
    made.add([Reject("no image", "1.tar", "a\nb")])
    assert said[:3] == [f"[data] refused 0.tar:'k{i}': link" for i in range(3)]
    assert said[-1] == "[data] refused 1.tar:'a\\nb': no image"
    assert "[data] refused so far by this rank: 1,000 × link" in said
    assert len(said) == 3 + 2 + 5 + 1


def test_counters_are_bounded_and_lose_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejects, "MAX_COUNTERS", 10)
    made = merged(*(refused("link", f"{i}.tar") for i in range(100)))
    made.merge([{"link\t3.tar": 1, "link\t99.tar": 1}])
    assert made.by_reason() == Counter(link=102)
    assert len(made.state_dict()) == 11
    assert made.state_dict()["link\t3.tar"] == 2
    assert made.state_dict()[f"link\t{rejects.OTHER_SHARDS}"] == 91
