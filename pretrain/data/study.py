"""The study corpus: ten vendors' emoji and clip art, in shards, built into a cache by one command.

Held out are a whole vendor (a style that training never shows) and 10% of the base concepts. The
same recipe gives the same shards to the byte; a build that was killed goes on where it was.
"""

import fcntl
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pretrain.data import drawings, openclipart, resumable
from pretrain.data.concepts import Names, base_concept, spoken, straight
from pretrain.data.drawings import NAMES, VENDORS, fraction
from pretrain.data.openclipart import Unusable
from pretrain.data.resumable import Made, Shard
from pretrain.errors import ConfigError, DataError

SPLITS = ("train", "heldout-vendor", "heldout-concepts")
HELD_OUT_VENDOR = "streamline-emojis"
FORMATS = ("png", "jpg", "webp")
REVISION = 1  # of this file's rules: a corpus of other rules is not gone on with
REPORT = "study.json"
Report = Callable[[int, int, str], None]  # drawings done, drawings in all, the split


class Source(Protocol):
    """What a sample is made of: an emoji or a clip."""

    @property
    def key(self) -> str: ...

    def fields(self) -> dict[str, Any]: ...

    def picture(self, size: int) -> Image.Image: ...


@dataclass(frozen=True)
class Recipe:
    """What is built.

    Attributes:
        vendors: prefixes of `VENDORS`.
        openclipart: whether training gets the clip art as well.
        sizes: side of the pictures in pixels, smallest and largest; each picture's own is drawn by
            a hash of its key.
        format: png and webp (quality 90), or jpg (quality 90).
        shard_mib: bound of a shard.
        limit: at most so many drawings of each vendor, for a trial; None for all.
    """

    vendors: tuple[str, ...] = tuple(VENDORS)
    openclipart: bool = True
    sizes: tuple[int, int] = (128, 128)
    format: str = "png"
    shard_mib: int = 8
    limit: int | None = None

    def __post_init__(self) -> None:
        for vendor in self.vendors:
            if vendor not in VENDORS:
                raise ConfigError(
                    f"vendors={vendor!r} is unknown (there are: {', '.join(VENDORS)})"
                )
        if not self.vendors and not self.openclipart:
            raise ConfigError("vendors= is empty and openclipart is left out; name one vendor")
        if not 8 <= self.sizes[0] <= self.sizes[1] <= 2048:
            raise ConfigError(f"sizes={self.sizes} must be LOW:HIGH with 8 <= LOW <= HIGH <= 2048")
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r} must be one of {', '.join(FORMATS)}")
        if self.shard_mib < 1:
            raise ConfigError(f"shard_mib={self.shard_mib} must be 1 or more")

    def describe(self) -> dict[str, Any]:
        """All that decides the shards' bytes, as JSON."""
        vendors = {v: VENDORS[v].package.version for v in self.vendors}
        programs = {p: metadata.version(p) for p in ("resvg-py", "pillow")}
        return {
            **asdict(self),
            "sizes": list(self.sizes),
            "vendors": vendors,
            "openclipart": self.openclipart and openclipart.VERSION,
            "names": NAMES.version,
            "programs": programs,
            "revision": REVISION,
        }


def default_out() -> Path:
    """Where the corpus goes unless another folder is named."""
    return drawings.cache_folder("study")


