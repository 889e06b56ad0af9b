"""The command ``shaped-attn demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from .check import print_summary, render
from .common import INTERRUPTED, default_impls, device_option, prepare_kernels, resolve_device


@click.command(short_help="Check, train on Python's own source, write a page.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("shaped-attn-demo"),
    show_default=True,
    help="Folder for index.html and metrics.json.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=100.0,
    show_default=True,
    help="Time for training both models; the number of steps follows from it.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), help="Number of steps, instead of a time: reproducible."
)
@device_option
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of weights, batches, samples."
)
@click.pass_context
def demo(
    context: click.Context,
    output: Path,
    seconds: float,
    steps: int | None,
    device: str | None,
    seed: int,
) -> None:
    """Check the operator, run deep networks, train on Python's own source, and write a page.

    The covariance of tokens over depth is predicted, and measured in real networks at
    initialisation. Two byte-level decoders are then trained side by side, one with shaped and one
    with plain softmax attention. Ctrl-C during either writes the page with what there is; the exit
    code is then 130. It is 1 if the check exceeded a budget.
    """
    from dataclasses import replace

    from rich.console import Console

    from .. import fidelity
    from ..demo import run as demo_run

    torch_device = resolve_device(device)
    impls = default_impls(torch_device)
    prepare_kernels(impls, torch_device)
    model, training = demo_run.preset(torch_device)
    console = Console(highlight=False)
    settings = demo_run.Settings(
        output=output,
        device=torch_device,
        command=shlex.join(["shaped-attn", *sys.argv[1:]]),
        check_impls=impls,
        seconds=seconds,
        steps=steps,
        model=model,
        training=replace(training, seed=seed),
    )
    try:
        result = demo_run.run(settings, console)
    except OSError as error:
        raise click.ClickException(str(error)) from error

    for table in fidelity.tables(result.fidelity):
        console.print(render(table, torch_device, quantities=(fidelity.CENTRED, fidelity.OUTPUT)))
    print_summary(result.fidelity, console)
    difference, error = result.difference()
    console.print(
        f"\nValidation loss after {result.training.steps} steps: "
        + ", ".join(f"{name} {result.final_loss(name):.4f}" for name in result.training.runs)
        + f"\nshaped minus plain: {difference:+.4f}, windows' standard error {error:.4f}; one seed"
    )
    console.print(f"\nPage: {output / demo_run.PAGE}\nNumbers: {output / demo_run.METRICS}")
    if result.training.stopped == "interrupt":
        console.print(
            f"Interrupted after {result.training.steps} of {result.training.planned_steps} steps; "
            "the "
            "page shows what there is."
        )
        context.exit(INTERRUPTED)
    context.exit(1 if result.fidelity.failures else 0)
