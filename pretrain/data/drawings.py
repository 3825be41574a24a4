"""Free emoji drawings from npm packages: what the embedded and the study corpus share.

Packages are pinned by version and SHA-256. Each drawing gets its Unicode concept's official name
and keywords from emojibase; rendering is resvg's, so that it needs no system library. The Apple and
Facebook sets that other packages carry are not free, and never belong here.
"""

import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.captions import variants
from pretrain.data.concepts import Names, base_concept, members, plain, spoken, straight
from pretrain.errors import DataError

HELD_OUT_CONCEPTS = 0.10  # share of base concepts that are in no training shard


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
    """One vendor's drawing of one Unicode concept, and the split it belongs to."""

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

    def fields(self) -> dict[str, Any]:
        """What a sample's .json holds: the raw fields, and every caption made of them."""
        return {
            "name": self.name,
            "keywords": self.keywords,
            "group": self.group,
            "subgroup": self.subgroup,
            "vendor": self.vendor.prefix,
            "style": self.vendor.style,
            "hexcode": self.hexcode,
            "base": self.base,
            "licence": self.vendor.licence,
            "captions": variants(spoken(self.name), self.keywords, self.vendor.style),
        }

    def picture(self, size: int) -> Image.Image:
        """``size`` × ``size`` RGB on white; see `draw`."""
        return draw(self.svg, size)


NAMES = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)


_PINNED = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji": ("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "streamline-emojis": (
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
}


def _vendor(prefix: str, style: str, author: str, source: str, licence: str) -> Vendor:
    package = Package(f"@iconify-json/{prefix}", *_PINNED[prefix])
    return Vendor(prefix, style, author, f"https://github.com/{source}", licence, package)


_ALL = (
    _vendor("noto", "Noto", "Google Inc", "googlefonts/noto-emoji", "Apache-2.0"),
    _vendor("twemoji", "Twemoji", "Twitter and other contributors", "jdecked/twemoji", "CC-BY-4.0"),
    _vendor(
        "fluent-emoji-flat",
        "Fluent flat",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
        "MIT",
    ),
    _vendor("noto-v1", "Noto blob", "Google Inc", "googlefonts/noto-emoji", "Apache-2.0"),
    _vendor("openmoji", "OpenMoji", "OpenMoji", "hfg-gmuend/openmoji", "CC-BY-SA-4.0"),
    _vendor(
        "fluent-emoji", "Fluent color", "Microsoft Corporation", "microsoft/fluentui-emoji", "MIT"
    ),
    _vendor("fxemoji", "Firefox OS", "Mozilla", "mozilla/fxemoji", "Apache-2.0"),
    _vendor("emojione", "EmojiOne 2", "Emoji One", "EmojiTwo/emojitwo", "CC-BY-4.0"),
    _vendor("emojione-v1", "EmojiOne 1", "Emoji One", "joypixels/emojione-legacy", "CC-BY-SA-4.0"),
    _vendor(
        "streamline-emojis",
        "Streamline",
        "Streamline",
        "webalys-hq/streamline-vectors",
        "CC-BY-4.0",
    ),
)
VENDORS = {v.prefix: v for v in _ALL}


def cache_folder(*parts: str) -> Path:
    """Where downloads and built corpora are kept: ``$XDG_CACHE_HOME/diffdis-pretrain/...``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "diffdis-pretrain", *parts)


def download(command: Sequence[str], path: Path, sha256: str, remedy: str) -> Path:
    """``path``, made by ``command`` in its folder unless it is there already; whole or not at all.

    Raises:
        DataError: the program is not installed or fails (the message ends with ``remedy``), or the
            bytes are not the pinned ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            execute(command, folder, remedy)
            if not (made := Path(folder, path.name)).exists():
                raise DataError(f"`{' '.join(command)}` made no {path.name}; {remedy}")
            os.replace(made, path)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{path} has sha256 {found}, {sha256} is pinned; delete it and run again")
    return path


