"""From YAML and overrides to a checked tree; what is wrong is named before any hardware is held."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pretrain import config as configs
from pretrain.__main__ import main
from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEBUG = str(ROOT / "configs/debug.yaml")


class Inner(Config):
    rate: float = Field(1e-3, gt=0)
    sizes: tuple[int, ...] = (1, 2)


class Outer(Config):
    name: str
    inner: Inner = Inner()
    fast: bool = False


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths in configs start from the checkout; `train` takes over signals, given back here."""
    monkeypatch.chdir(ROOT)
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_base_is_merged_under_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "deep/first.yaml", "name: a\ninner: {rate: 1.0, sizes: [1, 2, 3]}\n")
    write(tmp_path, "deep/second.yaml", "base: first.yaml\nfast: true\n")
    last = write(tmp_path, "last.yaml", "base: deep/second.yaml\ninner: {sizes: [9]}\n")
    assert configs.read_yaml(last) == {
        "name": "a",
        "fast": True,
        "inner": {"rate": 1.0, "sizes": [9]},
    }
    assert configs.load(Outer, last) == Outer(name="a", fast=True, inner=Inner(rate=1, sizes=(9,)))


def test_a_circle_of_bases_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        configs.read_yaml(path)


def test_a_base_that_two_files_share_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "name: a\n")
    for name in ("b.yaml", "c.yaml"):
        assert configs.read_yaml(write(tmp_path, name, "base: a.yaml\n")) == {"name": "a"}


@pytest.mark.parametrize(
    ("text", "says"),
    [("[1]", "holds list"), ("a: [", "not valid YAML"), ("", "holds NoneType"), (None, "cannot")],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml.*{says}"):
        configs.read_yaml(path)


def test_merge_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2], "e": {"f": 1}}
    merged = configs.merge(base, over)
    assert merged == {"a": {"b": 3, "c": 2}, "d": [2], "e": {"f": 1}}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]} and over["a"] == {"b": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b=1e-4", {"a": {"b": 1e-4}}),
        ("a=-2.5", {"a": -2.5}),
        ("a.b.c=true", {"a": {"b": {"c": True}}}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={b: 1, c: x}", {"a": {"b": 1, "c": "x"}}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a=some words", {"a": "some words"}),
        ("a=x=y", {"a": "x=y"}),
        ("a=s3://bucket/key", {"a": "s3://bucket/key"}),
    ],
)
def test_overrides_are_typed(text: str, expected: dict[str, Any]) -> None:
    found = configs.parse_override(text)
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize("text", ["a", "=1", " =1", "a={", "a=[1"])
def test_an_override_that_cannot_be_read_is_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        configs.parse_override(text)


