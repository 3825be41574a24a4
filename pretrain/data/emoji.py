"""The embedded corpus: free emoji drawings with their official names, as webdataset shards.

The drawings come from three npm packages of SVG icons, the names from a fourth; all are pinned by
version and SHA-256. The rebuild is byte-identical with the pinned resvg-py, pillow and zlib.
"""

import gzip
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data import drawings
from pretrain.data.concepts import Names, base_concept
from pretrain.data.drawings import NAMES, Drawing, Vendor, fetch, fraction

GROUPS = ("animals-nature", "food-drink", "activities", "travel-places", "objects")
VENDORS = tuple(drawings.VENDORS[v] for v in ("noto", "twemoji", "fluent-emoji-flat"))
HELD_OUT_RENDERINGS = 0.30  # share of base concepts of which one vendor's drawing is held out
TRAIN_SHARDS = 3


def default_cache() -> Path:
    """Where downloaded packages are kept between builds."""
    return drawings.cache_folder("npm")


def collect(cache: Path) -> list[Drawing]:
    """Every drawing of the five groups, without skin tones, each with its split, in an order
    shuffled by hash."""
    names = Names(fetch(NAMES, cache), GROUPS)
    svgs = {v: drawings.svgs(fetch(v.package, cache), names) for v in VENDORS}
    by_concept: dict[str, list[Vendor]] = defaultdict(list)
    for vendor, of_vendor in svgs.items():
        for hexcode in of_vendor:
            by_concept[hexcode].append(vendor)
    found = [
        drawings.drawing(names, v, hexcode, svgs[v][hexcode], _split(hexcode, v, vendors))
        for hexcode, vendors in by_concept.items()
        for v in vendors
    ]
    return sorted(found, key=lambda d: fraction("order", d.key))


def render(drawing: Drawing, size: int) -> bytes:
    """A PNG of ``size`` × ``size`` pixels."""
    stream = io.BytesIO()
    drawing.picture(size).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def sample(drawing: Drawing, size: int) -> dict[str, Any]:
    """The drawing as a webdataset sample: png, txt (one caption, chosen by a hash of the key) and
    json."""
    fields = drawing.fields()
    return {
        "__key__": drawing.key,
        "png": render(drawing, size),
        "txt": drawings.choose(drawing.key, fields["captions"]).encode(),
        "json": json.dumps(fields, ensure_ascii=False).encode(),
    }


def write_shard(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write ``samples`` as a .tar.gz whose bytes depend on nothing but them."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0) as packed,
        webdataset.TarWriter(packed, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for one in samples:
            writer.write(one)


def build(out: Path, cache: Path | None = None, size: int = 64) -> dict[str, list[Path]]:
    """Write the shards and NOTICE into ``out``; the shards of each split, in order."""
    cache = cache or default_cache()
    found = collect(cache)
    written: dict[str, list[Path]] = {}
    for split, shards in (
        ("train", TRAIN_SHARDS),
        ("heldout-renderings", 1),
        ("heldout-concepts", 1),
    ):
        chosen = [sample(d, size) for d in found if d.split == split]
        bounds = [len(chosen) * i // shards for i in range(shards + 1)]
        written[split] = [out / f"{split}-{i:05d}.tar.gz" for i in range(shards)]
        for path, start, end in zip(written[split], bounds, bounds[1:], strict=False):
            write_shard(path, chosen[start:end])
    (out / "NOTICE").write_text(notice(cache), encoding="utf-8")
    return written


def notice(cache: Path) -> str:
    """Attribution of every vendor and of the names."""
    lines = [
        "The pictures in these shards are drawings of the following authors, rendered to 64 x 64 "
        "pixels on",
        "white and otherwise unchanged. Each sample's .json names its vendor and licence.",
        "",
    ]
    return "\n".join(lines + drawings.attribution(VENDORS, fetch(NAMES, cache))) + "\n"


def _split(hexcode: str, vendor: Vendor, vendors: Sequence[Vendor]) -> str:
    base = base_concept(hexcode)
    if drawings.held_out(base):
        return "heldout-concepts"
    # "Another" 30% of all concepts, so of those that remain a larger share.
    share = HELD_OUT_RENDERINGS / (1 - drawings.HELD_OUT_CONCEPTS)
    if len(vendors) >= 2 and fraction("heldout-rendering", base) < share:
        chosen = vendors[int(fraction("heldout-vendor", base) * len(vendors))]
        return "heldout-renderings" if vendor is chosen else "train"
    return "train"