def build(
    out: Path,
    recipe: Recipe,
    parallel: int = 1,
    report: Report = lambda done, total, split: None,
) -> dict[str, Any]:
    """Write shards, a manifest of each split, NOTICE and the report into ``out``; what is there
    already is kept.

    Returns:
        The report: counts of samples by split and vendor, and of what was skipped by reason.

    Raises:
        DataError: a download fails, ``out`` holds a corpus of another recipe, or another build is
            at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        before = _begin(out, recipe)
        if before["complete"]:
            return before
        began = time.monotonic()
        sources, skipped = plan(recipe)
        total = sum(map(len, sources.values()))
        resumable.write_text(out / "NOTICE", notice(recipe))
        shards: dict[str, list[Shard]] = {}
        counted = 0
        for split in SPLITS:
            tick = partial(_tick, report, counted, total, split)
            make = partial(make_samples, recipe=recipe)
            shards[split] = resumable.write(
                out, split, sources[split], make, recipe.shard_mib << 20, parallel, tick
            )
            counted += len(sources[split])
        _index(out, shards, parallel)
        after = before | _summary(shards, skipped)
        after |= {"complete": True, "seconds": before["seconds"] + time.monotonic() - began}
        resumable.write_json(out / REPORT, after)
        return after


def plan(recipe: Recipe) -> tuple[dict[str, list[Source]], Counter[str]]:
    """Every source of every split, shuffled by hash, and why others were left out; downloads what
    is not in the cache yet."""
    npm = drawings.cache_folder("npm")
    names = Names(drawings.fetch(NAMES, npm))
    sources: dict[str, list[Source]] = {split: [] for split in SPLITS}
    skipped: Counter[str] = Counter()
    for prefix in recipe.vendors:
        vendor = VENDORS[prefix]
        svgs = drawings.svgs(drawings.fetch(vendor.package, npm), names)
        found = [
            drawings.drawing(names, vendor, h, svg, split_of(prefix, base_concept(h)))
            for h, svg in svgs.items()
        ]
        found.sort(key=lambda d: fraction("order", d.key))
        # Several flags are one picture: what is held out must not be trained on by another name.
        held = {d.svg for d in found if d.split != "train"}
        for one in found[: recipe.limit]:
            if one.split == "train" and one.svg in held:
                skipped["the drawing of a held-out concept"] += 1
            else:
                sources[one.split].append(one)
    if recipe.openclipart:
        folder = openclipart.fetch(drawings.cache_folder("debian"))
        clips, left_out = openclipart.clips(folder, _names_held_out(names))
        clips.sort(key=lambda clip: fraction("order", clip.key))
        sources["train"] += clips[: recipe.limit]
        skipped.update({f"openclipart: {reason}": n for reason, n in left_out.items()})
    for members in sources.values():
        members.sort(key=lambda source: fraction("order", source.key))
    return sources, skipped


def split_of(vendor: str, base: str) -> str:
    """Held-out concepts are held out of every vendor; what else the held-out vendor draws is known
    things in an unknown style."""
    if drawings.held_out(base):
        return "heldout-concepts"
    return "heldout-vendor" if vendor == HELD_OUT_VENDOR else "train"


def make_samples(sources: Sequence[Source], recipe: Recipe) -> list[Made]:
    """The sample of each source, in order, or the reason why there is none."""
    return [make_sample(source, recipe) for source in sources]


def make_sample(source: Source, recipe: Recipe) -> Made:
    """A picture, txt (one caption, chosen by a hash of the key) and json."""
    low, high = recipe.sizes
    size = low + int(fraction("size", source.key) * (high - low + 1))
    fields = source.fields()
    try:
        image = source.picture(size)
    except Unusable as reason:
        return Made(source.key, fields["vendor"], reason=str(reason))
    except (ValueError, OSError):
        return Made(source.key, fields["vendor"], reason="unreadable picture")
    if image.getcolors(1) is not None:
        return Made(source.key, fields["vendor"], reason="blank picture")
    stream = io.BytesIO()
    quality = {} if recipe.format == "png" else {"quality": 90}
    image.save(stream, {"jpg": "JPEG"}.get(recipe.format, recipe.format), **quality)
    files = {
        recipe.format: stream.getvalue(),
        "txt": drawings.choose(source.key, fields["captions"]).encode(),
        "json": json.dumps(fields, ensure_ascii=False).encode(),
    }
    return Made(source.key, fields["vendor"], files)


def notice(recipe: Recipe) -> str:
    """Attribution of every vendor, of the clip art and of the names."""
    low, high = recipe.sizes
    pixels = f"{low} x {low}" if low == high else f"{low} x {low} to {high} x {high}"
    vendors = [VENDORS[v] for v in recipe.vendors]
    alike = [v.prefix for v in vendors if "-SA-" in v.licence]
    lines = [
        "The pictures in these shards are drawings of the following authors, rendered to",
        f"{pixels} pixels on white and otherwise unchanged. The .json of each sample names its",
        "vendor and licence; the licences are at https://spdx.org/licenses/.",
        "",
    ]
    if alike:
        lines += [
            f"Share-alike: {', '.join(alike)}. Whoever passes on these drawings, or pictures",
            "adapted from them, does so under the same licence. To do without, build without",
            "these vendors (--vendors).",
            "",
        ]
    if recipe.openclipart:
        lines += [
            "openclipart: the authors named in each sample's .json, https://openclipart.org",
            f"  licence: {openclipart.LICENCE} (public domain, as each drawing's metadata says)",
            f"  by way of Debian openclipart-svg and openclipart-png {openclipart.VERSION};",
            "  cropped to what is drawn",
            "",
        ]
    names = drawings.fetch(NAMES, drawings.cache_folder("npm"))
    return "\n".join(lines + drawings.attribution(vendors, names)) + "\n"


def _names_held_out(names: Names) -> set[str]:
    """Lower-case names of the held-out concepts, as a clip might be titled."""
    found = set()
    for hexcode, concept in names.concepts.items():
        if drawings.held_out(base_concept(hexcode)):
            name = straight(concept["label"]).lower()
            found |= {name, spoken(name), name.split(" (")[0], name.removeprefix("flag: ")}
    return found


def _begin(out: Path, recipe: Recipe) -> dict[str, Any]:
    """The report of an earlier build of the same recipe, or a new one."""
    path, described = out / REPORT, recipe.describe()
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        differ = [k for k, v in described.items() if before["recipe"].get(k) != v]
        if differ:
            one = differ[0]
            raise DataError(
                f"out={str(out)!r} holds a study corpus of another recipe ({one}: "
                f"{before['recipe'].get(one)!r}, now {described[one]!r}); name another folder with "
                "--out, or delete this one"
            )
        if before["complete"] and _whole(out, before):
            return before
        return before | {"complete": False}
    fresh = {"recipe": described, "complete": False, "seconds": 0.0}
    resumable.write_json(path, fresh)
    return fresh


def _whole(out: Path, report: Mapping[str, Any]) -> bool:
    """Whether every shard and manifest of a report is still there."""
    for split, of_split in report["splits"].items():
        shards = [(out / name, size) for name, size in of_split["shards"].items()]
        if not all(p.exists() and p.stat().st_size == size for p, size in shards):
            return False
        if shards and not (out / f"{split}.json").exists():
            return False
    return True


def _index(out: Path, shards: Mapping[str, Sequence[Shard]], parallel: int) -> None:
    from pretrain.data import index

    for split, of_split in shards.items():
        urls = [
            str(resumable.paths(out, split, n)[0])
            for n, shard in enumerate(of_split)
            if shard.samples
        ]
        if urls:
            index.build(urls, str(out / f"{split}.json"), parallel=parallel, versions=False)


def _summary(
    shards: Mapping[str, Sequence[Shard]], skipped: Counter[str]
) -> dict[str, dict[str, Any]]:
    splits = {}
    keys: dict[str, list[str]] = {}
    for split, of_split in shards.items():
        samples: Counter[str] = Counter()
        for shard in of_split:
            samples.update(shard.samples)
            for reason, found in shard.skipped.items():
                keys.setdefault(reason, []).extend(found)
        sizes = {f"{split}-{n:05d}.tar": s.bytes for n, s in enumerate(of_split)}
        splits[split] = {"samples": dict(sorted(samples.items())), "shards": sizes}
    counts = skipped + Counter({reason: len(found) for reason, found in keys.items()})
    return {"splits": splits, "skipped": dict(counts.most_common()), "skipped_keys": keys}


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold ``out`` against other builds; the kernel lets go when the process ends."""
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"out={str(out)!r}: another build is at work there; wait for it"
            ) from None
        yield


def _tick(report: Report, before: int, total: int, split: str, done: int) -> None:
    report(before + done, total, split)
