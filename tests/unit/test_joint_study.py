"""benchmarks/joint.py: what its cells are, that a stopped study goes on, and that its tests of
significance are right."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks._joint import cells, params, peers, results, run, stats, tables
from benchmarks._joint.corpus import Corpus
from pretrain.config import build
from pretrain.run_config import RunConfig
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A corpus's manifests and tokenizer, of no samples."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train", "heldout-vendor", "heldout-concepts"):
        shards = {"sha256": [name], "samples": [1]}
        (folder / f"{name}.json").write_text(json.dumps({"shards": shards}))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return Corpus(folder)


def expand(**changes):
    fields = {"groups": ["main"], "only": [], "seeds": None, "samples": 1280, "batch": 128}
    return cells.expand(**(fields | changes))


def test_the_main_group_is_five_variants_of_three_seeds_seed_by_seed() -> None:
    found = expand()
    assert len(found) == 15 and len({c.name for c in found}) == 15
    assert [c.seed for c in found] == [0] * 5 + [1] * 5 + [2] * 5
    assert {c.samples for c in found} == {1280}


def test_other_groups_see_half_the_samples_or_what_their_model_saw() -> None:
    found = {c.variant.name: c for c in expand(groups=["ablations", "inference"], seeds=[3])}
    assert found["eps"].samples == 640 and found["eps"].name == "eps-3"
    assert found["chains"].samples == 1280 and found["chains"].trained.name == "joint-3"
    assert found["guided"].trained == found["image_drop"]


def test_only_takes_variants_and_cells_and_refuses_the_unknown() -> None:
    assert [c.name for c in expand(only=["align-1", "skip_off"])] == [
        *("skip_off-0", "align-1", "skip_off-1", "skip_off-2"),
    ]
    with pytest.raises(ValueError, match="no such cell"):
        expand(only=["jiont"])


def test_every_cell_is_a_valid_run_of_its_own(corpus: Corpus, tmp_path: Path) -> None:
    """The configuration that `pretrain train` gets is what the variant says, and no two alike."""
    every = expand(groups=list(cells.GROUPS), seeds=[0])
    settings = {c.variant.name: c.config(corpus, tmp_path) for c in every}
    assert set(settings["joint"].objectives) == {"generate", "align"}
    assert set(settings["generate"].objectives) == {"generate"}
    assert set(settings["align"].objectives) == {"align"}
    assert settings["eps"].model.text_path.predict == "eps"
    assert settings["fusion_mid"].model.text_stream.fusion == "mid"
    assert settings["gamma_0.1"].model.text_path.gamma == 0.1
    assert settings["lambda_3"].objectives["align"]["weight"] == 3.0
    assert settings["joint"].data.train == str(corpus.train)
    keys = [c.key(corpus, 8) for c in every]
    assert len(set(keys)) == len(keys)
    study = run.Study(corpus, tmp_path, tmp_path / "joint.jsonl", 8)
    folders = {c.variant.name: study.folder(c) for c in every}
    assert folders["chains"] == folders["joint"] and folders["guided"] == folders["image_drop"]
    assert len(set(folders.values())) == len(every) - 2


def test_a_key_is_of_what_decides_the_result(corpus: Corpus, tmp_path: Path) -> None:
    (cell,) = expand(only=["joint-0"])
    key = cell.key(corpus, 8)
    assert cell.key(corpus, 9) != key and cell.key(corpus, 8, ("optimizer.lr=2.0e-3",)) != key
    assert cell.key(corpus, 8, ("tracking.kind=none", "checkpoint.keep=9")) == key
    moved = Corpus(tmp_path / "elsewhere")
    corpus.folder.rename(moved.folder)
    assert cell.key(moved, 8) == key
    (moved.folder / "tokenizer.model").write_bytes(b"other pieces")
    assert cell.key(Corpus(moved.folder), 8) != key


def test_done_cells_are_left_out_and_a_line_cut_off_is_done_again(
    corpus: Corpus, tmp_path: Path
) -> None:
    path = tmp_path / "docs" / "joint.jsonl"
    study = run.Study(corpus, tmp_path / "runs", path, 8)
    wanted = expand(seeds=[0, 1])
    for cell in wanted[:3]:
        results.append(path, {"key": study.key(cell), "variant": cell.variant.name})
    assert study.todo(wanted) == wanted[3:]
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # killed while it wrote
    assert study.todo(wanted) == wanted[2:]
    results.append(path, {"key": study.key(wanted[2]), "variant": "again"})
    assert study.todo(wanted) == wanted[3:]
    assert [x["variant"] for x in results.read(path).values()][-1] == "again"


def test_a_study_runs_what_is_left_and_survives_a_cell_that_fails(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run.Study(corpus, tmp_path / "runs", tmp_path / "joint.jsonl", 8, jobs=2)
    started: list[str] = []

    def process(command: list[str], folder: Path, jobs: int) -> None:
        if "benchmarks._joint.score" in command:
            answer = {"metrics": {}, "hits": {}, "parameters": 1, "score_seconds": 0.0}
            Path(command[-1]).write_text(json.dumps(answer))
            return
        started.append(folder.name)
        if folder.name.startswith("generate"):
            raise RuntimeError("ended with 1")
        tree = {"samples": 1280, "progress": {"samples": 1280, "seconds": 2.0}}
        (folder / run.FINISHED).write_text(json.dumps(tree))

    monkeypatch.setattr(run, "_process", process)
    wanted = expand(groups=["main", "inference"], seeds=[0])
    assert run.run(study, wanted) == 1
    done = {x["variant"]: x for x in results.read(study.results).values()}
    # guided's model is an ablation's, trained here because nobody asked for the ablation itself
    assert set(done) == {"joint", "align", "two_tower", "plain_unet", "chains", "guided"}
    assert done["joint"]["images_per_second"] == 640.0
    names = sorted(name.rsplit("-", 2)[0] for name in started)
    assert names == ["align", "generate", "image_drop", "joint", "plain_unet", "two_tower"]
    started.clear()
    assert run.run(study, wanted) == 1
    assert [name.rsplit("-", 2)[0] for name in started] == ["generate"]


def test_training_is_the_projects_own_command(corpus: Corpus, tmp_path: Path) -> None:
    study = run.Study(corpus, tmp_path / "runs", tmp_path / "joint.jsonl", 8)
    (cell,) = expand(only=["align-0"])
    study.folder(cell).mkdir(parents=True)
    command = run.train_command(study, cell, {})
    assert command[:4] == ["-m", "pretrain", "train", "--config"]
    assert "objectives.generate=null" in command and f"data.train={corpus.train}" in command
    (peer,) = expand(only=["two_tower-0"])
    study.folder(peer).mkdir(parents=True)
    resolved = peer.config(corpus, study.folder(peer)).resolved()
    command = run.train_command(study, peer, resolved)
    settings = build(RunConfig, json.loads(Path(command[-1]).read_text()))
    assert command[2] == "two_tower" and settings.training.samples == 1280


# ---- statistics


def test_students_p_in_closed_form() -> None:
    assert stats.student_p(1.0, 1) == pytest.approx(0.5)  # Cauchy
    assert stats.student_p(12.7062, 1) == pytest.approx(0.05, abs=1e-6)  # tables, 97.5%
    assert stats.student_p(4.30265, 2) == pytest.approx(0.05, abs=1e-6)
    assert stats.student_p(2.57058, 5) == pytest.approx(0.05, abs=1e-6)
    for t in (0.0, 0.3, 2.0, 9.0):  # two degrees: 1 - t / sqrt(2 + t²)
        assert stats.student_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_tests_agree_with_scipy() -> None:
    scipy = pytest.importorskip("scipy.stats")
    draws = np.random.default_rng(0)
    for n in (2, 3, 4, 5, 10, 31):
        a, b = draws.normal(size=(2, n)).tolist()
        t, p = stats.paired_t(a, b)
        theirs = scipy.ttest_rel(a, b)
        assert (t, p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)
    for gained, lost in ((0, 0), (5, 0), (3, 9), (40, 25), (400, 460)):
        a = np.array([True] * gained + [False] * lost + [True] * 7)
        b = np.array([False] * gained + [True] * lost + [True] * 7)
        exact = scipy.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert stats.mcnemar(a, b) == pytest.approx(exact, rel=1e-9)


def test_one_pair_or_no_spread_has_no_p() -> None:
    assert all(map(math.isnan, stats.paired_t([1.0], [0.0])))
    assert all(map(math.isnan, stats.paired_t([1.0, 2.0], [0.0, 1.0])))
    assert math.isnan(stats.mean_sd([3.0])[1]) and stats.mean_sd([1.0, 3.0])[1] == math.sqrt(2)


def test_the_bootstrap_has_the_spread_of_a_mean() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.random((3, 500)) < 0.3, draws.random((3, 500)) < 0.2
    difference = a.mean(0) - b.mean(0)
    low, high = stats.bootstrap(a, b)
    error = difference.std() / math.sqrt(500)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.1 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert stats.bootstrap(a, a) == (0.0, 0.0)


def test_hits_survive_packing() -> None:
    hits = np.random.default_rng(2).random(521) < 0.4
    assert np.array_equal(stats.unpack(stats.pack(hits.tolist()), 521), hits)


# ---- peers and parameters


def test_parts_of_a_network_add_up_and_a_single_task_goes_without_the_others() -> None:
    task = tiny.task({"generate": {}, "align": {}})
    n = params.count(task.model, task.objectives)
    assert n.joint == sum(p.numel() for p in task.parameters())
    assert n.generate == n.joint - n.text_stream and n.align == n.joint - n.decoder
    task(tiny.batch(4)).loss.backward()
    single = tiny.task({"align": {}})
    single(tiny.batch(4)).loss.backward()
    reached = sum(p.numel() for p in single.parameters() if p.grad is not None)
    assert reached == params.count(single.model, single.objectives).align


def test_the_two_towers_have_the_size_of_the_discriminative_part() -> None:
    task = tiny.task({"generate": {}, "align": {}})
    wanted = params.count(task.model, task.objectives).align
    towers = peers.TwoTower(tiny.model())
    assert sum(p.numel() for p in towers.parameters()) == pytest.approx(wanted, rel=0.05)


def test_clips_loss_in_closed_form() -> None:
    clip = peers.ClipLoss().requires_grad_(False)
    rows = torch.eye(4)
    logit = 1 / 0.07
    expected = -math.log(math.exp(logit) / (math.exp(logit) + 3))
    assert float(clip(rows, rows)) == pytest.approx(expected, abs=1e-6)
    shifted = -math.log(1 / (math.exp(logit) + 3))
    assert float(clip(rows, rows.roll(1, 0))) == pytest.approx(shifted, rel=1e-6)
    with torch.no_grad():
        clip.log_scale.fill_(math.log(1000))
    assert float(clip(rows, rows.roll(1, 0))) == pytest.approx(100, rel=1e-6)  # the clamp


def test_a_tower_sees_the_image_and_no_text() -> None:
    towers = peers.TwoTower(tiny.model()).eval()
    batch = tiny.batch(4)
    e = towers.embed_images(batch.pixels_BCHW)
    assert torch.allclose(e.norm(dim=-1), torch.ones(4), atol=1e-5)
    assert not torch.allclose(e[0], e[1], atol=1e-3)
    towers(batch).backward()
    unused = [n for n, p in towers.named_parameters() if p.grad is None]
    assert not unused


def test_the_plain_unet_learns_what_generation_learns() -> None:
    """Its loss at our own draws is the value of L_IG: the same weights, diffusers' forward pass."""
    task = tiny.task({"generate": {}}).eval()
    peer = peers.PlainUNet(task.model, caption_drop=0.0, seed=0)
    batch = tiny.batch(256)
    with torch.no_grad():
        ours, theirs = float(task(batch).loss), float(peer(batch))
    assert theirs == pytest.approx(ours, rel=0.05)  # other noise
    peer(tiny.batch(4)).backward()
    unused = {n for n, p in peer.named_parameters() if p.grad is None}
    assert unused <= {"text_encoder.query.weight"}


