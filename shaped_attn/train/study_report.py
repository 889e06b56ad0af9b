"""A table of the depth study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .study import Study, StudyRun

if TYPE_CHECKING:
    from rich.table import Table


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
    for variant in dict.fromkeys(run.variant for run in study.runs):
        cells = [_cell(best.get((variant, depth)), len(rates) > 1) for depth in depths]
        drawn.add_row(variant.method, variant.parts, *cells)
    return drawn


def _cell(run: StudyRun | None, shows_rate: bool) -> str:
    if run is None:
        return "-"
    if run.final_loss is None:
        return "diverged"  # at every learning rate
    text = f"{run.final_loss:.3f}"
    return f"{text} at {_short(run.learning_rate)}" if shows_rate else text


def _short(rate: float) -> str:
    """Return the shorter of 0.0003 and 3e-4."""
    digits, exponent = f"{rate:.15e}".split("e")
    scientific = f"{float(digits):g}e{int(exponent)}"
    return min(f"{rate:g}", scientific, key=len)
