"""Final losses of the depth study over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from . import style

if TYPE_CHECKING:
    from ..train.study import Study

_MARGIN = 0.05  # of the range of the losses, above and below it


def plot_study(study: Study) -> Figure:
    """Draw the final validation loss over depth, one panel for each choice of skips and norm.

    Of several learning rates the one with the lowest final loss is drawn. A cross at the upper edge
    is a run that diverged; the dotted line is what byte frequencies alone give.
    """
    best = study.best()
    depths = sorted({depth for _, depth in best})
    methods = list(dict.fromkeys(run.variant.method for run in study.runs))
    wirings = list(dict.fromkeys(run.variant.parts for run in study.runs))
    losses = [run.final_loss for run in best.values() if run.final_loss is not None]
    low, high = min([study.unigram_entropy, *losses]), max([study.unigram_entropy, *losses])
    margin = _MARGIN * max(high - low, 0.1)
    figure, panels = style.figure(len(wirings))
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
            look = {"color": style.color(index)}
            ended = sorted(
                (run.depth, run.final_loss) for run in found if run.final_loss is not None
            )
            (line,) = axes.plot(*zip(*ended, strict=True) if ended else ([], []), "o-", **look)
            line.set(linewidth=1.6, markersize=4)
            handles.setdefault(method, line)
            for run in found:
                if run.final_loss is None:
                    axes.plot(run.depth, high + margin, "X", markersize=8, **look)
        level = axes.axhline(study.unigram_entropy, color=style.SOFT, **style.DOTTED)
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.08)
        axes.set_title(parts, loc="left", fontsize=11, color=style.INK)
        axes.set_xlabel("depth")
        axes.set_ylabel("validation loss (nats per byte)")
    handles["byte frequencies"] = level
    style.legend(figure, handles)
    return figure
