"""How long the covariance stays in range, over branch gain and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from ..checks import check_kind
from ..sde.stopping_map import StoppingTimeMap
from . import style
from .samples import DEPTH, array

_MISSING = {"facecolor": style.MISSING, "edgecolor": style.EDGE, "hatch": "////", "linewidth": 0}


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
    check_kind("map", map, StoppingTimeMap, "stopping_time_map returns one.")
    figure, (axes,) = style.figure(1, title, size=(5.4, 4.2))
    axes.grid(False)
    axes.patch.set(**_MISSING)
    x_edges, x_is_log = _cell_edges(map.branch_gains)
    y_edges, y_is_log = _cell_edges(map.tau0s)
    mesh = axes.pcolormesh(
        x_edges,
        y_edges,
        np.ma.masked_invalid(array(map.median).T),
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
            style.tick_log_axis(axes, which)
        if len(settings) <= 7:
            axis = getattr(axes, f"{which}axis")
            axis.set_ticks(settings, [f"{value:.3g}" for value in settings])
            axis.set_minor_formatter(NullFormatter())
            axis.set_ticks([], minor=True)
    axes.set_xlabel(r"branch gain $\gamma$")
    axes.set_ylabel(r"temperature $\tau_0$")
    for spine in axes.spines.values():
        spine.set_visible(False)
    name = f"median stopping time ({DEPTH}),\ncapped at {map.time:.4g}"
    style.colorbar(figure, mesh, [axes], name)
    if not map.is_complete:
        style.legend(figure, {"not computed": Patch(**_MISSING)})
    return figure


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
