"""Aspect buckets: every batch of one shape, every picture near its own, every epoch exact."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from pretrain import config as configs
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.manifest import ASPECTS
from pretrain.data.source import shape_of
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask
from pretrain.types import Batch
from tests.support import tiny
from tests.unit.data.conftest import ROOT, Member, index, png, write_tar

SHAPES = {"wide": (64, 32), "square": (40, 40), "tall": (30, 40)}  # width, height
SHARES = {"wide": 8, "square": 24, "tall": 16}
BATCH = 4


@pytest.fixture
def config(tmp_path: Path, small_tokenizer: str) -> DataConfig:
    """48 pictures of three shapes, mixed in three shards."""
    keys = [f"{kind}-{i}" for kind, n in SHARES.items() for i in range(n)]
    urls = []
    for s in range(3):
        members: list[Member] = []
        for key in keys[s::3]:
            members += [(f"{key}.png", png(size=SHAPES[key.split("-")[0]])), (f"{key}.txt", b"a")]
        urls.append(write_tar(tmp_path / f"{s}.tar", members))
    tree = {"train": index(tmp_path, urls), "tokenizer": small_tokenizer, "size": 16, "tokens": 8}
    return configs.build(
        DataConfig, {**tree, "workers": 0, "bucket_group": BATCH, "bucket_multiple": 4}
    )


def take(config: DataConfig, batch: int, steps: int, rank: int = 0, world: int = 1) -> list[Batch]:
    loader = Loader(config, Tokenizer(config.tokenizer), 5, batch, rank, world)
    return list(itertools.islice(iter(loader), steps))


def test_a_batch_has_one_shape_and_its_pictures_that_aspect(config: DataConfig) -> None:
    expected = {"wide": (8, 20), "square": (16, 16), "tall": (16, 12)}
    for batch in take(config, BATCH, 24):
        (kind,) = {key.split("-")[0] for key in batch.keys}
        assert tuple(batch.images_BCHW.shape[2:]) == expected[kind]


def test_every_bucket_visits_each_of_its_pictures_once_an_epoch(config: DataConfig) -> None:
    keys = [key for batch in take(config, BATCH, 3 * 48 // BATCH) for key in batch.keys]
    for kind, share in SHARES.items():
        own = [key for key in keys if key.startswith(kind)]
        assert len(own) == 3 * share  # each has its share of the groups
        for epoch in range(3):
            assert Counter(own[epoch * share : (epoch + 1) * share]) == Counter(
                f"{kind}-{i}" for i in range(share)
            )


def test_smaller_batches_and_ranks_see_the_same_samples(config: DataConfig) -> None:
    whole = [key for batch in take(config, 4, 12) for key in batch.keys]
    assert [key for batch in take(config, 2, 24) for key in batch.keys] == whole
    ranks = [take(config, 4, 12, rank, 2) for rank in range(2)]
    woven = [
        k
        for a, b in zip(*ranks, strict=True)
        for pair in zip(a.keys, b.keys, strict=True)
        for k in pair
    ]
    assert woven == whole


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_shapes_keep_to_the_area_and_near_the_aspect(size: int) -> None:
    for number, aspect in enumerate(ASPECTS):
        height, width = shape_of(number, size, 8)
        assert height % 8 == width % 8 == 0 and height * width <= size * size
        if size >= 256:
            assert abs(width / height / aspect - 1) < 0.1 and height * width > 0.85 * size * size


def test_a_group_that_the_batch_does_not_divide_is_named(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.bucket_group=4.*global_batch=3"):
        take(config, 3, 1)
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    for changes, says in (
        ({"bucket_group": 16, "bucket_multiple": 2}, r"data\.bucket_multiple=2.*set it to 4"),
        ({"bucket_group": 24, "bucket_multiple": 4}, r"data\.bucket_group=24.*try 16"),
    ):
        with pytest.raises(ConfigError, match=says):
            configs.build(RunConfig, configs.merge(tree, {"data": changes}))


def test_the_model_takes_every_shape() -> None:
    """Both halves, forward and backward, in shapes other than the one it was built for."""
    task: PretrainTask = tiny.task({"generate": {}, "align": {}})
    plain = tiny.batch(4)
    for aspect in range(len(ASPECTS)):
        height, width = shape_of(aspect, tiny.SIZE, 4)
        images = torch.randint(0, 255, (4, 3, height, width), dtype=torch.uint8)
        batch = Batch(images, plain.tokens_BL, plain.mask_BL, plain.positions_B)
        loss = task(batch).loss
        loss.backward()
        assert bool(loss.isfinite())
