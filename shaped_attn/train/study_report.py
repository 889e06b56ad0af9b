"""A table and a figure of the depth study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from .. import plots
from .study import Study, StudyRun, Variant
from .trainer import FINISHED

if TYPE_CHECKING:
    from rich.table import Table

_MARGIN = 0.05  # of the range of the losses, above and below it


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
    if run.result.status != FINISHED:
        return "diverged"  # at every learning rate
    text = f"{run.result.loss:.3f}"
    return f"{text} at {_short(run.learning_rate)}" if shows_rate else text


def _short(rate: float) -> str:
    """Return the shorter of 0.0003 and 3e-4."""
    digits, exponent = f"{rate:.15e}".split("e")
    scientific = f"{float(digits):g}e{int(exponent)}"
    return min(f"{rate:g}", scientific, key=len)


def _variants(study: Study) -> list[Variant]:
    return list(dict.fromkeys(run.variant for run in study.runs))


def plot(study: Study) -> Figure:
    """Draw the final validation loss over depth, one panel for each choice of skips and norm.

    Of several learning rates the one with the lowest final loss is drawn. A cross at the upper edge
    is a run that diverged; the dotted line is what byte frequencies alone give.
    """
    best = study.best()
    depths = sorted({depth for _, depth in best})
    methods = list(dict.fromkeys(variant.method for variant in _variants(study)))
    wirings = list(dict.fromkeys(variant.parts for variant in _variants(study)))
    losses = [run.result.loss for run in best.values() if run.result.status == FINISHED]
    low, high = min([study.unigram_entropy, *losses]), max([study.unigram_entropy, *losses])
    margin = _MARGIN * max(high - low, 0.1)
    figure, panels = plots._figure(len(wirings), None)
    handles: dict[str, Any] = {}
    for axes, parts in zip(panels, wirings, strict=True):
        axes.set_ylim(low - margin, high + 2 * margin)
        for index, method in enumerate(methods):
            found = [
                run
                for (variant, _), run in best.items()
                if (variant.method, variant.parts) == (method, parts)
            ]
            if not found:
                continue
            color = plots._COLORS[index % len(plots._COLORS)]
            ended = sorted(
                (run.depth, run.result.loss) for run in found if run.result.status == FINISHED
            )
            (line,) = axes.plot(*zip(*ended, strict=True) if ended else ([], []), "o-", color=color)
            line.set(linewidth=1.6, markersize=4)
            handles.setdefault(method, line)
            for run in found:
                if run.result.status != FINISHED:
                    axes.plot(run.depth, high + margin, "X", color=color, markersize=8)
        level = axes.axhline(
            study.unigram_entropy, color=plots._SOFT, linestyle=(0, (1, 1.6)), linewidth=1.2
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.08)
        axes.set_title(parts, loc="left", fontsize=11, color=plots._INK)
        axes.set_xlabel("depth")
        axes.set_ylabel("validation loss (nats per byte)")
    handles["byte frequencies"] = level
    plots._legend(figure, handles, None)
    return figure
