"""What a figure becomes: an element of the page that follows its colours, or a file that stands alone."""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from growmerge.report.colours import DATA, EDGE, GREY, GRID, INK, LABEL, SCHEME
from growmerge.report.tables import si

MARKERS = ("o", "s", "^", "D", "v", "P")
LETTERS = "●■▲◆▼✚"
"""The markers as characters."""
DASHES: dict[str, Any] = {
    "solid": "-",
    "dashed": (0, (5, 2)),
    "dotted": (0, (1, 1.5)),
    "dash-dotted": (0, (5, 1.5, 1, 1.5)),
    "long-dashed": (0, (10, 2)),
}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "growmerge",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": LABEL,
    "xtick.color": LABEL,
    "ytick.color": LABEL,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}
PX = 1 / 72
"""Inches: one unit of a figure is one CSS pixel of its SVG at full size."""
LETTER = 6.2
"""Width of a letter of a figure's text on average, at most (CSS pixels)."""
SHARP = 2
"""Pixels of a PNG for a unit of a figure, unless there would be too many."""
MOST_PIXELS = 12e6

COLOUR = re.compile("|".join(light for light, _ in SCHEME.values()))
VARIABLE = {light: f"var(--{name})" for name, (light, _) in SCHEME.items()}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    name: str
    """Of its files and of the ids inside: lower-case letters, digits and hyphens; no other drawing's."""
    label: str
    """What it shows, in words."""
    figure: Figure


def slug(text: str) -> str:
    """Return what is left of a text in the name of a file: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")


def style(i: int) -> dict[str, Any]:
    """Return the colour and marker of the i-th of what is compared: 36 pairs."""
    return {"color": DATA[i % 6], "marker": MARKERS[(i + i // 6) % 6], "markersize": 4.5}


def mark(i: int) -> tuple[str, str]:
    """Return the colour, as CSS, and the marker of the i-th, as a character."""
    return VARIABLE[DATA[i % 6]], LETTERS[(i + i // 6) % 6]


def panel(title: str, x: str, y: str, size: tuple[int, int], right: float = 14) -> tuple[Figure, Axes]:
    """Return a figure with one panel, numbers of its x axis in short; to be called and drawn on within STYLE.

    Args:
        size: width and height (CSS pixels).
        right: the margin there (CSS pixels). Margins are fixed: matplotlib's layout takes as long as the drawing.
    """
    width, height = size
    figure = Figure(figsize=(width * PX, height * PX))
    top = 10 + 15 * (title.count("\n") + 1)
    axes = figure.add_axes((50 / width, 40 / height, 1 - (50 + right) / width, 1 - (40 + top) / height))
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value).replace(".00", "") if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def beside_axes(axes: Axes, text: str, y: float) -> None:
    """Write what a level is, at the right edge of a panel."""
    axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), color=GREY, fontsize=9, va="center")


def svg(drawing: Drawing) -> bytes:
    """Return a drawing as an SVG file on white; the same drawing gives the same bytes."""
    out = io.StringIO()
    about = {"Title": drawing.label, "Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context(STYLE):
        drawing.figure.savefig(out, format="svg", metadata=about)
    return out.getvalue().encode()


def png(drawing: Drawing) -> bytes:
    """Return a drawing as a PNG file on white; the same drawing gives the same bytes."""
    out = io.BytesIO()
    width, height = drawing.figure.get_size_inches() / PX
    sharp = min(SHARP, math.sqrt(MOST_PIXELS / (width * height)))
    with rc_context(STYLE):
        drawing.figure.savefig(out, format="png", dpi=sharp / PX, metadata={"Software": None})
    return out.getvalue()


def element(drawing: Drawing) -> str:
    """Return a drawing as an element of the page: its own ids, a label, colours that are the page's variables."""
    text = svg(drawing).decode()
    head, body = text[text.index("<svg") :].split(">", 1)
    # Only ids, tags and styles are touched: between tags stands what somebody has named.
    body = re.sub(r"<title>.*?</title>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _on_page(tag[0], drawing.name), body)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box, head
    width, height = box[1].split()[2:]
    label = escape(drawing.label)
    return f'<svg viewBox="{box[1]}" width="{width}" height="{height}" role="img" aria-label="{label}">{body}'


def elements(drawings: Iterable[Drawing]) -> list[str]:
    return [element(drawing) for drawing in drawings]


def _on_page(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"<]*", r"font: \1 system-ui, sans-serif", tag)
    return COLOUR.sub(lambda found: VARIABLE[found[0]], tag)
