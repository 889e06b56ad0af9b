"""How far tokens are from being parallel, over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..checks import (
    check_choice,
    check_not_empty,
    check_number,
    check_numbers,
    check_positive,
    check_size,
    fail,
)
from ..sde.sample import LEVELS, CovarianceSample, quantile
from . import style
from .samples import DEPTH, Series, array, check_samples, describe, series_of

_LABELS = {
    "distance": r"$1 - \rho$ (mean over pairs)",
    "size": r"mean variance $\mathrm{tr}\,V / m$",
}
_FROZEN: dict[str, Any] = {**style.DOTTED, "marker": "X"}


def plot_rank_collapse(
    samples: Mapping[str, CovarianceSample],
    *,
    width: int | Mapping[str, int] | None = None,
    theory: Mapping[str, float] | None = None,
    quantities: Sequence[str] = ("distance", "size"),
    levels: tuple[float, float, float] = LEVELS,
    title: str | None = None,
) -> Figure:
    """Draw how far tokens are from being parallel, and their size, over depth.

    The distance is 1 - rho, the mean over pairs of tokens, the size the mean variance tr V / m: of
    both the median over paths, in a band of outer quantiles, on logarithmic axes. A 1 - rho below
    the rounding error of the sample's dtype is drawn at it.

    A cross is where half of the paths have been frozen; the median no longer moves after it and is
    dotted. Simulate unshaped networks with ``eigenvalue_range=(0, math.inf)``, so that they go on.

    Args:
        samples: what to draw, by the name to show; networks of several kinds, or predictions.
        width: of the networks, or of each by its name: the horizontal axis then counts layers,
            width times depth / width. Default None: the axis is depth / width.
        theory: factors by which 1 - rho shrinks in each layer, by the name to show, for which
            `uncentered_factor` and `softmax_factor` are meant. Each is a thin line beside the
            distances, from where the first sample starts. Needs the width. Default none.
        quantities: "distance" and "size", one panel for each. Default both.
        levels: of the lower, middle and upper quantile. Default 5, 50 and 95 %.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no sample, one has no path or a single token, the theory
            comes without a width, or a number is out of its range.
    """
    levels = check_numbers("levels", levels, 3, 0, 1, ascending=True)
    check_samples(samples)
    for name, sample in samples.items():
        if sample.tokens < 2:
            rule, remedy = "must have at least two tokens", "A correlation takes two."
            fail(ValueError, f"samples[{name!r}]", rule, sample.tokens, remedy)
    widths = _check_widths(samples, width)
    _check_theory(theory, widths)
    for quantity in check_not_empty("quantities", quantities):
        check_choice("quantities", quantity, _LABELS)
    figure, panels = style.figure(len(quantities), title)
    shown = dict(zip(quantities, panels, strict=True))
    handles: dict[str, Any] = {}
    for series in series_of(samples):
        sample = series.sample
        depth = array(sample.times) * (widths[series.name] if widths else 1)
        frozen = _frozen_from(sample)
        for quantity, axes in shown.items():
            values = _distance(sample) if quantity == "distance" else _size(sample)
            bounds = array(quantile(values, levels)).T
            handles[series.name] = _draw_median(axes, depth, bounds, frozen, series)
    if "distance" in shown:
        for index, (name, factor) in enumerate((theory or {}).items()):
            values = _theory(factor, samples, widths)
            look = {"color": style.INK, "linestyle": style.dashes(index + 1), "linewidth": 1.1}
            (handles[name],) = shown["distance"].plot(*values, label=name, zorder=4, **look)
    if any(_frozen_from(sample) is not None for sample in samples.values()):
        handles["half of the paths frozen"] = Line2D([], [], color=style.SOFT, **_FROZEN)
    for quantity, axes in shown.items():
        axes.set_ylabel(_LABELS[quantity])
        axes.set_xlabel("layer" if widths else DEPTH)
        axes.set_yscale("log")
        axes.margins(x=0.02)
        style.tick_log_axis(axes, "y")
    style.legend(figure, handles, describe(levels))
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


def _draw_median(
    axes: Axes, depth: np.ndarray, bounds: np.ndarray, frozen: int | None, series: Series
) -> Any:
    low, middle, high = bounds
    moving = slice(None if frozen is None else frozen + 1)
    look = {"color": style.color(series.index)}
    band = axes.fill_between(
        depth[moving], low[moving], high[moving], alpha=0.16, linewidth=0, **look
    )
    if frozen is not None:
        axes.plot(depth[frozen:], middle[frozen:], markevery=[0], **look, **_FROZEN)
    look |= {"linestyle": style.dashes(series.index), "linewidth": 2}
    (line,) = axes.plot(depth[moving], middle[moving], label=series.name, **look)
    return band, line


def _theory(
    factor: float, samples: Mapping[str, CovarianceSample], widths: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return layers, and 1 - rho that shrinks by a factor in each, down to the rounding."""
    sample = next(iter(samples.values()))
    start = float(quantile(_distance(sample)[0], (0.5,)))
    last = max(float(samples[n].times[-1]) * widths[n] for n in samples)
    layers = np.linspace(0, last, 400)
    with np.errstate(under="ignore"):
        values = start * np.power(factor, layers)
    shown = values >= torch.finfo(sample.covariances.dtype).eps
    return layers[shown], values[shown]


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


def _check_widths(
    samples: Mapping[str, CovarianceSample], width: int | Mapping[str, int] | None
) -> dict[str, int]:
    """Return the width of each sample, or nothing if they are not known."""
    if width is None:
        return {}
    widths = dict(width) if isinstance(width, Mapping) else dict.fromkeys(samples, width)
    for name in samples:
        if name not in widths:
            rule = "must be one number, or have one for each sample"
            fail(ValueError, "width", rule, f"none for {name!r}", "Give its width too.")
        check_size("width", widths[name])
    return widths


def _check_theory(theory: Mapping[str, float] | None, widths: Mapping[str, int]) -> None:
    for name, factor in (theory or {}).items():
        check_positive(f"theory[{name!r}]", factor)
    if theory and not widths:
        rule = "must be given with theory, which counts layers"
        fail(ValueError, "width", rule, None, "Give the width of the networks.")
