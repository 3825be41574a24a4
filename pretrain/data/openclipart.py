"""Clip art of Debian's openclipart packages: public domain, with the noisy titles of its authors.

Pictures are drawn from the SVGs; Debian's PNGs serve where an SVG fails or needs fonts.
"""

import hashlib
import os
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.drawings import download, execute, rasterize

VERSION = "1:0.18+dfsg-19"
SHA256 = {
    "openclipart-svg": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "openclipart-png": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
}
LICENCE = "CC-PDDC"  # SPDX: Creative Commons Public Domain Dedication and Certification
PUBLIC_DOMAIN = (
    "http://web.resource.org/cc/PublicDomain",
    "http://creativecommons.org/licenses/publicdomain/",
)
STYLE = "clip art"
MAX_PIXELS = 16 << 20  # of a PNG; larger ones (up to 623 megapixels) are refused by their header
SHARED_TITLE = 3  # a title on more drawings than this names their collection
# Theme icons are named for a program's actions, stars for their geometry: no words for a picture.
_UNNAMED = ("computer/icons/", "shapes/stars/")
_DULL_KEYWORD = re.compile(r"(?:hash(?:\(0x\w+\))?|unsorted)?", re.IGNORECASE)
_NEEDS_FONTS = re.compile(r"<(?:\w+:)?(?:text|flowRoot)\b")
_LINKED = re.compile(r"<(?:\w+:)?image\b[^>]*[\s:]href\s*=\s*[\"'](?!data:)")
_METADATA = re.compile(r"<metadata\b.*?</metadata>", re.DOTALL)
_REMEDY = "run `apt-get update` on a Debian of that version, or build without it: --no-openclipart"


class Unusable(Exception):
    """A picture that cannot be used; the message is the reason that counts it."""


@dataclass(frozen=True)
class Clip:
    """One drawing: its files, and what its author wrote of it."""

    key: str
    svg: Path
    png: Path
    title: str
    keywords: tuple[str, ...]
    author: str
    folder: str

    def fields(self) -> dict[str, Any]:
        """What a sample's .json holds; a clip is of no Unicode concept."""
        return {
            "name": self.title,
            "keywords": self.keywords,
            "group": "openclipart",
            "subgroup": self.folder,
            "vendor": "openclipart",
            "style": STYLE,
            "hexcode": "",
            "base": "",
            "licence": LICENCE,
            "captions": captions(self.title, self.keywords),
            "author": self.author,
        }

    def picture(self, size: int) -> Image.Image:
        """``size`` × ``size`` RGB: the drawing, without the empty rest of its page, on white.

        Raises:
            Unusable: neither file gives a picture.
        """
        try:
            text = self.svg.read_text("utf-8", "replace")
            if _NEEDS_FONTS.search(text):
                raise ValueError("it needs fonts")
            # Most drawings fill a part of a page: drawn larger, there is enough left to crop.
            drawn = rasterize(text, min(4 * size, max(1024, size)), None).convert("RGBA")
            return _fit(drawn, size)
        except (ValueError, Unusable):
            return _fit(self._png(), size)

    def _png(self) -> Image.Image:
        try:
            with Image.open(self.png) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Unusable("picture too large")
                return image.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise Unusable("unreadable picture") from None


