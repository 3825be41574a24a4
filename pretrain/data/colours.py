"""The colour that a drawing on white shows most, in a word, measured from its pixels."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEAST_PAINTED = 0.08  # share of the picture that is not white
LEAST_SHARE = 0.5  # of what is painted, that a colour must have to name the drawing

# Hues in degrees where each name ends; from there on the next.
_HUES = (
    (15, "red"),
    (42, "orange"),
    (68, "yellow"),
    (165, "green"),
    (258, "blue"),
    (300, "purple"),
    (340, "pink"),
    (361, "red"),
)
_NAMES = ("", *dict.fromkeys(name for _, name in _HUES), "brown", "black")


def dominant(image: Image.Image) -> str | None:
    """The name of the colour that covers at least half of what is painted.

    Args:
        image: on white.

    Returns:
        A basic colour term: red, orange, yellow, green, blue, purple, pink, brown or black. None
        if no colour has half, if that is a grey or a beige, or if next to nothing is painted.
    """
    names = _by_pixel(image)
    painted = names[names != _WHITE]
    if painted.size < LEAST_PAINTED * names.size:
        return None
    counts = np.bincount(painted, minlength=len(_NAMES))
    most = int(counts.argmax())
    return _NAMES[most] or None if counts[most] >= LEAST_SHARE * painted.size else None


_WHITE = -1
_NAMELESS = 0


def _by_pixel(image: Image.Image) -> NDArray[np.int64]:
    """Per pixel its place in `_NAMES`; `_NAMELESS` for greys and beiges, `_WHITE` for white."""
    hsv = np.asarray(image.convert("RGB").convert("HSV"), dtype=np.float64).reshape(-1, 3) / 255
    hue, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    ends = [end for end, _ in _HUES]
    of_hue = np.array([_NAMES.index(name) for _, name in _HUES])
    names = of_hue[np.searchsorted(ends, hue, side="right")]
    warm = (hue < 45) | (hue >= 340)
    names[warm & (value < 0.65) & (saturation < 0.85)] = _NAMES.index("brown")
    light = warm & (value >= 0.85) & (saturation < 0.45)
    names[light & (hue >= 15)] = _NAMELESS
    names[light & ((hue < 15) | (hue >= 340))] = _NAMES.index("pink")
    grey = saturation < 0.2
    names[grey] = _NAMELESS
    names[(grey & (value < 0.25)) | (value < 0.2)] = _NAMES.index("black")
    # The dark blue-greys that some vendors draw black with.
    names[(saturation < 0.35) & (value < 0.35)] = _NAMES.index("black")
    names[grey & (value >= 0.85)] = _WHITE
    return names
