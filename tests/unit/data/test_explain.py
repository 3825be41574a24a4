"""What `data explain` tells is what the loader gave: the same keys, captions and pixels."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pretrain import __main__ as cli
from pretrain.data import explain as explains
from pretrain.data.explain import Line, explain
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.source import Source
from pretrain.data.tokenizer import Tokenizer
from tests.unit.data.conftest import ROOT, good, index, png, write_tar
from tests.unit.data.test_inspect import ATTACK, assert_harmless

SEED, BATCH = 5, 8


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    """Two shards; samples 1 and 2 of the first cannot be used."""
    first = [*good("a"), ("b.png", b"x"), ("b.txt", b"b"), ("c.png", png()), *good("d")]
    second = [m for i in range(5) for m in good(f"e{i}", (i * 40, 9, 9))]
    urls = [write_tar(tmp_path / "0.tar", first), write_tar(tmp_path / "1.tar", second)]
    return index(tmp_path, urls)


def settings(url: object, tokenizer: str, **more: object) -> DataConfig:
    fields = {"size": 8, "tokens": 8, "workers": 0, "flip": 0.5, "jitter": 0.2, **more}
    return DataConfig(train=url, tokenizer=tokenizer, **fields)  # type: ignore[arg-type]


def told(config: DataConfig, start: int, world: int) -> list[Line]:
    source = Source(config, SEED)
    lines = explain(source, range(start, start + BATCH), BATCH, world)
    source.close()
    return lines


@pytest.mark.parametrize("world", [1, 2, 4])
def test_it_is_what_the_loader_yields(damaged: str, small_tokenizer: str, world: int) -> None:
    config = settings(damaged, small_tokenizer)
    for step in (0, 2):  # in the second an epoch ends
        lines = told(config, step * BATCH, world)
        assert [line.number for line in lines] == list(range(step * BATCH, (step + 1) * BATCH))
        for rank in range(world):
            loader = Loader(config, Tokenizer(small_tokenizer), SEED, BATCH, rank, world)
            (batch,) = itertools.islice(iter(loader), step, step + 1)
            mine = [line for line in lines if line.rank == rank]
            assert [line.number for line in mine] == batch.positions_B.tolist()
            assert tuple(line.key for line in mine) == batch.keys
            assert tuple(line.caption for line in mine) == batch.captions
            pictures = torch.stack([line.picture_CHW for line in mine])
            assert torch.equal(pictures, batch.images_BCHW)
            refused = [line.refused for line in mine if line.refused]
            assert refused == [f"{r.reason} ({r.key})" for r in batch.rejects]


def test_an_epoch_names_every_place_once_and_what_replaced_a_refused_one(
    damaged: str, small_tokenizer: str
) -> None:
    source = Source(settings(damaged, small_tokenizer), SEED)
    lines = explain(source, range(18), 9, 1)
    source.close()
    for epoch in range(2):
        mine = [line for line in lines if line.epoch == epoch]
        assert len(mine) == 9 == len({(line.shard, line.index) for line in mine})
    bad = [line for line in lines if line.refused]
    assert {(Path(line.shard).name, line.index) for line in bad} == {("0.tar", 1), ("0.tar", 2)}
    for line in bad:
        assert line.instead is not None and Path(line.instead[0]).name == "0.tar"
        assert line.key == {0: "a", 3: "d"}[line.instead[1]]
    assert all(line.instead is None for line in lines if not line.refused)
    text = explains.table(lines)
    assert text.count("in its place 0.tar index") == 4 and "no caption (c)" in text


def test_each_data_set_of_a_mixture_has_its_own_epochs(
    tmp_path: Path, small_tokenizer: str
) -> None:
    urls = []
    for name, count in (("small", 2), ("large", 6)):
        members = [m for i in range(count) for m in good(f"{name}{i}")]
        urls.append(index(tmp_path / name, [write_tar(tmp_path / name / "0.tar", members)]))
    mixed = [{"manifest": url, "weight": 1.0} for url in urls]
    source = Source(settings(mixed, small_tokenizer), SEED)
    lines = explain(source, range(12), 12, 1)
    source.close()
    small = [line for line in lines if line.key.startswith("small")]
    assert [line.epoch for line in small] == [0, 0, 1, 1, 2, 2]
    assert {line.epoch for line in lines if line.key.startswith("large")} == {0}
    header, first = explains.table(lines).splitlines()[:2]
    assert "shard" in header and ": 0.tar" in first, "the data set is named where there are several"


def line(**fields: object) -> Line:
    base = {
        **{"number": 3, "epoch": 0, "rank": 1, "dataset": "d", "shard": "s/0.tar", "index": 2},
        **{"key": "k", "caption": "c", "picture_CHW": torch.zeros(3, 8, 12, dtype=torch.uint8)},
    }
    return Line(**{**base, **fields})  # type: ignore[arg-type]


def test_strangers_text_harms_neither_page_nor_terminal() -> None:
    lines = [line(caption=ATTACK, key=ATTACK, refused=ATTACK, instead=(ATTACK, 1)), line()]
    page = assert_harmless(explains.html(lines, "Step 1"))
    assert len(page.all("img")) == 2
    text = explains.table(lines)
    assert "\x1b" not in text and "\x00" not in text and len(text.splitlines()) == 3
    assert max(len(row) for row in explains.table(lines, 60).splitlines()) == 60


def test_the_sheet_shows_the_pixels_whole() -> None:
    picture = torch.randint(0, 255, (3, 8, 12), dtype=torch.uint8)
    sheet = explains.sheet([line(picture_CHW=picture)] * 3, columns=2)
    times = -(-explains.TILE // 12)
    shown = sheet.crop((8, 8, 8 + 12 * times, 8 + 8 * times)).resize((12, 8), Image.Resampling.BOX)
    pixels = torch.tensor(list(shown.tobytes()), dtype=torch.uint8).reshape(8, 12, 3)
    assert torch.equal(pixels.permute(2, 0, 1), picture)
    empty = torch.empty((3, 0, 0), dtype=torch.uint8)  # encoded data holds no pixels
    assert explains.sheet([line(picture_CHW=empty)]).width > explains.TILE
    assert "latents" in explains.html([line(picture_CHW=empty)], "Step 1")


@pytest.fixture
def config(tmp_path: Path, damaged: str, small_tokenizer: str) -> str:
    """A whole configuration, as a run has it."""
    tree = {
        "base": str(ROOT / "configs" / "debug.yaml"),
        "data": {"train": damaged, "tokenizer": small_tokenizer},
        "training": {"global_batch": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "run.yaml")


def test_the_command_tells_and_draws_a_step(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = cli.main(["data", "explain", "--config", config, *arguments])
        found = capsys.readouterr()
        return code, found.out + found.err

    code, by_step = run("--step", "2", "--ranks", "2", "--out", str(tmp_path / "a.html"))
    assert code == 0
    assert [row.split()[0] for row in by_step.splitlines()[1:5]] == ["4", "5", "6", "7"]
    assert [row.split()[2] for row in by_step.splitlines()[1:5]] == ["0", "1", "0", "1"]
    assert_harmless((tmp_path / "a.html").read_text(encoding="utf-8"))
    code, by_number = run("--samples", "4:8", "--ranks", "2", "--out", str(tmp_path / "a.png"))
    assert code == 0 and by_number.splitlines()[:5] == by_step.splitlines()[:5]
    assert Image.open(tmp_path / "a.png").width > explains.TILE
    for wrong, said in (
        (("--step", "0"), "at least 1"),
        (("--samples", "8:4"), "A:B"),
        (("--samples", "x"), "A:B"),
        (("--step", "1", "--ranks", "3"), "not a multiple of 3 ranks"),
        (("--step", "1", "--out", "a.gif"), "must end in .png or .html"),
    ):
        code, text = run(*wrong)
        assert code == 2 and said in text, (wrong, text)