def test_the_last_override_wins() -> None:
    path = Path(DEBUG)
    made = configs.load(RunConfig, path, ["optimizer.lr=1e-4", "optimizer.lr=2e-4"])
    assert made.optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"name": "a", "inner": {"rat": 1}}, r"^inner\.rat=1: unknown field; did you mean 'rate'"),
        ({"name": "a", "nam": "b"}, r"^nam='b': unknown field; did you mean 'name'"),
        ({"name": "a", "zzz": 1}, "^zzz=1: unknown field; known here: fast, inner, name"),
        ({"name": "a", "inner": {"rate": 0}}, r"^inner\.rate=0: .*greater than 0"),
        ({"name": "a", "inner": {"sizes": [1, "x"]}}, r"^inner\.sizes\.1='x': .*integer"),
        ({"name": "a", "inner": 3}, "^inner=3: "),
        ({}, "^name: required, but not given; .*--set name="),
    ],
)
def test_what_is_wrong_is_named_with_its_dotted_field_and_value(
    tree: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        configs.build(Outer, tree)


KINDS = "model.image_path.schedule"


def test_the_dotted_field_is_the_one_in_the_file() -> None:
    with pytest.raises(ConfigError, match=rf"^{KINDS}\.p_men=3: .*did you mean 'p_mean'"):
        configs.load(RunConfig, DEBUG, [f"{KINDS}.p_men=3"])
    with pytest.raises(ConfigError, match=r"^model\.autoencoder\.fctor=2: .* 'factor'"):
        configs.load(RunConfig, DEBUG, ["model.autoencoder.fctor=2"])


@pytest.mark.parametrize(
    "override", [f"{KINDS}.kind=scaled_linear", f"{KINDS}={{kind: scaled_linear}}"]
)
def test_another_kind_replaces_the_settings_of_the_base_kind(override: str) -> None:
    made = configs.load(RunConfig, DEBUG, ["model.image_path.predict=eps", override])
    assert made.model.image_path.schedule.kind == "scaled_linear"


def test_every_problem_is_told_at_once_below_where() -> None:
    with pytest.raises(ConfigError) as caught:
        configs.build(Outer, {"inner": {"rate": -1}, "fastt": 1}, where="objectives.x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("objectives.x.") for line in lines)


def test_a_node_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="a").name = "b"  # type: ignore[misc]


@pytest.mark.parametrize("field", ["objectives.align", "evaluators.zero_shot"])
def test_null_leaves_a_plug_in_of_the_base_out(field: str) -> None:
    group, name = field.split(".")
    kept, left = (
        configs.load(RunConfig, DEBUG, overrides) for overrides in ([], [f"{field}=null"])
    )
    assert name in getattr(kept, group) and name not in getattr(left, group)
    assert name not in left.resolved()[group]


def test_the_resolved_tree_is_complete_and_builds_the_same_config() -> None:
    made = configs.load(RunConfig, DEBUG)
    tree = made.resolved()
    assert tree["objectives"]["align"]["scale_max"] == 100.0  # a default of a plug-in's own file
    assert tree["engine"]["zero_stage"] == 3
    assert configs.build(RunConfig, tree).resolved() == tree


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_is_valid_and_has_a_plan(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = configs.load(RunConfig, path)
    if made.engine.offload_optimizer != "none":
        return  # the network of its base, which has been planned
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{made.training.samples:,} samples" in text and "micro-steps a step" in text


@pytest.mark.soak
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_has_a_forecast(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(path), "--nodes", "1", "--gpu", "h100", *_fit(path)]) == 0
    text = capsys.readouterr().out
    assert "images/s" in text and ("fits" in text or "tight" in text)


def _fit(path: Path) -> list[str]:
    """The small ones' batches do not divide by eight ranks."""
    micro = configs.load(RunConfig, path).engine.micro_batch
    return ["--set", f"training.global_batch={8 * micro}"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.image_size=30", "image_size=30"),
        ("model.image_size=32", "data.size=16 and model.image_size=32 differ"),
        ("engine.micro_batch=7", "engine.micro_batch=7 on 2 ranks"),
        ("objectives.generat.weight=1", "did you mean 'generate'"),
        ("objectives.align.wieght=1", "objectives.align.wieght=1: unknown field"),
        ("evaluators.zero_shott.steps=1", "did you mean 'zero_shot'"),
        ("evaluators.zero_shot.steps=0", "evaluators.zero_shot.steps=0"),
        ("data.tokens=99", "data.tokens=99"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("trainin.samples=3", "did you mean 'training'"),
        ("training.samples=many", "training.samples='many'"),
        ("engine.precision=fp8", "'fp32', 'bf16' or 'fp16'"),
        ("data.tokenizer=/nowhere.model", "tokenizer train"),
        ("no value", "--set 'no value'"),
    ],
)
def test_a_bad_override_ends_with_code_2_and_one_clear_message(
    override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", DEBUG, "--dry-run", "--ranks", "2", "--set", override]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and says in err
    assert "Traceback" not in err and out == ""


def test_a_missing_config_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "configs/none.yaml", "--dry-run"]) == 2
    assert "configs/none.yaml" in capsys.readouterr().err


def test_a_second_pass_through_a_recomputed_trunk_is_refused_under_zero() -> None:
    """DeepSpeed would reduce one parameter twice (tests/distributed/test_objectives.py)."""
    recomputing = ["engine.activation_checkpointing=true", "objectives.cdcd.weight=1"]
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true and objectives\.cdcd"):
        configs.load(RunConfig, DEBUG, recomputing)
    configs.load(RunConfig, DEBUG, [*recomputing, "objectives.cdcd.mechanism=step"])
    configs.load(RunConfig, DEBUG, [*recomputing, "engine.zero_stage=0"])