# ---- tables


def line(variant: str, seed: int, top1: float, hits: list[bool]) -> dict:
    metrics = {"zero_shot/vendor/top1": top1, "zero_shot/vendor/chance": 0.01}
    return {
        **{"key": f"{variant}{seed}", "variant": variant, "seed": seed, "samples": 1280},
        **{"seconds": 60.0, "images_per_second": 21.3, "parameters": 5_000_000},
        **{"metrics": metrics, "hits": {"vendor": {"n": len(hits), "top1": stats.pack(hits)}}},
    }


def test_tables_show_means_spreads_and_tests(tmp_path: Path) -> None:
    path = tmp_path / "joint.jsonl"
    for seed, (ours, other) in enumerate([(0.20, 0.15), (0.24, 0.16), (0.22, 0.17)]):
        results.append(path, line("joint", seed, ours, [True] * 6 + [False] * 4))
        results.append(path, line("align", seed, other, [False] * 10))
    text = tables.render(path)
    assert "| joint: both objectives, one network | 3 | 1,280 | 22.0 ± 2.0% |" in text
    assert "| chance |  |  | 1.0% |" in text
    assert "6.00 ± 1.73 points | t = 6.00, p = 0.027 | [+30.00, +90.00] points | 0.0312" in text
    document = tmp_path / "RESULTS.md"
    document.write_text("before\n<!-- joint: begin -->\nold\n<!-- joint: end -->\nafter\n")
    tables.insert(document, text)
    tables.insert(document, text)
    found = document.read_text()
    assert found.startswith("before\n") and found.endswith("\nafter\n") and "old" not in found
    assert found.count("| chance |") == 1
    assert tables.render(tmp_path / "none.jsonl") == "No result yet."
