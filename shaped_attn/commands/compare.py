"""The command ``shaped-attn compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..sde import prediction
from ..sde.comparison import Comparison
from ..sde.prediction import NetworkComparison, Settings
from ..sde.sample import Estimate
from .common import empty_table, long_work, usage_errors
from .predict import Outcome, count_of, format_estimate, format_number, from_settings

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

_MOST_ROWS = 21  # what 6 tokens have


@click.command(short_help="Run networks beside the prediction.")
@from_settings("band", "tune")
def compare(settings: Settings, device: torch.device) -> Outcome:
    """Run networks of finite width beside the prediction, and compare the two at the last layer.

    Every correlation and variance gets a Kolmogorov-Smirnov test; together they find a difference
    between equal laws in 1 % of all runs. The exit code is 1 if they find one. Ctrl-C prints what
    there is; the exit code is then 130.
    """
    with usage_errors():
        prediction.check_comparison(settings)
    with long_work(device) as work:
        result = prediction.compare_networks(settings, device=device, **work)
    samples = {"SDE": result.prediction}
    if result.networks is not None:
        samples[f"{settings.against}s"] = result.networks
    return Outcome(result, samples, _print_comparison, code=0 if result.agrees else 1)


def _print_comparison(result: NetworkComparison, console: Console) -> None:
    settings, comparison = result.settings, result.comparison
    networks = "no" if result.networks is None else count_of(result.networks)
    console.print(
        f"[bold]Comparison[/] at depth {settings.depth}, width {settings.width} (depth / width "
        f"{settings.time:.4g}): {count_of(result.prediction)} paths of the SDE, {networks} "
        f"{settings.against}s",
        soft_wrap=True,
    )
    if comparison is not None:
        console.print()
        console.print(_comparison_table(comparison, settings.against))
        console.print()
        for name, pair in (("Stopped", comparison.stopped), ("Blow-up", comparison.exploded)):
            console.print(
                f"{name:7}  SDE {format_estimate(pair.first)}, {settings.against}s "
                f"{format_estimate(pair.second)}"
            )
        largest = comparison.largest
        if not comparison.can_disagree:
            verdict = "Too few to tell: no KS distance can exceed its critical value."
        elif comparison.agrees:
            verdict = (
                "[green]Agree[/]: no KS distance exceeds its critical value; "
                f"{largest.name} comes nearest, {largest.ratio:.2f} of it."
            )
        else:
            verdict = (
                f"[bold red]Disagree[/]: {largest.name} most, {largest.ratio:.2f} times its "
                "critical value."
            )
        console.print(verdict, soft_wrap=True)


def _comparison_table(comparison: Comparison, against: str) -> Table:
    """KS distance and medians of every statistic, or of those with the largest distance."""
    from rich.text import Text

    found = list(comparison.statistics.values())
    title = None
    if len(found) > _MOST_ROWS:
        title = f"The {_MOST_ROWS} of {len(found)} statistics with the largest KS distance"
        found = sorted(found, key=lambda statistic: statistic.ks, reverse=True)[:_MOST_ROWS]
    columns = ("", "KS", "critical", "median SDE", f"median {against}s", "")
    drawn = empty_table(*columns, words=(0, 5), title=title)
    median = comparison.quantile_levels.index(0.5)
    for statistic in found:
        medians = [
            format_estimate(Estimate(values[median], errors[median]))
            for values, errors in zip(statistic.quantiles, statistic.quantile_errors, strict=True)
        ]
        drawn.add_row(
            statistic.name,
            format_number(statistic.ks),
            format_number(statistic.critical),
            *medians,
            Text("ok", style="green") if statistic.agrees else Text("differs", style="bold red"),
        )
    return drawn
