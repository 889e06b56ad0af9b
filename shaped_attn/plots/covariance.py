"""Correlations and variances of the tokens over depth, and their densities at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..checks import check_numbers, fail
from ..sde.sample import LEVELS, CovarianceSample, quantile
from . import style
from .samples import DEPTH, Series, array, describe, find, is_variance, label, series_of

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
    levels = check_numbers("levels", levels, 3, 0, 1, ascending=True)
    found = find(samples, statistics)
    figure, panels = style.figure(len(found), title)
    for axes, (statistic, values) in zip(panels, found.items(), strict=True):
        handles = {}
        for series in series_of(samples):
            times = array(series.sample.times)
            bounds = array(quantile(values[series.name], levels)).T
            draw = _draw_band if series.is_prediction else _draw_whiskers
            handles[series.name] = draw(axes, times, bounds, series)
        axes.set_xlabel(DEPTH)
        axes.set_ylabel(label(statistic))
        axes.margins(x=0.02)
        if is_variance(statistic):
            axes.set_yscale("log")
            style.tick_log_axis(axes, "y")
    style.legend(figure, handles, describe(levels))
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
    found = find(samples, statistics, last_only=True)
    figure, panels = style.figure(len(found), title)
    for axes, (statistic, values) in zip(panels, found.items(), strict=True):
        columns = {name: _on_axis(statistic, value[-1]) for name, value in values.items()}
        edges = _bin_edges(statistic, list(columns.values()))
        handles = {}
        top = 0.0
        for series in series_of(samples):
            heights, errors = _histogram(columns[series.name], edges, series.sample.paths)
            draw = _draw_histogram if series.is_prediction else _draw_points
            handles[series.name] = draw(axes, statistic, edges, heights, errors, series)
            top = max(top, 1.05 * float((heights + errors).max()))
        _note_missing(axes, {name: samples[name].paths - len(columns[name]) for name in columns})
        axes.set_xlabel(label(statistic))
        axes.set_ylabel("density")
        axes.margins(x=0.02)
        if is_variance(statistic):
            axes.set_ylabel("density per decade")
            axes.set_xscale("log")
            style.tick_log_axis(axes, "x")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_ylim(0, top or 1.0)
    times = sorted({float(sample.times[-1]) for sample in samples.values()})
    ends = " and ".join(f"{time:.4g}" for time in times)
    style.legend(figure, handles, f"at {DEPTH} = {ends}")
    return figure


def _draw_band(axes: Axes, times: np.ndarray, bounds: np.ndarray, series: Series) -> Any:
    low, middle, high = bounds
    color = style.color(series.index)
    band = axes.fill_between(times, low, high, color=color, alpha=0.2, linewidth=0)
    (line,) = axes.plot(times, middle, label=series.name, linewidth=2, **series.line)
    return band, line


def _draw_whiskers(axes: Axes, times: np.ndarray, bounds: np.ndarray, series: Series) -> Any:
    # Back from the end, where the laws are compared; each of several networks at times of its own.
    last = len(times) - 1
    stride = max(1, math.ceil(last / _WHISKERS))
    shown = np.arange(last - series.rank * stride // series.peers, -1, -stride)[::-1]
    low, middle, high = bounds[:, shown]
    return axes.errorbar(
        times[shown],
        middle,
        yerr=(middle - low, high - middle),
        capsize=2.5,
        **series.points,
    )


def _draw_histogram(
    axes: Axes,
    statistic: str,
    edges: np.ndarray,
    heights: np.ndarray,
    errors: np.ndarray,
    series: Series,
) -> Any:
    places = _place(statistic, edges)
    area = {"color": style.color(series.index), "alpha": 0.2, "linewidth": 0}
    axes.stairs(heights, places, fill=True, **area)
    look = {**series.line, "linewidth": 1.5}
    axes.stairs(heights, places, label=series.name, **look)
    return Patch(**area), Line2D([], [], **look)


def _draw_points(
    axes: Axes,
    statistic: str,
    edges: np.ndarray,
    heights: np.ndarray,
    errors: np.ndarray,
    series: Series,
) -> Any:
    # Several networks stand side by side in a bin.
    places = edges[:-1] + np.diff(edges) * (series.rank + 1) / (series.peers + 1)
    shown = heights > 0
    places = _place(statistic, places[shown])
    return axes.errorbar(places, heights[shown], yerr=errors[shown], **series.points)


def _on_axis(statistic: str, values: Tensor) -> np.ndarray:
    """Return the values that have a place on the axis, on which a variance is its logarithm."""
    values = array(values.double())
    if is_variance(statistic):
        values = np.log10(values[values > 0])
    return values[np.isfinite(values)]


def _place(statistic: str, positions: np.ndarray) -> np.ndarray:
    """Undo the logarithm of `_on_axis`."""
    return 10**positions if is_variance(statistic) else positions


def _bin_edges(statistic: str, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return the edges of bins of one width, by the rule of Freedman and Diaconis."""
    columns = [column for column in columns if len(column)]
    if not columns:
        rule = f"must have a finite {label(statistic, is_math=False)} at the last time"
        remedy = "Look at their stop_times, and at an earlier time with CovarianceSample.at."
        fail(ValueError, "samples", rule, "none", remedy)
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
        axes.set_title("\n".join(notes), loc="right", fontsize=8.5, color=style.SOFT)
