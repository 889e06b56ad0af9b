"""Figures of the token covariance over depth, those of arXiv 2306.17759, for matplotlib.

Every function returns a `matplotlib.figure.Figure`; `save` writes one to a file. Nothing here uses
pyplot or changes a global setting, so that it works without a display and beside other figures.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from torch import Tensor

from .sde.sample import LEVELS, CovarianceSample, quantile
from .sde.settings import check_count, check_number, check_positive
from .sde.stopping_map import StoppingTimeMap
from .sde.token_kernel import Propagation
from .validation import fail

SUFFIXES = (".pdf", ".png", ".svg")
"""The formats that `save` writes, by the end of the file's name."""

# Okabe and Ito's colours, which readers with any colour vision tell apart; without their yellow,
# which is too faint on white. Each comes with a marker and a dash pattern of its own.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.2)), (0, (9, 3)))
_INK, _SOFT, _GRID, _MISSING = "#222222", "#5b6875", "#e6eaee", "#eceff2"

_POINTS: dict[str, Any] = {
    "markersize": 5.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.7,
    "elinewidth": 1.2,
}
_FROZEN: dict[str, Any] = {"linestyle": (0, (1, 1.6)), "linewidth": 1.2, "marker": "X"}

_DEPTH = "depth / width"
_WHISKERS = 9  # about as many of them can be told apart
_BINS = (24, 64)  # fewest and most bins of a density
_TAIL = 0.005  # fraction of paths at either end that may lie outside the axis of a density


def plot_covariance(
    samples: Mapping[str, CovarianceSample],
    statistics: Sequence[str] = ("rho_12", "V_11"),
    *,
    levels: tuple[float, float, float] = LEVELS,
    title: str | None = None,
) -> Figure:
    """Draw correlations and variances over depth / width, each with a middle and outer quantiles.

    A prediction (``source="sde"``) is a line in a band, networks are points with whiskers. Both
    show the same quantiles, those of all paths with the frozen ones among them.

    Args:
        samples: what to draw, by the name to show.
        statistics: "rho_12" is the correlation of tokens 1 and 2, "V_11" the variance of token 1,
            whose axis is logarithmic. One panel for each.
        levels: of the lower, middle and upper quantile, from 0 to 1. Default 5, 50 and 95 %.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no sample, one has no path or lacks a statistic, or the
            levels are not three ascending ones.
    """
    levels = _check_levels(levels)
    found = _find(samples, statistics)
    figure, panels = _figure(len(found), title)
    for axes, (statistic, values) in zip(panels, found.items(), strict=True):
        handles = {}
        for series in _series(samples):
            times = _array(series.sample.times)
            bounds = _array(quantile(values[series.name], levels)).T
            draw = _draw_band if series.is_prediction else _draw_whiskers
            handles[series.name] = draw(axes, times, bounds, series)
        axes.set_xlabel(_DEPTH)
        axes.set_ylabel(_label(statistic))
        axes.margins(x=0.02)
        if _is_variance(statistic):
            axes.set_yscale("log")
            _tick_log_axis(axes, "y")
    _legend(figure, handles, _describe(levels))
    return figure


