"""Errors of the centred term over the size of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ..checks import fail
from . import style

if TYPE_CHECKING:
    from ..fidelity import FidelityReport

_NAMES = {"triton": "Triton kernels", "torch": "torch implementation", "reference": "reference"}
_COMPOSED = 1  # the colour's index: the same, however many implementations there are


def plot_centred_error(report: FidelityReport, *, title: str | None = None) -> Figure:
    """Draw the error of the centred term over the standard deviation of the logits.

    One panel for each dtype, on logarithmic axes; one line for each implementation, and one for
    softmax attention minus a mean, composed in that dtype. The dotted line is the largest budget.
    Inputs are those of the regime "plain".

    Args:
        report: as `shaped_attn.fidelity.measure` returns it.
        title: stands above the figure. Default none.

    Raises:
        ValueError: nothing of this was measured.
    """
    from ..fidelity import CENTRED

    rows = [m for m in report.measurements if (m.quantity, m.regime) == (CENTRED, "plain")]
    if not rows:
        rule = f'must have the {CENTRED} in the regime "plain"'
        got = f"{len(report.measurements)} other measurements"
        fail(ValueError, "report", rule, got, "Measure it with fidelity.measure.")
    dtypes = list(dict.fromkeys(m.dtype for m in rows))
    impls = list(dict.fromkeys(m.impl for m in rows))
    figure, panels = style.figure(len(dtypes), title)
    handles: dict[str, Any] = {}
    for axes, dtype in zip(panels, dtypes, strict=True):
        of_dtype = [m for m in rows if m.dtype == dtype]
        for index, impl in enumerate(impls):
            found = [m for m in of_dtype if m.impl == impl]
            stds = [m.logit_std for m in found]
            color = index if index < _COMPOSED else index + 1
            handles[_NAMES[impl]] = _draw(axes, stds, [m.error for m in found], color)
        # They differ between implementations in the length of the inputs alone.
        composed = [m.composed_error for m in found]
        handles["softmax minus mean, composed"] = _draw(axes, stds, composed, _COMPOSED)
        budget = max(m.budget for m in of_dtype)
        handles["budget"] = axes.axhline(budget, color=style.SOFT, **style.DOTTED)
        axes.set(xscale="log", yscale="log")
        for which in "xy":
            style.tick_log_axis(axes, which)
        axes.set_xlabel("standard deviation of the logits")
        axes.set_ylabel("error of the centred term")
        if len(dtypes) > 1:
            axes.set_title(dtype, loc="left", fontsize=11, color=style.INK)
    style.legend(figure, handles)
    return figure


def _draw(axes: Any, stds: list[float], errors: list[float | None], color: int) -> Any:
    look = {"color": style.color(color), "marker": style.marker(color), "markersize": 4.5}
    (line,) = axes.plot(stds, errors, linewidth=1.8, **look)
    return line
