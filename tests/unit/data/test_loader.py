"""Batches: the same samples in the same order for any ranks, workers, stops and damage."""

import itertools
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import config as configs
from pretrain.data.evalset import open_set
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.manifest import Manifest
from pretrain.data.setconfig import SetConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, DataError
from pretrain.types import Batch
from tests.unit.data.conftest import ROOT, Member, good, index, png, write_tar


@pytest.fixture
def make(corpus: Callable[..., str], small_tokenizer: str) -> Callable[..., Loader]:
    """``make(manifest, batch, rank, world, start, **data)``."""

    def loader(
        url: str, batch: int, rank: int = 0, world: int = 1, start: int = 0, **data: object
    ) -> Loader:
        settings_ = {"workers": 0, "size": 8, "tokens": 8, **data}
        config = configs.build(
            DataConfig, {"train": url, "tokenizer": small_tokenizer, **settings_}
        )
        return Loader(config, Tokenizer(small_tokenizer), 5, batch, rank, world, start)

    return loader


def take(loader: Loader, steps: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), steps))


def rows(batches: list[Batch]) -> list[tuple[int, str, str, float, int]]:
    """What identifies each sample as trained on: number, key, caption, pixels and tokens."""
    return [
        (
            int(n),
            key,
            caption,
            float(x.double().sum()),
            int((t * torch.arange(1, len(t) + 1)).sum()),
        )
        for b in batches
        for n, key, caption, x, t in zip(
            b.positions_B, b.keys, b.captions, b.images_BCHW, b.tokens_BL, strict=True
        )
    ]


def woven(step: Sequence[Batch]) -> list[tuple[int, str, str, float, int]]:
    """The rows of all ranks' batches of one step, in the order of their numbers."""
    return sorted(row for batch in step for row in rows([batch]))