def plot_densities(
    samples: Mapping[str, CovarianceSample],
    statistics: Sequence[str] = ("rho_12", "V_11"),
    *,
    title: str | None = None,
) -> Figure:
    """Draw the densities of correlations and variances at the end of depth.

    Histograms with the same bins for all samples: a prediction (``source="sde"``) is filled,
    networks are points with one standard error to either side, where a bin is not empty. A variance
    has a logarithmic axis, and its density is that of its decimal logarithm. The axis leaves out at
    most 0.5 % of the paths of any sample at either end. They count in the heights, and so do values
    that are not finite, of which a note above the panel tells.

    Args:
        samples: what to draw, by the name to show.
        statistics: as in `plot_covariance`.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no sample, one has no path or lacks a statistic, or a
            statistic has no finite value.
    """
    found = _find(samples, statistics, last_only=True)
    figure, panels = _figure(len(found), title)
    for axes, (statistic, values) in zip(panels, found.items(), strict=True):
        columns = {name: _on_axis(statistic, value[-1]) for name, value in values.items()}
        edges = _bin_edges(statistic, list(columns.values()))
        handles = {}
        top = 0.0
        for series in _series(samples):
            heights, errors = _histogram(columns[series.name], edges, series.sample.paths)
            draw = _draw_histogram if series.is_prediction else _draw_points
            handles[series.name] = draw(axes, statistic, edges, heights, errors, series)
            top = max(top, 1.05 * float((heights + errors).max()))
        _note_missing(axes, {name: samples[name].paths - len(columns[name]) for name in columns})
        axes.set_xlabel(_label(statistic))
        axes.set_ylabel("density")
        axes.margins(x=0.02)
        if _is_variance(statistic):
            axes.set_ylabel("density per decade")
            axes.set_xscale("log")
            _tick_log_axis(axes, "x")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_ylim(0, top or 1.0)
    times = sorted({float(sample.times[-1]) for sample in samples.values()})
    ends = " and ".join(f"{time:.4g}" for time in times)
    _legend(figure, handles, f"at {_DEPTH} = {ends}")
    return figure


def plot_stopping_times(
    map: StoppingTimeMap,  # the name of what it shows; the built-in is not needed here
    *,
    title: str | None = None,
) -> Figure:
    """Draw the median stopping time over branch gain and temperature as a heat map.

    Cells that were not computed are hatched. An axis is logarithmic if its settings are closer to
    being spread evenly on that one.

    Args:
        map: as `shaped_attn.sde.stopping_map.stopping_time_map` returns it.
        title: stands above the figure. Default none.

    Raises:
        TypeError: ``map`` is none.
    """
    if not isinstance(map, StoppingTimeMap):
        fail(
            TypeError,
            "map",
            "must be a StoppingTimeMap",
            type(map).__name__,
            "stopping_time_map returns one.",
        )
    figure, (axes,) = _figure(1, title, size=(5.4, 4.2))
    axes.grid(False)
    axes.patch.set(facecolor=_MISSING, edgecolor="#aab3bc", hatch="////", linewidth=0)
    x_edges, x_is_log = _cell_edges(map.branch_gains)
    y_edges, y_is_log = _cell_edges(map.tau0s)
    mesh = axes.pcolormesh(
        x_edges,
        y_edges,
        np.ma.masked_invalid(_array(map.median).T),
        cmap="viridis",
        vmin=0,
        vmax=map.time,
        rasterized=True,  # no hairlines between the cells of a PDF
    )
    for which, is_log, settings in (
        ("x", x_is_log, map.branch_gains),
        ("y", y_is_log, map.tau0s),
    ):
        if is_log:
            axes.set(**{f"{which}scale": "log"})
            _tick_log_axis(axes, which)
        if len(settings) <= 7:
            axis = getattr(axes, f"{which}axis")
            axis.set_ticks(settings, [f"{value:.3g}" for value in settings])
            axis.set_minor_formatter(NullFormatter())
            axis.set_ticks([], minor=True)
    axes.set_xlabel(r"branch gain $\gamma$")
    axes.set_ylabel(r"temperature $\tau_0$")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label(f"median stopping time ({_DEPTH}),\ncapped at {map.time:.4g}", color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=3, color=_SOFT, labelcolor=_SOFT, labelsize=9)
    if not map.is_complete:
        patch = Patch(facecolor=_MISSING, edgecolor="#aab3bc", hatch="////", linewidth=0)
        _legend(figure, {"not computed": patch}, None)
    return figure


