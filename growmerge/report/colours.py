"""The report's colours on light and dark paper, and those of heat maps."""

from functools import cache

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

SCHEME = {
    "page": ("#ffffff", "#11151c"),
    "ink": ("#111827", "#e6e9ef"),
    "label": ("#374151", "#c3cad5"),
    "soft": ("#4b5563", "#a8b0bd"),
    "grey": ("#6b7280", "#98a2b1"),
    "edge": ("#9ca3af", "#667080"),
    "arrow": ("#b6bdc8", "#566070"),
    "line": ("#e2e6ec", "#2a313c"),
    "grid": ("#eceff3", "#232a34"),
    "faint": ("#f6f7f9", "#1a202a"),
    "focus": ("#0b5d8f", "#6cc0f5"),
    "yes": ("#0b5d8e", "#1577b3"),
    "no": ("#7a3300", "#ffb27a"),
    "no-page": ("#fdeee3", "#3a2413"),
    "data-1": ("#0072b2", "#2b8fd0"),
    "data-2": ("#d55e00", "#d55e00"),
    "data-3": ("#009e73", "#009e73"),
    "data-4": ("#cc79a7", "#cc79a7"),
    "data-5": ("#b87f00", "#e69f00"),
    "data-6": ("#3d95cc", "#56b4e9"),
}
"""The page's CSS variables: on light and on dark paper. Light colours all differ: a figure's are known by them.

The data's are Okabe and Ito's (jfly.uni-koeln.de/color) but for orange and sky blue on white and blue on black: there
these have a contrast below 3, which is what WCAG 2.2 (1.4.11) asks of lines and marks.
"""

DATA = tuple(light for name, (light, _) in SCHEME.items() if name.startswith("data-"))
"""Of runs, in the order of the study's setups."""
INK, LABEL, GREY, EDGE, ARROW, GRID, PAGE = (
    SCHEME[name][0] for name in ("ink", "label", "grey", "edge", "arrow", "grid", "page")
)
LEVELS = 32
"""Steps of a heat map, 0 the worst."""


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, 0 to 1 (WCAG 2.2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours, 1 to 21 (WCAG 2.2)."""
    dark, bright = sorted((luminance(a), luminance(b)))
    return (bright + 0.05) / (dark + 0.05)


@cache
def heat() -> tuple[tuple[str, str], ...]:
    """Return each level's colour, dark blue to yellow (cividis), and that of what is written on it."""
    found = [to_hex(colormaps["cividis"](level / (LEVELS - 1))) for level in range(LEVELS)]
    return tuple((colour, max(("#ffffff", "#000000"), key=lambda ink: contrast(ink, colour))) for colour in found)
