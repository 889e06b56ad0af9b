"""The command ``shaped-attn``: ``check``, ``demo`` and ``env``.

Exit codes: 0 done, 1 a check exceeded its budget or the command failed, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .fidelity import FidelityReport, Table

IMPLS = ("triton", "torch", "reference")
INTERRUPTED = 130

# Whether this process is the command, and not a program that calls it.
_is_program = False


def main() -> None:
    """Entry point of the console script and of ``python -m shaped_attn``."""
    global _is_program
    _is_program = True
    try:
        code = cli.main(prog_name="shaped-attn", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shaped-attn")
def cli() -> None:
    """Shaped attention: identity + softmax - mean, in one fused pass."""


_device_option = click.option(
    "--device",
    default=None,
    help="torch device, such as cpu or cuda:0.  [default: cuda if present]",
)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print what a bug report needs."""
    from . import environment

    collected = environment.collect()
    if as_json:
        click.echo(json.dumps(collected, indent=1))
        return
    pairs = environment.lines(collected)
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        click.echo(f"{name:{width}}  {text}")


@cli.command(short_help="Measure errors against float64, beside their budgets.")
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(IMPLS),
    help="Implementation to check; may be repeated.  [default: triton, on a CPU torch and triton]",
)
@_device_option
@click.option(
    "--length",
    type=click.IntRange(min=16),
    help="Sequence length.  [default: 512; 128 under Triton's interpreter]",
)
@click.option("--quick", is_flag=True, help="Four logit scales, and inputs without mean or sink.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    context: click.Context,
    impls: tuple[str, ...],
    device: str | None,
    length: int | None,
    quick: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Measure relative errors against float64, and compare them with their budgets.

    Each quantity has the error of shaped_attn and, below it, that of composing torch's softmax
    attention with a mean in the same dtype. The exit code is 1 if an error exceeds its budget.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from . import fidelity

    torch_device = _resolve_device(device)
    impls = impls or _default_impls(torch_device)
    _prepare_kernels(impls, torch_device)
    options: dict[str, Any] = {"device": torch_device, "length": length, "seed": seed}
    if quick:
        options.update(logit_stds=fidelity.QUICK_LOGIT_STDS, regimes=("plain",))
    with Progress(
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=None)
        report = fidelity.measure(
            impls,
            **options,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_LEGEND)
        for table in fidelity.tables(report):
            console.print(_render(table, torch_device))
        _print_summary(report, console)
    context.exit(1 if report.failures else 0)


@cli.command(short_help="Check, train on Python's own source, write a page.")
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
@_device_option
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
    """Check the operator, train with it on Python's own source, and write a page about it.

    Two byte-level decoders are trained side by side, one with shaped and one with plain softmax
    attention. Ctrl-C during training writes the page with what there is; the exit code is then 130.
    It is 1 if the check exceeded a budget.
    """
    from dataclasses import replace

    from rich.console import Console

    from . import fidelity
    from .demo import run as demo_run

    torch_device = _resolve_device(device)
    impls = _default_impls(torch_device)
    _prepare_kernels(impls, torch_device)
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
        console.print(_render(table, torch_device, quantities=(fidelity.CENTRED, fidelity.OUTPUT)))
    _print_summary(result.fidelity, console)
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


def _resolve_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.BadParameter(
            f"{name!r} is not a device of this machine ({reason})", param_hint="--device"
        ) from error
    return device


def _default_impls(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("triton",)
    from importlib.util import find_spec

    # Where Triton is not to be had, such as macOS, the torch implementation is all there is.
    return ("torch", "triton") if device.type == "cpu" and find_spec("triton") else ("torch",)


def _prepare_kernels(impls: tuple[str, ...], device: torch.device) -> None:
    """See to it that the Triton kernels run if they are asked for, or say why they do not."""
    if "triton" not in impls:
        return
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        # Triton reads it as it defines functions, its own among them, and torch may import Triton.
        if "triton" in sys.modules and _is_program:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # NumPy complains about infinities in masked lanes, which the kernels then discard.
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )
    from .environment import kernel_availability

    kernels = kernel_availability()
    if not kernels["available"]:
        raise click.UsageError(f"--impl triton cannot run here: {kernels['reason']}")


_LEGEND = (
    "Relative error against float64 by standard deviation of the logits; below it, dim, that of\n"
    "composing torch's softmax attention and a mean in the same dtype. Last column: share of the\n"
    "error budget. Causal; the inputs are plain, have a mean, or a key that draws all weight."
)


def _render(table: Table, device: torch.device, quantities: tuple[str, ...] | None = None):
    """One fidelity table for the terminal: an error and, below it, the composition's.

    The last column is the largest share of its budget that an error of the row takes up.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    from . import fidelity

    where = "interpreter" if table.impl == "triton" and device.type == "cpu" else device
    drawn = RichTable(
        title=f"\n{table.impl} ({where}), {table.dtype}, T = {table.length}, {table.regime}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    drawn.add_column("logit std", no_wrap=True)
    for logit_std in table.logit_stds:
        drawn.add_column(f"{logit_std:g}", justify="right", no_wrap=True)
    drawn.add_column("used", justify="right", no_wrap=True)
    for quantity, row in table.rows:
        if quantities is not None and quantity not in quantities:
            continue
        errors = [
            Text(fidelity.format_error(m.error), style="" if m.is_within else "bold red")
            for m in row
        ]
        used = max(m.error / m.budget for m in row)
        is_within = all(m.is_within for m in row)
        drawn.add_row(
            fidelity.label(quantity),
            *errors,
            Text(f"{used:.0%}", style="green" if is_within else "bold red"),
        )
        composed = (fidelity.format_error(m.composed_error) for m in row)
        drawn.add_row("  composed", *composed, "", style="dim")
    return drawn


def _print_summary(report: FidelityReport, console: Console) -> None:
    count, failures = len(report.measurements), report.failures
    if not failures:
        console.print(f"All {count} errors are within their budget ({report.seconds:.0f} s).")
        return
    console.print(f"[bold red]{len(failures)} of {count} errors exceed their budget:[/]")
    for m in failures:
        console.print(
            f"  {m.impl} {m.dtype} {m.regime}, logit std {m.logit_std:g}, {m.quantity}: "
            f"{m.error:.2e} > {m.budget:.2e}"
        )