def plot_rank_collapse(
    samples: Mapping[str, CovarianceSample],
    *,
    width: int | Mapping[str, int] | None = None,
    theory: Mapping[str, float] | None = None,
    levels: tuple[float, float, float] = LEVELS,
    title: str | None = None,
) -> Figure:
    """Draw how far tokens are from being parallel, and their size, over depth.

    The left panel has 1 - rho, the mean over pairs of tokens, the right one the mean variance
    tr V / m: of both the median over paths, in a band of outer quantiles, on logarithmic axes. A
    1 - rho below the rounding error of the sample's dtype is drawn at it.

    A cross is where half of the paths have been frozen; the median no longer moves after it and is
    dotted. Simulate unshaped networks with ``eigenvalue_range=(0, math.inf)``, so that they go on.

    Args:
        samples: what to draw, by the name to show; networks of several kinds, or predictions.
        width: of the networks, or of each by its name: the horizontal axis then counts layers,
            width times depth / width. Default None: the axis is depth / width.
        theory: factors by which 1 - rho shrinks in each layer, by the name to show, for which
            `uncentered_factor` and `softmax_factor` are meant. Each is a thin line in the left
            panel, from where the first sample starts. Needs the width. Default none.
        levels: of the lower, middle and upper quantile. Default 5, 50 and 95 %.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no sample, one has no path or a single token, the theory
            comes without a width, or a number is out of its range.
    """
    levels = _check_levels(levels)
    _check_samples(samples)
    for name, sample in samples.items():
        if sample.tokens < 2:
            fail(
                ValueError,
                f"samples[{name!r}]",
                "must have at least two tokens",
                sample.tokens,
                "A correlation takes two.",
            )
    widths = _check_widths(samples, width)
    _check_theory(theory, widths)
    figure, (left, right) = _figure(2, title)
    handles: dict[str, Any] = {}
    for series in _series(samples):
        sample = series.sample
        depth = _array(sample.times) * (widths[series.name] if widths else 1)
        frozen = _frozen_from(sample)
        for axes, values in ((left, _distance(sample)), (right, _size(sample))):
            bounds = _array(quantile(values, levels)).T
            handles[series.name] = _draw_median(axes, depth, bounds, frozen, series)
    for index, (name, factor) in enumerate((theory or {}).items()):
        handles[name] = _draw_theory(left, factor, samples, widths, name, index)
    if any(_frozen_from(sample) is not None for sample in samples.values()):
        handles["half of the paths frozen"] = Line2D([], [], color=_SOFT, **_FROZEN)
    left.set_ylabel(r"$1 - \rho$ (mean over pairs)")
    right.set_ylabel(r"mean variance $\mathrm{tr}\,V / m$")
    for axes in (left, right):
        axes.set_xlabel("layer" if widths else _DEPTH)
        axes.set_yscale("log")
        axes.margins(x=0.02)
        _tick_log_axis(axes, "y")
    _legend(figure, handles, _describe(levels))
    return figure


def uncentered_factor(branch_gain: float) -> float:
    """Return by what 1 - rho shrinks in a layer without centring, A = I + softmax.

    1 / (1 + 3 branch_gain^2), covariance-sde.md section 4.
    """
    check_number("branch_gain", branch_gain)
    return 1 / (1 + 3 * branch_gain**2)


def softmax_factor(branch_gain: float) -> float:
    """Return by what 1 - rho shrinks in a layer of plain softmax attention.

    1 - branch_gain^2, covariance-sde.md section 4.
    """
    check_number("branch_gain", branch_gain)
    return 1 - branch_gain**2


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
    if not isinstance(figure, Figure):
        fail(
            TypeError,
            "figure",
            "must be a matplotlib Figure",
            type(figure).__name__,
            "The functions plot_... return one.",
        )
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        fail(
            ValueError,
            "path",
            f"must end in one of {', '.join(SUFFIXES)}",
            repr(str(path)),
            "The suffix is the file's format.",
        )
    # Without the date, the same figure gives the same bytes of a PNG or a PDF.
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(suffix)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=200, metadata=metadata)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


class _Series(NamedTuple):
    """A sample and how it looks."""

    name: str
    sample: CovarianceSample
    index: int  # among all samples
    rank: int  # among those of its kind, predictions or networks
    peers: int  # how many of its kind there are

    @property
    def is_prediction(self) -> bool:
        return self.sample.source == "sde"

    @property
    def color(self) -> str:
        return _COLORS[self.index % len(_COLORS)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.index % len(_MARKERS)]