def fetch(cache: Path) -> Path:
    """The unpacked packages' folder in ``cache``; nothing is installed.

    Raises:
        DataError: apt or dpkg is missing or fails, or the bytes are not the pinned ones.
    """
    folder = cache / f"openclipart-{VERSION.partition(':')[2]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unpacked = tempfile.mkdtemp(dir=cache, prefix=".unpack-")
    try:
        for name, sha256 in SHA256.items():
            path = cache / f"{name}_{VERSION.replace(':', '%3a')}_all.deb"
            download(["apt-get", "download", f"{name}={VERSION}"], path, sha256, _REMEDY)
            execute(["dpkg-deb", "-x", str(path), unpacked], cache, _REMEDY)
        with suppress(FileExistsError):  # another build was faster
            os.rename(unpacked, folder)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def clips(folder: Path, names_held_out: Collection[str]) -> tuple[list[Clip], Counter[str]]:
    """The usable drawings below ``folder``, in order of their paths, and why others are not.

    Args:
        folder: of `fetch`.
        names_held_out: lower-case names that no clip may have.
    """
    svgs, pngs = (folder / "usr/share/openclipart" / kind for kind in ("svg", "png"))
    skipped: Counter[str] = Counter()
    found: list[Clip] = []
    seen: set[str] = set()
    for path in sorted(svgs.rglob("*.svg")):
        name = path.relative_to(svgs).with_suffix("")
        if path.is_symlink():
            skipped["a link to another"] += 1
            continue
        about = _about(path)
        if about["licence"] not in PUBLIC_DOMAIN:
            skipped["not marked as public domain"] += 1
            continue
        content = _METADATA.sub("", path.read_text("utf-8", "replace"))
        if _LINKED.search(content):
            skipped["made of other files"] += 1
            continue
        digest = hashlib.sha256(content.encode()).hexdigest()
        if digest in seen:
            skipped["the same drawing again"] += 1
            continue
        seen.add(digest)
        slug = re.sub(r"[^a-z0-9]+", "-", name.name.lower()).strip("-")[:40]
        unique = hashlib.sha256(str(name).encode()).hexdigest()[:8]
        found.append(
            Clip(
                key=f"openclipart-{slug}-{unique}",
                svg=path,
                png=(pngs / name).with_suffix(".png"),
                title=about["title"],
                keywords=about["keywords"],
                author=about["author"],
                folder=str(name.parent),
            )
        )
    titled = _titled(found)
    skipped["no title of its own"] += len(found) - len(titled)
    kept = [c for c in titled if c.title.lower() not in names_held_out]
    skipped["named as a held-out concept"] += len(titled) - len(kept)
    return kept, skipped


def captions(title: str, keywords: tuple[str, ...]) -> list[str]:
    """Title; title and up to five keywords; a phrase. Titles are too odd to give them articles."""
    other = [word for word in keywords if word.lower() != title.lower()][:5]
    found = [title, f"{title}, {STYLE} style", f"{STYLE} of {title}"]
    return [*found[:2], f"{title}: {', '.join(other)}", found[2]] if other else found


def _titled(found: list[Clip]) -> list[Clip]:
    """Clips with a title of their own: the author's, or the words of the file's name."""
    shared = Counter(c.title.lower() for c in found)
    by_title: dict[str, list[Clip]] = defaultdict(list)
    for clip in found:
        title = clip.title
        collection = shared[title.lower()] > SHARED_TITLE or title.startswith("Clipart by ")
        if not title or collection:
            named = not f"{clip.folder}/".startswith(_UNNAMED)
            title = " ".join(re.sub(r"[\W\d_]+", " ", clip.svg.stem).split()) if named else ""
        if len(title) >= 3:
            by_title[title.lower()].append(replace(clip, title=title))
    kept = {c.key: c for same in by_title.values() if len(same) <= SHARED_TITLE for c in same}
    return [kept[c.key] for c in found if c.key in kept]


def _about(path: Path) -> dict[str, Any]:
    """Title, keywords, author and licence of an SVG's metadata; empty where there is none."""
    about: dict[str, Any] = {"title": "", "keywords": (), "author": "", "licence": ""}
    try:
        for _, element in ET.iterparse(path):
            if _tag(element) != "Work":
                continue
            for field in element:
                text = " ".join("".join(field.itertext()).split())
                match _tag(field):
                    case "title":
                        about["title"] = text
                    case "creator":
                        about["author"] = text
                    case "license":
                        about["licence"] = next(iter(field.attrib.values()), "")
                    case "subject":
                        about["keywords"] = _keywords(field)
            break
    except ET.ParseError:
        pass
    author = about["author"].lower()
    if "@" in about["title"] or about["title"].lower() == author:
        about["title"] = ""
    about["keywords"] = tuple(w for w in about["keywords"] if w.lower() != author)
    return about


def _keywords(subject: ET.Element) -> tuple[str, ...]:
    words = (" ".join((li.text or "").replace("_", " ").split()) for li in subject.iter())
    return tuple(dict.fromkeys(w for w in words if not _DULL_KEYWORD.fullmatch(w)))


def _fit(drawn: Image.Image, size: int) -> Image.Image:
    """An RGBA drawing cropped to what is drawn, scaled to ``size`` and centred on white."""
    box = drawn.getchannel("A").getbbox()
    if box is None:
        raise Unusable("blank picture")
    drawn = drawn.crop(box)
    scale = size / max(drawn.size)
    width, height = (max(1, round(side * scale)) for side in drawn.size)
    # Scaled with alpha multiplied in, or colours of transparent pixels would leak into the edges.
    drawn = drawn.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    rgb = Image.new("RGBA", (size, size), "white")
    rgb.alpha_composite(drawn.convert("RGBA"), ((size - width) // 2, (size - height) // 2))
    return rgb.convert("RGB")


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]
