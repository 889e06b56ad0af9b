"""A table and a figure of the depth study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .. import plots
from .study import Study, StudyRun, Variant
from .trainer import FINISHED

if TYPE_CHECKING:
    from rich.table import Table

_MARGIN = 0.05  # of the vertical axis, above its start and below the lowest loss
_DASHES: dict[str, Any] = {
    "neither": "-",
    "skip": (0, (5, 1.5)),
    "norm": (0, (2.5, 1.2)),
    "skip + norm": (0, (1, 1.6)),
}


def table(study: Study) -> Table:
    """Return final validation losses: one row for each variant, one column for each depth."""
    from rich.table import Table

    best = study.best()
    depths = sorted({depth for _, depth in best})
    rates = {run.learning_rate for run in study.runs}
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("method", no_wrap=True)
    drawn.add_column("with", no_wrap=True)
    for depth in depths:
        drawn.add_column(f"depth {depth}", justify="right", no_wrap=True)
    for variant in _variants(study):
        cells = [_cell(best.get((variant, depth)), len(rates) > 1) for depth in depths]
        drawn.add_row(variant.method, variant.parts, *cells)
    return drawn


def _cell(run: StudyRun | None, shows_rate: bool) -> str:
    if run is None:
        return "-"
    text = "diverged" if run.result.status != FINISHED else f"{run.result.loss:.3f}"
    return f"{text} at {run.learning_rate:g}" if shows_rate else text


def _variants(study: Study) -> list[Variant]:
    return list(dict.fromkeys(run.variant for run in study.runs))


def plot(study: Study) -> Figure:
    """Draw the validation loss over the steps, one panel for each depth.

    Of several learning rates the one with the lowest final loss is drawn. A cross is where a run
    diverged; the dotted line is what byte frequencies alone give.
    """
    best = study.best()
    depths = sorted({depth for _, depth in best})
    methods = list(dict.fromkeys(variant.method for variant in _variants(study)))
    figure, panels = plots._figure(len(depths), None)
    # Where losses start depends on the method; what they come to is to be seen.
    ends = [loss for run in best.values() for _, loss in run.result.validation[-1:]]
    low, high = min([study.unigram_entropy, *ends]), max([study.unigram_entropy, *ends])
    handles: dict[str, Any] = {}
    for axes, depth in zip(panels, depths, strict=True):
        for (variant, at), run in best.items():
            if at != depth or not run.result.validation:
                continue
            color = plots._COLORS[methods.index(variant.method) % len(plots._COLORS)]
            steps, losses = zip(*run.result.validation, strict=True)
            dashes = _DASHES[variant.parts]
            axes.plot(steps, losses, color=color, linestyle=dashes, linewidth=1.6)
            if run.result.status != FINISHED:
                axes.plot(steps[-1:], losses[-1:], "X", color=color, markersize=8)
            handles[variant.method] = Line2D([], [], color=color, linewidth=1.6)
        level = axes.axhline(
            study.unigram_entropy, color=plots._SOFT, linestyle=(0, (1, 1.6)), linewidth=1.2
        )
        axes.set_ylim(low - _MARGIN * high, high * (1 + 4 * _MARGIN))
        axes.set_title(f"depth {depth}", loc="left", fontsize=11, color=plots._INK)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.margins(x=0.02)
    for parts in dict.fromkeys(variant.parts for variant in _variants(study)):
        handles[parts] = Line2D([], [], color=plots._INK, linestyle=_DASHES[parts])
    handles["byte frequencies"] = level
    plots._legend(figure, handles, None)
    return figure
