"""Unicode concepts: official names, what icons call them, and which of them are variants of one.

They come from an emojibase archive (npm). Concepts are known by hexcode: lower case, without FE0F.
"""

import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.errors import DataError


class Names:
    """The Unicode concepts of an emojibase archive, by hexcode (lower case, no FE0F).

    Args:
        archive: the .tgz.
        groups: keep concepts of these groups only; None keeps all but skin tones, hair and regional
            indicators, which are parts of a drawing.
    """

    def __init__(self, archive: Path, groups: Sequence[str] | None = None) -> None:
        self.archive = archive
        meta, data = members(archive, "meta/groups.json", "en/data.json")
        self.groups: Mapping[str, str] = meta["groups"]
        self.subgroups: Mapping[str, str] = meta["subgroups"]
        kept = set(groups) if groups is not None else {*self.groups.values()} - {"component"}
        self.concepts: dict[str, dict[str, Any]] = {
            plain(c["hexcode"]): c for c in data if self.groups.get(str(c.get("group"))) in kept
        }

    def resolve(self, icon: str) -> str | None:
        """The concept that an icon's name means, by today's or an older official name or a common
        short code; None if none or several do."""
        # "flag-for-japan", "flag-for-flag-japan", "flag-for-crossed-flags"; "bird-2" is a second
        # drawing of a bird.
        for name in (
            icon,
            re.sub(r"^flag-for-(flag-)?", "flag-", icon),
            icon.removeprefix("flag-for-"),
            re.sub(r"-\d+$", "", icon),
        ):
            for level in self._meanings:
                if found := level.get(_squash(name)):
                    return found
        return None

    @cached_property
    def _meanings(self) -> list[dict[str, str]]:
        """Unambiguous names to hexcodes, the most official first."""
        old, *codes = members(
            self.archive,
            "meta/unicode-names.json",
            *(
                f"en/shortcodes/{book}.json"
                for book in ("cldr", "joypixels", "emojibase", "iamcal")
            ),
        )
        labels = [(c["label"], h) for h, c in self.concepts.items()]
        levels = [labels, [(label.split(" (")[0], h) for label, h in labels]]
        for book in (old, *codes):
            pairs = ((plain(h), names) for h, names in book.items())
            levels.append(
                [
                    (name, h)
                    for h, names in pairs
                    for name in ([names] if isinstance(names, str) else names)
                    if h in self.concepts
                ]
            )
        return [_unambiguous(level) for level in levels]


# A gendered or aged pair of one Unicode concept, and the neutral form they count as.
_NEUTRAL = {
    **dict.fromkeys(("1f468", "1f469"), "1f9d1"),  # man, woman: person
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),  # boy, girl: child
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # old man, old woman: older person
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # prince, princess: person with crown
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),  # pregnant
    "1f57a": "1f483",  # dancing
    **dict.fromkeys(("1f385", "1f936"), "1f9d1-200d-1f384"),  # Santa, Mrs. and Mx Claus
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-200d-1f91d-200d-1f9d1"),  # holding hands
    "1f48f": "1f9d1-200d-2764-200d-1f48b-200d-1f9d1",  # kiss
    "1f491": "1f9d1-200d-2764-200d-1f9d1",  # couple with heart
}
# Territories that fly another country's flag: one picture, so one concept.
_SAME_FLAG = {
    "1f1fa-1f1f2": "1f1fa-1f1f8",  # U.S. outlying islands: United States
    "1f1f8-1f1ef": "1f1f3-1f1f4",  # Svalbard and Jan Mayen: Norway
    "1f1e7-1f1fb": "1f1f3-1f1f4",  # Bouvet Island: Norway
    "1f1ed-1f1f2": "1f1e6-1f1fa",  # Heard and McDonald Islands: Australia
    "1f1e8-1f1f5": "1f1eb-1f1f7",  # Clipperton Island: France
    "1f1f2-1f1eb": "1f1eb-1f1f7",  # St. Martin: France
    "1f1e9-1f1ec": "1f1ee-1f1f4",  # Diego Garcia: British Indian Ocean Territory
}
_VARIANT = frozenset({"2640", "2642", "27a1"})  # female, male, facing right
_FAMILY = frozenset({"1f9d1", "1f9d2"})


def base_concept(hexcode: str) -> str:
    """``hexcode`` (lower case, no FE0F) without skin tone, gender and direction, so that variants
    share a split."""
    links: list[str] = []
    for link in _SAME_FLAG.get(hexcode, hexcode).split("-200d-"):
        parts = [_NEUTRAL.get(p, p) for p in link.split("-") if not "1f3fb" <= p <= "1f3ff"]
        if (parts and parts[0] not in _VARIANT) or not links:
            links.append("-".join(parts))
    if len(links) > 1 and _FAMILY.issuperset(links):
        return "1f46a"
    return "-200d-".join(links)


def plain(hexcode: str) -> str:
    """``hexcode`` in lower case and without FE0F, which means only "in colour"."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def straight(text: str) -> str:
    """``text`` with the quotation marks that people type."""
    return text.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')


def spoken(name: str) -> str:
    """An official name as words in a sentence: "flag: Japan" is a flag of Japan."""
    kind, colon, rest = name.partition(": ")
    if not colon:
        return name
    if kind == "flag":
        return f"flag of {rest}"
    if kind in ("man", "woman", "person"):
        return f"{kind} with {'a ' if rest == 'beard' else ''}{rest}"
    return f"{kind} {rest}" if kind == "keycap" else name


def members(archive: Path, *names: str) -> list[Any]:
    """JSON files of an npm archive, in one pass over it.

    Raises:
        DataError: one is missing.
    """
    found: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name in names and (stream := tar.extractfile(member)):
                found[name] = json.load(stream)
    if missing := [n for n in names if n not in found]:
        raise DataError(f"{archive} holds no {', '.join(missing)}; delete it and run again")
    return [found[n] for n in names]


def _squash(name: str) -> str:
    """Letters and digits alone: "blackDiamondSuit" is "BLACK DIAMOND SUIT"."""
    bare = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub(r"[^a-z0-9]+", "", bare)


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    meanings: dict[str, set[str]] = defaultdict(set)
    for name, hexcode in pairs:
        meanings[_squash(name)].add(hexcode)
    return {name: next(iter(h)) for name, h in meanings.items() if name and len(h) == 1}
