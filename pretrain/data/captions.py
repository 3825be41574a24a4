"""English captions from the real fields of a drawing: its name, keywords and vendor's style."""

import re
from collections.abc import Sequence

# Words whose first letter misleads: the sound decides between "a" and "an".
_SPELT_WITH_VOWEL_SOUNDED_WITHOUT = ("euro", "ewe", "one", "uni", "uk", "use")
_SPELT_WITHOUT_VOWEL_SOUNDED_WITH = ("hour", "herb", "heir", "honest", "x-ray")

# Names that take no article: masses, activities, adjectives, proper names, plurals without an s.
_BARE = frozenset(
    {
        "arts",
        "bacon",
        "badminton",
        "bowling",
        "bread",
        "butter",
        "camping",
        "construction",
        "cooking",
        "coral",
        "cream",
        "dna",
        "falafel",
        "fire",
        "flatbread",
        "fog",
        "foggy",
        "food",
        "garlic",
        "hockey",
        "ice",
        "lacrosse",
        "liquid",
        "locked",
        "luggage",
        "mate",
        "meat",
        "men",
        "money",
        "oden",
        "people",
        "pong",
        "popcorn",
        "rail",
        "rice",
        "root",
        "sake",
        "salt",
        "soap",
        "spaghetti",
        "sushi",
        "tea",
        "tennis",
        "thread",
        "unlocked",
        "voltage",
        "women",
        "wood",
        "yarn",
    }
)
_PROPER = ("mount fuji", "statue of liberty", "tokyo tower", "milky way")
_HEAD_ENDS = re.compile(
    r" (?:with|without|of|in|on|at|over|behind|and|showing|facing|tilted|done|not|fluttering)\b"
)
_SINGULAR_IN_S = ("ss", "us", "ros")


def article(phrase: str) -> str:
    """``a`` or ``an``, by the sound that begins ``phrase``."""
    start = phrase.lower()
    if start.startswith(_SPELT_WITHOUT_VOWEL_SOUNDED_WITH):
        return "an"
    if start.startswith(_SPELT_WITH_VOWEL_SOUNDED_WITHOUT) and not start.startswith("onion"):
        return "a"
    return "an" if start[:1] in "aeiou8" else "a"


def with_article(name: str) -> str:
    """``name`` with the indefinite article it takes; plurals, masses, times and proper names take
    none."""
    lower = name.lower()
    if lower.startswith(_PROPER) or "o'clock" in lower or lower.endswith("-thirty"):
        return name
    head = _HEAD_ENDS.split(lower, maxsplit=1)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(_SINGULAR_IN_S) and "'" not in head
    if plural or head in _BARE:
        return name
    return f"{article(name)} {name}"


def variants(name: str, keywords: Sequence[str], style: str) -> list[str]:
    """The distinct captions of a drawing: name; name and style; name and up to 5 keywords; a
    sentence."""
    other = [word for word in keywords if word != name][:5]
    captions = [name, f"{name}, {style} style"]
    if other:
        captions.append(f"{name}: {', '.join(other)}")
    captions.append(f"{article(style)} {style} drawing of {with_article(name)}")
    return captions
