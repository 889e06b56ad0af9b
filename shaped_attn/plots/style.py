"""How every figure looks: colours, panels, legends and axes; and how one is written to a file."""

from __future__ import annotations

import html
import io
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from ..checks import check_kind, fail
from ..destination import when_whole

SUFFIXES = (".pdf", ".png", ".svg")
"""The formats that `save` writes, by the end of the file's name."""

INK, SOFT, EDGE, GRID, MISSING = "#222222", "#5b6875", "#9aa5b0", "#e6eaee", "#eceff2"
# In a page of HTML: how opaque each is in the colour of the page's text.
_OPACITIES = {INK: 1.0, SOFT: 0.75, EDGE: 0.45, GRID: 0.13, MISSING: 0.08}
# Okabe and Ito's colours, which readers with any colour vision tell apart; without their yellow,
# which is too faint on white. Each comes with a marker and a dash pattern of its own.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.2)), (0, (9, 3)))

_REFERENCE = re.compile(r'(?:url\(|href=")#([^")]+)')  # of one element of an SVG to another

POINTS: dict[str, Any] = {
    "markersize": 5.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.7,
    "elinewidth": 1.2,
}
DOTTED: dict[str, Any] = {"linestyle": (0, (1, 1.6)), "linewidth": 1.2}


def color(index: int) -> str:
    """Return the colour of a series."""
    return _COLORS[index % len(_COLORS)]


def marker(index: int) -> str:
    """Return the marker of a series."""
    return _MARKERS[index % len(_MARKERS)]


def dashes(index: int) -> Any:
    """Return the line style of a series."""
    return _DASHES[index % len(_DASHES)]


def figure(
    panels: int, title: str | None = None, size: tuple[float, float] = (4.5, 3.7)
) -> tuple[Figure, list[Axes]]:
    """Return a figure of some panels, at most three in a row, each of that size in inches."""
    columns = panels if panels <= 3 else 2 if panels == 4 else 3
    rows = math.ceil(panels / columns)
    figure = Figure(
        figsize=(size[0] * columns, size[1] * rows + (0.3 if title else 0)),
        layout="constrained",
        facecolor="white",
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.06, hspace=0.05)
    grid = figure.add_gridspec(rows, columns)
    found = []
    for index in range(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns], facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(EDGE)
        axes.tick_params(which="both", color=EDGE, labelcolor=SOFT, labelsize=9.5)
        axes.tick_params(which="minor", length=2)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set(color=INK, fontsize=11)
        axes.yaxis.label.set(color=INK, fontsize=11)
        found.append(axes)
    entitle(figure, title)
    return figure, found


def entitle(figure: Figure, title: str | None) -> None:
    """Put a title above the panels, if there is one."""
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=INK)


def colorbar(
    figure: Figure, image: ScalarMappable, axes: Sequence[Axes], name: str, shrink: float = 1.0
) -> None:
    """Put a colour bar with its name beside some axes."""
    bar = figure.colorbar(image, ax=axes, shrink=shrink)
    bar.set_label(name, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=3, color=SOFT, labelcolor=SOFT, labelsize=9)


def legend(figure: Figure, handles: Mapping[str, Any], title: str | None = None) -> None:
    """Put a legend below the panels, with as many columns as fit."""
    # Roughly what a column takes in inches: its longest name, the handle and the spaces.
    names = list(handles)
    columns = math.ceil(len(names) / math.ceil(len(names) / 4))
    while columns > 1:
        longest = [max(map(len, part)) for part in np.array_split(names, columns)]
        if sum(0.085 * length + 0.6 for length in longest) < figure.get_figwidth():
            break
        columns -= 1
    figure.legend(
        list(handles.values()),
        names,
        loc="outside lower left",
        ncols=columns,
        title=title,
        title_fontsize=9.5,
        alignment="left",
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=2.2,
        columnspacing=1.6,
    )


def tick_log_axis(axes: Axes, which: str) -> None:
    """Label a logarithmic axis where its range is, with few digits."""
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    decades = math.log10(high / low)
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(LogLocator(subs=()))
    elif decades < 2.2:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axis.set_major_locator(LogLocator(numticks=7))
    is_plain = low >= 1e-3 and high <= 1e4
    plain = FuncFormatter(lambda value, _: f"{value:.6g}")
    axis.set_major_formatter(plain if is_plain else LogFormatterSciNotation(labelOnlyBase=False))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a PNG, SVG or PDF file, as the suffix of the path says.

    The file appears only when it is whole; an existing one is replaced.

    Args:
        figure: any matplotlib figure.
        path: of the file, in a folder that exists.

    Returns:
        The path.

    Raises:
        TypeError: ``figure`` is none.
        ValueError: the suffix is another one.
        OSError: the folder is not there or cannot be written.
    """
    check_kind("figure", figure, Figure, "The functions plot_... return one.")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        rule = f"must end in one of {', '.join(SUFFIXES)}"
        fail(ValueError, "path", rule, repr(str(path)), "The suffix is the file's format.")
    # Without the date, the same figure gives the same bytes of a PNG or a PDF.
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(suffix)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=200, metadata=metadata)
    with when_whole(path) as part:
        part.write_bytes(buffer.getvalue())
    return path


def svg(figure: Figure, description: str) -> str:
    """Return a figure as an ``<svg>`` element for a page of HTML, whose theme it follows.

    Text, axes and grid have the colour of the page's text at that place, and the background is
    transparent. What is white, such as the rims of markers, has the colour ``--paper`` if the page
    sets that variable. The element is as wide as it can be. Its text is drawn as shapes, which need
    no font.

    Args:
        figure: any matplotlib figure. What is black, or in a neutral colour of this package, takes
            the colour of the page's text.
        description: for readers who do not see it. Figures of one page need different ones, as
            what they define is named after it.

    Raises:
        TypeError: ``figure`` is none.
    """
    check_kind("figure", figure, Figure, "The functions plot_... return one.")
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    text = buffer.getvalue()
    (view,) = re.findall(r'viewBox="[^"]+"', text)
    text = text[text.index(">", text.index("<svg")) + 1 :]
    # Styles would be those of the whole page, and other figures may have the same names.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    prefix = f"figure-{zlib.crc32(description.encode()):08x}"
    used = dict.fromkeys(found[1] for found in _REFERENCE.finditer(text))
    names = {name: f"{prefix}-{index}" for index, name in enumerate(used)}
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", text)
    text = _REFERENCE.sub(lambda m: m[0].replace(m[1], names[m[1]]), text)
    text = re.sub(r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', text)  # below a hatch
    text = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _take_theme, text)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view} role="img" aria-label="{html.escape(description)}" fill="currentColor" '
        f'stroke-linejoin="round">{text}'
    )


def _take_theme(match: re.Match[str]) -> str:
    which, color = match.groups()
    if color == "#ffffff":
        return f"{which}: var(--paper, white)"
    opacity = _OPACITIES.get(color)
    if opacity is None:
        return match[0]
    return f"{which}: currentColor" + (f"; {which}-opacity: {opacity}" if opacity < 1 else "")
