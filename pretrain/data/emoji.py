"""The embedded corpus: free emoji drawings with their official names, as webdataset shards.

The drawings come from three npm packages of SVG icons, the names from a fourth; all are pinned by
version and SHA-256. The rebuild is byte-identical with the pinned resvg-py, pillow and zlib.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain import storage
from pretrain.data.captions import variants
from pretrain.errors import DataError

GROUPS = ("animals-nature", "food-drink", "activities", "travel-places", "objects")
HELD_OUT_CONCEPTS = 0.10  # share of base concepts that are in no training shard
HELD_OUT_RENDERINGS = 0.30  # share of base concepts of which one vendor's drawing is held out
TRAIN_SHARDS = 3


@dataclass(frozen=True)
class Package:
    """A pinned npm package."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """What ``npm pack`` calls it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Vendor:
    """A set of drawings: its prefix in keys, the style word of captions, attribution, and its
    package."""

    prefix: str
    style: str
    author: str
    source: str
    licence: str
    package: Package


@dataclass(frozen=True)
class Drawing:
    """One vendor's drawing of one Unicode concept; ``split`` is train, heldout-renderings or
    heldout-concepts."""

    vendor: Vendor
    hexcode: str
    base: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    svg: str
    split: str

    @property
    def key(self) -> str:
        """Unique name, as ``noto-1f34e``."""
        return f"{self.vendor.prefix}-{self.hexcode}"


NAMES = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
VENDORS = (
    Vendor(
        "noto",
        "Noto",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
    ),
    Vendor(
        "twemoji",
        "Twemoji",
        "Twitter and other contributors",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
    ),
    Vendor(
        "fluent-emoji-flat",
        "Fluent flat",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
    ),
)


def default_cache() -> Path:
    """Where downloaded packages are kept between builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "npm"


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in ``cache``, downloaded with ``npm pack`` unless it is there already.

    Raises:
        DataError: npm is missing or fails, or the bytes are not the pinned ones.
    """
    path = cache / package.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(
                command, cwd=cache, check=True, capture_output=True, text=True, timeout=300
            )
        except FileNotFoundError:
            raise DataError(
                "npm is not installed; install Node.js, or use the shards committed in data/emoji"
            ) from None
        except subprocess.SubprocessError as error:
            detail = (getattr(error, "stderr", "") or str(error)).strip()
            raise DataError(
                f"`{' '.join(command)}` failed: {detail}; check the network and run again"
            ) from None
    found = storage.sha256(str(path))
    if found != package.sha256:
        raise DataError(
            f"{path} has sha256 {found}, {package.sha256} is pinned; delete it and run again"
        )
    return path


def drawings(cache: Path) -> list[Drawing]:
    """Every drawing of the five groups, without skin tones, each with its split, in an order
    shuffled by hash."""
    names = fetch(NAMES, cache)
    meta = _member(names, "meta/groups.json")
    concepts = {
        _plain(c["hexcode"]): c
        for c in _member(names, "en/data.json")
        if meta["groups"].get(str(c.get("group"))) in GROUPS
    }
    svgs = {vendor: _svgs(fetch(vendor.package, cache), concepts) for vendor in VENDORS}
    by_concept: dict[str, list[Vendor]] = defaultdict(list)
    for vendor, of_vendor in svgs.items():
        for hexcode in of_vendor:
            by_concept[hexcode].append(vendor)
    found = []
    for hexcode, vendors in by_concept.items():
        concept = concepts[hexcode]
        for vendor in vendors:
            found.append(
                Drawing(
                    vendor=vendor,
                    hexcode=hexcode,
                    base=base_concept(hexcode),
                    name=_straight(concept["label"]),
                    keywords=tuple(_straight(tag) for tag in concept.get("tags", ())),
                    group=meta["groups"][str(concept["group"])],
                    subgroup=meta["subgroups"][str(concept["subgroup"])],
                    svg=svgs[vendor][hexcode],
                    split=_split(hexcode, vendor, vendors),
                )
            )
    return sorted(found, key=lambda d: _hash("order", d.key))


def base_concept(hexcode: str) -> str:
    """``hexcode`` (lower case, no FE0F) without skin tone and gender, so that variants share a
    split."""
    parts = hexcode.split("-")
    parts = [
        "1f9d1" if p in ("1f468", "1f469") else p for p in parts if not "1f3fb" <= p <= "1f3ff"
    ]
    return "-".join(p for p in parts if p not in ("2640", "2642")).removesuffix("-200d")


