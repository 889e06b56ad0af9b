"""The command ``shaped-attn bench``."""

from __future__ import annotations

from pathlib import Path

import click

from .common import READABLE


@click.command(short_help="Time the operator beside its peers.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("shaped-attn-bench"),
    show_default=True,
    help="Folder for speed.json and speed.png.",
)
@click.option("--select", metavar="EXPRESSION", help="Only cases whose names fit, as pytest's -k.")
@click.option(
    "--show", type=READABLE, help="Show this result of `pytest bench` instead; measure nothing."
)
@click.pass_context
def bench(context: click.Context, output: Path, select: str | None, show: Path | None) -> None:
    """Time the operator, models and the covariance SDE beside their peers.

    Each is checked against float64 first. On a GPU this takes about 4 minutes, on a CPU, where all
    is small, 2. It needs a clone of the repository and the extra `test`. Interrupted, it goes on
    with the next call. The exit code is 1 if anything was wrong.
    """
    from rich.console import Console

    from .. import plots, speed

    code, path = 0, output / "speed.json"
    try:
        if show is None:
            output.mkdir(parents=True, exist_ok=True)
            code = speed.measure(path, select)
        report = speed.load(show or path)
        console = Console(highlight=False)
        console.print(report.describe(), soft_wrap=True)
        for table in speed.tables(report):
            console.print(table)
        if speed.can_plot(report):
            output.mkdir(parents=True, exist_ok=True)
            console.print(f"\nPlot: {plots.save(speed.plot(report), output / 'speed.png')}")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Numbers: {show or path}")
    context.exit(code)