def execute(command: Sequence[str], folder: str | Path, remedy: str) -> None:
    """Run ``command`` in ``folder``, quietly.

    Raises:
        DataError: it is not installed or fails; the message ends with ``remedy``.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed; {remedy}") from None
    except (subprocess.SubprocessError, OSError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip()
        raise DataError(f"`{' '.join(command)}` failed: {detail}; {remedy}") from None


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in ``cache``, downloaded with ``npm pack`` unless it is there already.

    Raises:
        DataError: npm is missing or fails, or the bytes are not the pinned ones.
    """
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    remedy = "install Node.js and check the network (the shards of data/emoji need neither)"
    return download(command, cache / package.filename, package.sha256, remedy)


def drawing(names: Names, vendor: Vendor, hexcode: str, svg: str, split: str) -> Drawing:
    """``vendor``'s drawing of a concept, with all fields."""
    concept = names.concepts[hexcode]
    return Drawing(
        vendor=vendor,
        hexcode=hexcode,
        base=base_concept(hexcode),
        name=straight(concept["label"]),
        keywords=tuple(straight(tag) for tag in concept.get("tags", ())),
        group=names.groups[str(concept["group"])],
        subgroup=names.subgroups[str(concept["subgroup"])],
        svg=svg,
        split=split,
    )


def svgs(archive: Path, names: Names) -> dict[str, str]:
    """SVG text of each concept that an iconify package draws, by hexcode.

    A package says which concepts its icons are (chars.json), or leaves that to the icons' names.
    """
    icons, chars = members(archive, "icons.json", "chars.json")
    pairs: Iterable[tuple[str | None, str]] = sorted(chars.items())
    if not chars:
        every = [*icons["icons"], *icons.get("aliases", {})]
        pairs = ((names.resolve(icon), icon) for icon in every)
    found: dict[str, str] = {}
    for hexcode, icon in pairs:
        if hexcode and plain(hexcode) in names.concepts:
            found.setdefault(plain(hexcode), _svg(icons, icon))
    return found


def draw(svg: str, size: int) -> Image.Image:
    """``svg`` on white, ``size`` × ``size`` RGB pixels; the drawing is centred if it is not square.

    Raises:
        ValueError: it cannot be rendered.
    """
    rgb = Image.new("RGB", (size, size), "white")  # no palette: quantising to one tints the white
    image = rasterize(svg, size, "#ffffff").convert("RGB")
    rgb.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return rgb


def rasterize(svg: str, size: int, background: str | None) -> Image.Image:
    """``svg`` as it is, its longer side ``size`` pixels.

    Raises:
        ValueError: it cannot be rendered.
    """
    import resvg_py

    try:
        drawn = resvg_py.svg_to_bytes(
            svg_string=svg,
            width=size,
            height=size,
            background=background,
            skip_system_fonts=True,
            dpi=96,  # at its default, 0, a drawing measured in pt or mm has no size
        )
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # Rust's; it is no Exception
            raise ValueError(f"resvg panicked: {error}") from None
        raise
    image = Image.open(io.BytesIO(bytes(drawn)))
    image.load()
    return image


def fraction(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but ``purpose`` and ``key``."""
    digest = hashlib.blake2b(f"{purpose}\x1f{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def held_out(base: str) -> bool:
    """Whether a base concept is one of the 10% that no training shard shows."""
    return fraction("heldout-concept", base) < HELD_OUT_CONCEPTS


def choose(key: str, captions: Sequence[str]) -> str:
    """The caption of a sample's .txt, chosen by a hash of its key."""
    return captions[int(fraction("caption", key) * len(captions))]


def attribution(vendors: Sequence[Vendor], names: Path) -> list[str]:
    """Lines of a NOTICE: author, source, licence and version of each vendor, and of the names."""
    lines = []
    for v in vendors:
        lines += [f"{v.prefix}: (c) {v.author}, {v.source}", f"  licence: {v.licence}"]
        lines += [f"  by way of npm {v.package.name} {v.package.version}", ""]
    lines += [f"names, keywords and groups: npm {NAMES.name} {NAMES.version}", "  licence: MIT", ""]
    with tarfile.open(names) as archive:
        text = archive.extractfile("package/LICENSE")
        assert text is not None
        return [*lines, text.read().decode().strip()]


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