def _series(samples: Mapping[str, CovarianceSample]) -> list[_Series]:
    kinds = [sample.source == "sde" for sample in samples.values()]
    return [
        _Series(name, sample, index, kinds[:index].count(kinds[index]), kinds.count(kinds[index]))
        for index, (name, sample) in enumerate(samples.items())
    ]


def _dashes(index: int) -> Any:
    return _DASHES[index % len(_DASHES)]


def _draw_band(axes: Axes, times: np.ndarray, bounds: np.ndarray, series: _Series) -> Any:
    low, middle, high = bounds
    band = axes.fill_between(times, low, high, color=series.color, alpha=0.2, linewidth=0)
    look = {"color": series.color, "linestyle": _dashes(series.rank), "linewidth": 2}
    (line,) = axes.plot(times, middle, label=series.name, **look)
    return band, line


def _draw_whiskers(axes: Axes, times: np.ndarray, bounds: np.ndarray, series: _Series) -> Any:
    # Back from the end, where the laws are compared; each of several networks at times of its own.
    last = len(times) - 1
    stride = max(1, math.ceil(last / _WHISKERS))
    shown = np.arange(last - series.rank * stride // series.peers, -1, -stride)[::-1]
    low, middle, high = bounds[:, shown]
    return axes.errorbar(
        times[shown],
        middle,
        yerr=(middle - low, high - middle),
        label=series.name,
        color=series.color,
        fmt=series.marker,
        zorder=3,
        capsize=2.5,
        **_POINTS,
    )


def _draw_histogram(
    axes: Axes,
    statistic: str,
    edges: np.ndarray,
    heights: np.ndarray,
    errors: np.ndarray,
    series: _Series,
) -> Any:
    places = _place(statistic, edges)
    axes.stairs(heights, places, color=series.color, fill=True, alpha=0.2, linewidth=0)
    look = {"color": series.color, "linestyle": _dashes(series.rank), "linewidth": 1.5}
    axes.stairs(heights, places, label=series.name, **look)
    return Patch(color=series.color, alpha=0.2, linewidth=0), Line2D([], [], **look)


def _draw_points(
    axes: Axes,
    statistic: str,
    edges: np.ndarray,
    heights: np.ndarray,
    errors: np.ndarray,
    series: _Series,
) -> Any:
    # Several networks stand side by side in a bin.
    places = edges[:-1] + np.diff(edges) * (series.rank + 1) / (series.peers + 1)
    shown = heights > 0
    return axes.errorbar(
        _place(statistic, places[shown]),
        heights[shown],
        yerr=errors[shown],
        label=series.name,
        color=series.color,
        fmt=series.marker,
        zorder=3,
        **_POINTS,
    )


def _draw_median(
    axes: Axes, depth: np.ndarray, bounds: np.ndarray, frozen: int | None, series: _Series
) -> Any:
    low, middle, high = bounds
    moving = slice(None if frozen is None else frozen + 1)
    band = axes.fill_between(
        depth[moving], low[moving], high[moving], color=series.color, alpha=0.16, linewidth=0
    )
    (line,) = axes.plot(
        depth[moving],
        middle[moving],
        color=series.color,
        linestyle=_dashes(series.index),
        linewidth=2,
        label=series.name,
    )
    if frozen is not None:
        axes.plot(depth[frozen:], middle[frozen:], color=series.color, markevery=[0], **_FROZEN)
    return band, line


def _draw_theory(
    axes: Axes,
    factor: float,
    samples: Mapping[str, CovarianceSample],
    widths: Mapping[str, int],
    name: str,
    index: int,
) -> Line2D:
    sample = next(iter(samples.values()))
    start = float(quantile(_distance(sample)[0], (0.5,)))
    last = max(float(samples[n].times[-1]) * widths[n] for n in samples)
    layers = np.linspace(0, last, 400)
    with np.errstate(under="ignore"):
        values = start * np.power(factor, layers)
    floor = torch.finfo(sample.covariances.dtype).eps
    (line,) = axes.plot(
        layers[values >= floor],
        values[values >= floor],
        color=_INK,
        linewidth=1.1,
        linestyle=_dashes(index + 1),
        label=name,
        zorder=4,
    )
    return line


def _distance(sample: CovarianceSample) -> Tensor:
    """Return 1 - rho, the mean over pairs, (K, paths); at least the rounding of its dtype."""
    rho = torch.stack(list(sample.correlations().values())).double().mean(0)
    return (1 - rho).clamp(min=torch.finfo(sample.covariances.dtype).eps)


def _size(sample: CovarianceSample) -> Tensor:
    """Return tr V / m, (K, paths)."""
    return sample.covariances.diagonal(dim1=-2, dim2=-1).double().mean(-1)


def _frozen_from(sample: CovarianceSample) -> int | None:
    """Return the index of the first time when half of the paths are frozen; None without one."""
    frozen = (sample.stop_times <= sample.times.to(sample.stop_times)[:, None]).double().mean(-1)
    found = (frozen >= 0.5).nonzero()
    return int(found[0]) if len(found) else None


def _on_axis(statistic: str, values: Tensor) -> np.ndarray:
    """Return the values that have a place on the axis, on which a variance is its logarithm."""
    values = _array(values.double())
    if _is_variance(statistic):
        values = np.log10(values[values > 0])
    return values[np.isfinite(values)]


def _place(statistic: str, positions: np.ndarray) -> np.ndarray:
    """Undo the logarithm of `_on_axis`."""
    return 10**positions if _is_variance(statistic) else positions


def _bin_edges(statistic: str, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return the edges of bins of one width, by the rule of Freedman and Diaconis."""
    columns = [column for column in columns if len(column)]
    if not columns:
        fail(
            ValueError,
            "samples",
            f"must have a finite {_label(statistic, is_math=False)} at the last time",
            "none",
            "Look at their stop_times, and at an earlier time with CovarianceSample.at.",
        )
    low = min(np.quantile(column, _TAIL, method="lower") for column in columns)
    high = max(np.quantile(column, 1 - _TAIL, method="higher") for column in columns)
    if high - low < 1e-6 * max(1.0, abs(low)):  # a single point
        low, high = low - 0.05, high + 0.05
    spreads = [np.subtract(*np.quantile(c, (0.75, 0.25))) * 2 / np.cbrt(len(c)) for c in columns]
    count = (high - low) / max(spreads) if max(spreads) > 0 else math.inf
    return np.linspace(low, high, 1 + round(min(max(count, _BINS[0]), _BINS[1])))


def _histogram(column: np.ndarray, edges: np.ndarray, paths: int) -> tuple[np.ndarray, np.ndarray]:
    """Return densities and their standard errors; all paths count, not only those in a bin."""
    counts, _ = np.histogram(column, edges)
    share, widths = counts / paths, np.diff(edges)
    return share / widths, np.sqrt(share * (1 - share) / paths) / widths


def _note_missing(axes: Axes, missing: Mapping[str, int]) -> None:
    notes = [f"{name}: {count} paths not finite" for name, count in missing.items() if count]
    if notes:
        axes.set_title("\n".join(notes), loc="right", fontsize=8.5, color=_SOFT)


def _figure(
    panels: int, title: str | None, size: tuple[float, float] = (4.5, 3.7)
) -> tuple[Figure, list[Axes]]:
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
        axes = figure.add_subplot(grid[index // columns, index % columns], facecolor="white")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa5b0")
        axes.tick_params(which="both", color="#9aa5b0", labelcolor=_SOFT, labelsize=9.5)
        axes.tick_params(which="minor", length=2)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set(color=_INK, fontsize=11)
        axes.yaxis.label.set(color=_INK, fontsize=11)
        found.append(axes)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=_INK)
    return figure, found


def _legend(figure: Figure, handles: Mapping[str, Any], title: str | None) -> None:
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
        labelcolor=_INK,
        handlelength=2.2,
        columnspacing=1.6,
    )


def _tick_log_axis(axes: Axes, which: str) -> None:
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


def _cell_edges(settings: Sequence[float]) -> tuple[np.ndarray, bool]:
    """Return edges with the settings in the middle of their cells, and whether in logarithms."""
    values = np.array(settings, dtype=float)
    if len(values) == 1:
        return np.array([0.9, 1.1]) * values if values[0] else np.array([-0.1, 0.1]), False
    is_log = False
    if len(values) > 2 and values[0] > 0:
        linear, logarithmic = np.diff(values), np.diff(np.log(values))
        is_log = np.ptp(logarithmic) / logarithmic.mean() < 0.5 * np.ptp(linear) / linear.mean()
    places = np.log(values) if is_log else values
    inner = (places[1:] + places[:-1]) / 2
    edges = np.concatenate(([2 * places[0] - inner[0]], inner, [2 * places[-1] - inner[-1]]))
    return (np.exp(edges) if is_log else edges), bool(is_log)


def _is_variance(statistic: str) -> bool:
    return statistic.startswith("V")


def _label(statistic: str, is_math: bool = True) -> str:
    """Return "correlation rho_12" or "variance V_11", typeset."""
    symbol, _, indices = statistic.partition("_")
    kind = "variance" if _is_variance(statistic) else "correlation"
    if not is_math:
        return f"{kind} {statistic}"
    symbol = symbol if _is_variance(statistic) else rf"\{symbol}"
    return rf"{kind} ${symbol}_{{{indices.replace('_', ',')}}}$"


def _describe(levels: tuple[float, float, float]) -> str:
    low, middle, high = (f"{100 * level:.4g}" for level in levels)
    middle = "median" if levels[1] == 0.5 else f"{middle} % quantile"
    return f"{middle}, and {low} to {high} % of paths"


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _check_samples(samples: Mapping[str, CovarianceSample]) -> None:
    if not isinstance(samples, Mapping):
        fail(
            TypeError,
            "samples",
            "must be a mapping from names to samples",
            type(samples).__name__,
            'Give for example {"prediction": sample}.',
        )
    if not samples:
        fail(ValueError, "samples", "must not be empty", "none", "Give at least one sample.")
    for name, sample in samples.items():
        if not isinstance(sample, CovarianceSample):
            fail(
                TypeError,
                f"samples[{name!r}]",
                "must be a CovarianceSample",
                type(sample).__name__,
                "CovarianceSDE.sample and FiniteNetwork.sample return one.",
            )
        if sample.paths == 0:
            fail(
                ValueError,
                f"samples[{name!r}]",
                "must have at least one path",
                "none",
                "A simulation that was interrupted too early has none; let it run longer.",
            )


def _find(
    samples: Mapping[str, CovarianceSample], statistics: Sequence[str], *, last_only: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics, each (K, paths) by the name of its sample."""
    _check_samples(samples)
    if isinstance(statistics, str):
        fail(
            TypeError,
            "statistics",
            "must be a sequence of names",
            repr(statistics),
            f"Write ({statistics!r},).",
        )
    if not statistics:
        fail(ValueError, "statistics", "must not be empty", "none", "Give at least one name.")
    found: dict[str, dict[str, Tensor]] = {statistic: {} for statistic in statistics}
    for name, sample in samples.items():
        known = (sample.at(-1) if last_only else sample).statistics()
        for statistic in statistics:
            if statistic not in known:
                names = [*list(known)[:6], "..."] if len(known) > 6 else list(known)
                fail(
                    ValueError,
                    "statistics",
                    f"must be among those of samples[{name!r}], {', '.join(names)}",
                    repr(statistic),
                    f"It has {sample.tokens} tokens, counted from 1.",
                )
            found[statistic][name] = known[statistic]
    return found


def _check_levels(levels: Sequence[float]) -> tuple[float, float, float]:
    levels = tuple(levels)
    for level in levels:
        check_number("levels", level)
    if len(levels) != 3 or not 0 <= levels[0] < levels[1] < levels[2] <= 1:
        fail(
            ValueError,
            "levels",
            "must be three ascending numbers from 0 to 1",
            levels,
            "The default is (0.05, 0.5, 0.95).",
        )
    return levels


def _check_widths(
    samples: Mapping[str, CovarianceSample], width: int | Mapping[str, int] | None
) -> dict[str, int]:
    """Return the width of each sample, or nothing if they are not known."""
    if width is None:
        return {}
    widths = dict(width) if isinstance(width, Mapping) else dict.fromkeys(samples, width)
    for name in samples:
        if name not in widths:
            fail(
                ValueError,
                "width",
                "must be one number, or have one for each sample",
                f"none for {name!r}",
                "Give its width too.",
            )
        check_count("width", widths[name])
    return widths


def _check_theory(theory: Mapping[str, float] | None, widths: Mapping[str, int]) -> None:
    for name, factor in (theory or {}).items():
        check_positive(f"theory[{name!r}]", factor)
    if theory and not widths:
        fail(
            ValueError,
            "width",
            "must be given with theory, which counts layers",
            None,
            "Give the width of the networks.",
        )


def plot_token_kernels(
    propagations: Mapping[str, Propagation],
    layers: Sequence[int],
    *,
    title: str | None = None,
) -> Figure:
    """Draw the correlations of the tokens after some layers as heat maps, one row per method.

    All share one colour bar, from 0 to 1, or from -1 if a correlation is negative. Token 1 is in
    the upper left corner.

    Args:
        propagations: what to draw, by the name to show, as
            `shaped_attn.sde.token_kernel.propagate` returns it.
        layers: numbers of layers, one column for each; 0 is the input.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no propagation or no layer, or a propagation has fewer
            layers.

    References:
        He et al., Deep Transformers without Shortcuts, arXiv 2302.10322.
    """
    _check_propagations(propagations, layers)
    shown = {
        name: _array(propagation.correlations()[list(layers)])
        for name, propagation in propagations.items()
    }
    # Products of kernels that are positive may round to a little below 0.
    low = 0 if min(float(maps.min()) for maps in shown.values()) > -1e-9 else -1
    figure = Figure(
        figsize=(2.1 * len(layers) + 1.4, 2.1 * len(shown) + 0.4 + (0.3 if title else 0)),
        layout="compressed",  # constrained, for maps that stay square
        facecolor="white",
    )
    grid = figure.subplots(len(shown), len(layers), squeeze=False)
    for row, (name, maps) in zip(grid, shown.items(), strict=True):
        for axes, values in zip(row, maps, strict=True):
            image = axes.imshow(values, cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(name, fontsize=11, color=_INK)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title("input" if layer == 0 else f"layer {layer}", fontsize=11, color=_INK)
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=min(1.0, 1.6 / len(shown)))
    bar.set_label("correlation of two tokens", color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=3, color=_SOFT, labelcolor=_SOFT, labelsize=9)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=_INK)
    return figure


def _check_propagations(propagations: Mapping[str, Propagation], layers: Sequence[int]) -> None:
    if not isinstance(propagations, Mapping):
        fail(
            TypeError,
            "propagations",
            "must be a mapping from names to propagations",
            type(propagations).__name__,
            'Give for example {"E-SPA": propagation}.',
        )
    for name, value in (("propagations", propagations), ("layers", layers)):
        if not value:
            fail(ValueError, name, "must not be empty", "none", "Give at least one.")
    for layer in layers:
        check_count("layers", layer, least=0)
    for name, propagation in propagations.items():
        if not isinstance(propagation, Propagation):
            fail(
                TypeError,
                f"propagations[{name!r}]",
                "must be a Propagation",
                type(propagation).__name__,
                "shaped_attn.sde.token_kernel.propagate returns one.",
            )
        if max(layers) > propagation.layers:
            fail(
                ValueError,
                "layers",
                f"must be at most {propagation.layers}, the layers of propagations[{name!r}]",
                max(layers),
                "Give more priors to propagate.",
            )
