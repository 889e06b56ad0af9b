"""Losses of training runs over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..checks import check_not_empty
from . import style

Curve = Sequence[tuple[int, float]]


def plot_losses(
    validation: Mapping[str, Curve],
    *,
    training: Mapping[str, Curve] | None = None,
    levels: Mapping[str, float] | None = None,
    top: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the losses of runs over their steps.

    Args:
        validation: (step, loss in nats per byte) of each run, by the name to show.
        training: the same of single batches, which are drawn faintly. Default none.
        levels: losses to compare with, by the name to show; dotted. Default none.
        top: where the axis ends, however high the losses are. Default: above all of them.
        title: stands above the figure. Default none.

    Raises:
        ValueError: there is no run.
    """
    check_not_empty("validation", validation)
    figure, (axes,) = style.figure(1, title)
    handles: dict[str, Any] = {}
    for index, (name, curve) in enumerate(validation.items()):
        color = style.color(index)
        batches = (training or {}).get(name, ())
        axes.plot(*_columns(batches), color=color, alpha=0.3, linewidth=0.8)
        look = {"color": color, "marker": style.marker(index), "markersize": 4.5}
        (handles[name],) = axes.plot(*_columns(curve), linewidth=1.8, **look)
    for index, (name, level) in enumerate((levels or {}).items()):
        color = (style.SOFT, style.EDGE)[index % 2]
        handles[name] = axes.axhline(level, color=color, **style.DOTTED)
    axes.set_ylim(top=top)
    axes.margins(x=0.02)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    style.legend(figure, handles)
    return figure


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