def test_a_batch_keeps_its_contract(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    (batch,) = take(make(corpus([5, 4]), 4), 1)
    assert batch.images_BCHW.shape == (4, 3, 8, 8) and batch.images_BCHW.dtype == torch.uint8
    assert batch.pixels_BCHW.dtype == torch.float32
    assert float(batch.pixels_BCHW.abs().max()) <= 1
    assert batch.tokens_BL.shape == (4, 8) and batch.mask_BL.dtype == torch.bool
    assert batch.positions_B.tolist() == [0, 1, 2, 3]
    assert len(batch.keys) == len(batch.captions) == 4 and batch.rejects == ()


def test_an_epoch_is_each_sample_once_and_the_next_in_another_order(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    loader = make(corpus([5, 4, 7]), 4)
    assert loader.num_samples == 16
    keys = [key for batch in take(loader, 8) for key in batch.keys]
    assert Counter(keys[:16]) == Counter(keys[16:]) and len(set(keys)) == 16
    assert keys[:16] != keys[16:]


def test_a_batch_may_cross_the_end_of_an_epoch(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    url = corpus([3, 2])
    by_four = [r for r in rows(take(make(url, 4), 5))]
    by_five = [r for r in rows(take(make(url, 5), 4))]
    assert by_four == by_five


@given(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (6, 2)]), st.integers(0, 40))
@settings(max_examples=12, deadline=None)
def test_ranks_joined_are_the_single_rank(
    tmp_path_factory: pytest.TempPathFactory,
    small_tokenizer: str,
    shape: tuple[int, int],
    start: int,
) -> None:
    world, _ = shape
    folder = tmp_path_factory.mktemp("ranks")
    url = index(
        folder,
        [
            write_tar(folder / f"{s}.tar", [m for i in range(n) for m in good(f"s{s}-{i}")])
            for s, n in enumerate([5, 1, 7])
        ],
    )
    config = DataConfig(
        train=url,
        tokenizer=small_tokenizer,
        size=8,
        tokens=8,
        workers=0,
        flip=0.5,
    )
    tokenizer = Tokenizer(small_tokenizer)

    def of(rank: int, ranks: int) -> list[Batch]:
        return take(Loader(config, tokenizer, 5, 12, rank, ranks, start), 3)

    alone = rows(of(0, 1))
    per_rank = [of(rank, world) for rank in range(world)]
    assert [r for step in zip(*per_rank, strict=True) for r in woven(step)] == alone


def test_workers_change_nothing(corpus: Callable[..., str], make: Callable[..., Loader]) -> None:
    url = corpus([5, 4, 7])
    changes = {"flip": 0.5, "jitter": 0.2}
    expected = take(make(url, 4, **changes), 9)
    for workers in (1, 2):
        found = take(make(url, 4, workers=workers, **changes), 9)
        assert rows(found) == rows(expected)
        assert all(
            torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(found, expected, strict=True)
        )


def test_a_batch_stays_as_it_was_for_as_long_as_anybody_holds_a_part_of_it(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    url = corpus([5, 4, 7, 6])
    expected = [b.images_BCHW for b in take(make(url, 4), 60)]
    held: dict[int, list[torch.Tensor]] = {}
    for step, batch in enumerate(itertools.islice(iter(make(url, 4, workers=2)), 60)):
        assert torch.equal(batch.images_BCHW, expected[step])  # not torn, nor another's
        # Some are let go at once, some held whole or as micro-batches, some for long: slots run
        # out at times, and come back in another order than they went.
        if step % 3:
            parts = [p.images_BCHW for p in batch.split(2)]
            held[step] = [batch.images_BCHW] if step % 4 == 1 else parts[1:]
        del batch
        for old in [o for o in held if (o * 7 + step) % 11 == 0]:
            first = 2 * (len(held[old][0]) == 2)
            assert torch.equal(held.pop(old)[0], expected[old][first:])
    for old, (part, *_) in held.items():
        assert torch.equal(part, expected[old][2 * (len(part) == 2) :])


def test_a_stop_loses_and_repeats_nothing_though_workers_read_ahead(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    url = corpus([5, 4, 7])
    whole = rows(take(make(url, 4), 10))
    first = make(url, 4, workers=2)
    before = rows(take(first, 3))
    state = first.state_dict()
    assert state == {"next_sample": 12}
    # Go on with other ranks and another batch, as an elastic resume does.
    parts = [make(url, 2, rank=r, world=2) for r in range(2)]
    for part in parts:
        part.load_state_dict(state)
    after = [r for step in zip(*(take(p, 14) for p in parts), strict=True) for r in woven(step)]
    assert before + after == whole


def test_bad_samples_are_replaced_counted_once_and_never_used(
    tmp_path: Path, make: Callable[..., Loader]
) -> None:
    symlink = tarfile.TarInfo("link.png")
    symlink.type, symlink.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad: list[Member] = [
        ("half.png", png(size=(60, 60))[:60]),
        ("half.txt", b"half"),
        ("zero.png", b""),
        ("zero.txt", b"zero"),
        ("mute.png", png()),
    ]
    members = [m for i in range(6) for m in good(f"g{i}")]
    url = index(tmp_path, [write_tar(tmp_path / "0.tar", [*members, *bad, symlink])])
    loader = make(url, 3)
    assert loader.num_samples == 9
    batches = take(loader, 3)
    assert Counter((r.key, r.reason) for b in batches for r in b.rejects) == {
        ("half", "undecodable image"): 1,
        ("zero", "undecodable image"): 1,
        ("mute", "no caption"): 1,
        ("link.png", "link"): 1,
    }
    keys = [key for b in batches for key in b.keys]
    assert len(keys) == 9 and set(keys) == {f"g{i}" for i in range(6)}
    assert [r[:3] for r in rows(take(make(url, 3, workers=2), 3))] == [r[:3] for r in rows(batches)]
    halves = [take(make(url, 3, rank=r, world=3), 3) for r in range(3)]
    assert [r[1] for step in zip(*halves, strict=True) for r in woven(step)] == keys


def test_a_corpus_without_a_good_sample_is_an_error(
    tmp_path: Path, make: Callable[..., Loader]
) -> None:
    members: list[Member] = [m for i in range(3) for m in [(f"{i}.png", b""), (f"{i}.txt", b"x")]]
    url = index(tmp_path, [write_tar(tmp_path / "0.tar", members)])
    with pytest.raises(DataError, match=r"undecodable image: .*0\.tar:.*data verify"):
        take(make(url, 2), 1)


def test_an_error_in_a_worker_keeps_its_class_and_text(
    corpus: Callable[..., str], make: Callable[..., Loader], tmp_path: Path
) -> None:
    loader = make(corpus([3]), 2, workers=1)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(DataError, match=r"0\.tar.*does not exist") as caught:
        take(loader, 1)
    assert "Traceback" not in str(caught.value)


def test_a_process_ends_though_its_workers_ignore_signals(
    corpus: Callable[..., str], small_tokenizer: str
) -> None:
    """A rank that ends with its iterator alive, as after an error, must free its allocation."""
    script = f"""
from pretrain.data.loader import DataConfig, Loader
from pretrain.data.tokenizer import Tokenizer
config = DataConfig(train={corpus([5])!r}, tokenizer={small_tokenizer!r}, size=8, workers=1)
batches = iter(Loader(config, Tokenizer(config.tokenizer), 0, 2, 0, 1))
next(batches)
print("alive", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_batch_that_does_not_divide_is_found_before_any_file_is_opened(
    make: Callable[..., Loader],
) -> None:
    with pytest.raises(ConfigError, match="global_batch=5"):
        make("/nowhere/manifest.json", 5, world=2)


def test_a_wrong_setting_names_the_field(small_tokenizer: str) -> None:
    tree = {"train": "x", "tokenizer": small_tokenizer, "bucket_groop": 2}
    with pytest.raises(ConfigError, match="bucket_group"):
        configs.build(DataConfig, tree)


def test_an_evaluation_set_is_whole_or_an_error(
    tmp_path: Path, corpus: Callable[..., str], small_tokenizer: str
) -> None:
    config = DataConfig(train="", tokenizer=small_tokenizer, size=8)
    found = open_set("mine", SetConfig(manifest=corpus([3, 2])), config)
    assert found.images(range(5)).shape == (5, 3, 8, 8)
    assert found.keys == ("s0-0", "s0-1", "s0-2", "s1-0", "s1-1")
    assert [(found.classes[i],) for i in found.labels_N] == list(found.captions)
    nameless: list[Member] = [("a.png", png()), ("a.txt", b"a")]
    url = index(tmp_path / "n", [write_tar(tmp_path / "n/0.tar", nameless)])
    with pytest.raises(DataError, match="'a' has no class `name`"):
        open_set("nameless", SetConfig(manifest=url), config)
    assert Manifest.load(url).num_samples == 1


@pytest.mark.parametrize(("world", "workers"), [(2, 1), (4, 0)])
def test_ranks_and_workers_give_the_same_global_batches_to_the_bit(
    corpus: Callable[..., str], make: Callable[..., Loader], world: int, workers: int
) -> None:
    url, changes = corpus([5, 4, 7]), {"flip": 0.5, "jitter": 0.2}
    alone = take(make(url, 8, start=3, **changes), 4)
    ranks = [
        take(make(url, 8, rank, world, start=3, workers=workers, **changes), 4)
        for rank in range(world)
    ]
    for expected, *parts in zip(alone, *ranks, strict=True):
        # Rank r holds every world-th sample from the r-th on.
        for rank, part in enumerate(parts):
            assert part.keys == expected.keys[rank::world]
            assert part.captions == expected.captions[rank::world]
            for name in ("images_BCHW", "tokens_BL", "mask_BL", "positions_B"):
                assert torch.equal(getattr(part, name), getattr(expected, name)[rank::world]), name


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_each_refusal_is_counted_once_an_epoch_whoever_reads_its_shard(
    tmp_path: Path, make: Callable[..., Loader], world: int, workers: int
) -> None:
    symlink = tarfile.TarInfo("link.png")
    symlink.type, symlink.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [*good("g"), ("../up.png", png())]  # the one that all others are replaced by
    bad = [f"bad{i}" for i in range(5)]
    members += [m for key in bad for m in ((f"{key}.png", b""), (f"{key}.txt", b"x"))]
    url = index(tmp_path, [write_tar(tmp_path / "0.tar", [*members, symlink])])
    epochs, steps = 2, 4
    found: Counter[str] = Counter()
    for rank in range(world):
        batches = take(make(url, 3, rank, world, workers=workers), steps)
        found.update(r.key for b in batches for r in b.rejects)
    assert found == dict.fromkeys([*bad, "../up.png", "link.png"], epochs)


def test_a_loader_goes_on_in_mid_epoch_from_its_own_state(
    corpus: Callable[..., str], make: Callable[..., Loader]
) -> None:
    url = corpus([5, 4])
    whole = take(make(url, 3, workers=1), 6)
    first = make(url, 3, workers=1)
    take(first, 2)  # its worker has read further by now
    second = make(url, 3, workers=1)
    second.load_state_dict(first.state_dict())
    assert rows(take(second, 4)) == rows(whole[2:])