def render(svg: str, size: int) -> bytes:
    """A PNG of ``svg`` on white, ``size`` × ``size`` RGB pixels; the drawing is centred if it is
    not square."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    rgb = Image.new("RGB", (size, size), "white")  # no palette: quantising to one tints the white
    with Image.open(io.BytesIO(bytes(drawn))) as image:
        rgb.paste(image.convert("RGB"), ((size - image.width) // 2, (size - image.height) // 2))
    stream = io.BytesIO()
    rgb.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def sample(drawing: Drawing, size: int) -> dict[str, Any]:
    """The drawing as a webdataset sample: png, txt (one caption, chosen by a hash of the key) and
    json."""
    captions = variants(drawing.name, drawing.keywords, drawing.vendor.style)
    fields = {
        "name": drawing.name,
        "keywords": drawing.keywords,
        "group": drawing.group,
        "subgroup": drawing.subgroup,
        "vendor": drawing.vendor.prefix,
        "style": drawing.vendor.style,
        "hexcode": drawing.hexcode,
        "base": drawing.base,
        "licence": drawing.vendor.licence,
        "captions": captions,
    }
    return {
        "__key__": drawing.key,
        "png": render(drawing.svg, size),
        "txt": captions[int(_hash("caption", drawing.key) * len(captions))].encode(),
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
    found = drawings(cache)
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
    for v in VENDORS:
        lines += [f"{v.prefix}: (c) {v.author}, {v.source}", f"  licence: {v.licence}"]
        lines += [f"  by way of npm {v.package.name} {v.package.version}", ""]
    lines += [f"names, keywords and groups: npm {NAMES.name} {NAMES.version}", "  licence: MIT", ""]
    with tarfile.open(fetch(NAMES, cache)) as archive:
        text = archive.extractfile("package/LICENSE")
        assert text is not None
        lines.append(text.read().decode().strip())
    return "\n".join(lines) + "\n"


def _split(hexcode: str, vendor: Vendor, vendors: Sequence[Vendor]) -> str:
    base = base_concept(hexcode)
    if _hash("heldout-concept", base) < HELD_OUT_CONCEPTS:
        return "heldout-concepts"
    # "Another" 30% of all concepts, so of those that remain a larger share.
    share = HELD_OUT_RENDERINGS / (1 - HELD_OUT_CONCEPTS)
    if len(vendors) >= 2 and _hash("heldout-rendering", base) < share:
        chosen = vendors[int(_hash("heldout-vendor", base) * len(vendors))]
        return "heldout-renderings" if vendor is chosen else "train"
    return "train"


def _hash(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but ``purpose`` and ``key``."""
    digest = hashlib.blake2b(f"{purpose}\x1f{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _plain(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")  # what people type


def _member(archive: Path, name: str) -> Any:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(f"package/{name}")
        assert stream is not None
        return json.load(stream)


def _svgs(archive: Path, concepts: dict[str, Any]) -> dict[str, str]:
    """SVG text of each concept that an iconify package draws, by hexcode."""
    icons = _member(archive, "icons.json")
    found: dict[str, str] = {}
    for hexcode, name in sorted(_member(archive, "chars.json").items()):
        if _plain(hexcode) in concepts:
            found.setdefault(_plain(hexcode), _svg(icons, name))
    return found


def _svg(icons: dict[str, Any], name: str) -> str:
    """An icon's SVG document; an alias takes its parent's drawing, mirrored where it says so."""
    box = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)}
    flips = {"hFlip": False, "vFlip": False}
    chain = [name]
    while chain[-1] not in icons["icons"]:
        chain.append(icons["aliases"][chain[-1]]["parent"])
    for link in reversed(chain):
        fields = icons["icons"].get(link) or icons["aliases"][link]
        box |= {k: fields[k] for k in box if k in fields}
        flips = {k: flips[k] != bool(fields.get(k)) for k in flips}
    x, y, w, h = box["left"], box["top"], box["width"], box["height"]
    body = icons["icons"][chain[-1]]["body"]
    if flips["hFlip"]:
        body = f'<g transform="translate({2 * x + w} 0) scale(-1 1)">{body}</g>'
    if flips["vFlip"]:
        body = f'<g transform="translate(0 {2 * y + h}) scale(1 -1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">{body}</svg>'
    )
