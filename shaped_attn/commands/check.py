"""The command ``shaped-attn check``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    import torch
    from rich.console import Console, Group

    from ..fidelity import FidelityReport, Measurement

IMPLS = ("triton", "torch", "reference")
FAMILIES = ("auto", "portable", "hopper")  # those of kernels.families, which imports Triton


@click.command(short_help="Measure errors against float64, beside their budgets.")
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(IMPLS),
    help="Implementation to check; may be repeated.  [default: triton, on a CPU torch and triton]",
)
@common.device_option
@click.option(
    "--length",
    type=click.IntRange(min=16),
    help="Sequence length.  [default: 512; 128 on a CPU]",
)
@click.option("--quick", is_flag=True, help="Fewer logit scales; inputs without mean or sink.")
@click.option(
    "--family",
    type=click.Choice(FAMILIES),
    default="auto",
    envvar="SHAPED_ATTN_FAMILY",
    show_default=True,
    show_envvar=True,
    help="Family of kernels; hopper is checked in calls of every kind that it takes.",
)
@click.option(
    "--watchdog",
    "limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds without a result after which kernels on a GPU hang.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@common.json_option
@click.pass_context
def check(
    context: click.Context,
    impls: tuple[str, ...],
    device: str | None,
    length: int | None,
    quick: bool,
    family: str,
    limit: float,
    seed: int,
    as_json: bool,
) -> None:
    """Measure relative errors against float64, and compare them with their budgets.

    Each quantity has the error of shaped_attn and, below it, that of composing torch's softmax
    attention with a mean in the same dtype. The exit code is 1 if an error exceeds its budget, or
    if a kernel hangs.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    from .. import fidelity, watchdog

    torch_device = common.resolve_device(device)
    if family == "hopper":
        impls = impls or ("triton",)
        if set(impls) != {"triton"}:
            raise click.UsageError(
                f"--family hopper must have --impl triton alone, got {', '.join(impls)}; drop one"
            )
    impls = impls or common.default_impls(torch_device)
    common.prepare_kernels(impls, torch_device)
    options: dict[str, Any] = {"device": torch_device, "seed": seed, "family": family}
    if "triton" in impls:
        with common.usage_errors():
            fidelity.check_family(family, torch_device)
    measure: Callable[..., FidelityReport] = fidelity.measure
    if family == "hopper":
        measure = fidelity.measure_calls
        calls = fidelity.hopper_calls() if length is None else fidelity.hopper_calls(length)
        options["calls"] = calls
        if quick:
            options["logit_stds"] = fidelity.QUICK_CALL_LOGIT_STDS
    else:
        options |= {"impls": impls, "length": length}
        if quick:
            options |= {"logit_stds": fidelity.QUICK_LOGIT_STDS, "regimes": ("plain",)}
    if _may_hang(impls, torch_device):
        options["run"] = partial(watchdog.run, processes=_processes(), limit=limit)
    with Progress(
        "measuring",
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=None)
        try:
            report = measure(
                **options,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except watchdog.HangError as error:
            beside = f" (beside it ran: {'; '.join(error.beside)})" if error.beside else ""
            raise click.ClickException(
                f"no report in {error.seconds:g} s from: {error.late}{beside}. Its kernel hangs, "
                "or takes longer to compile, for which there is --watchdog. To do without the "
                "kernels for Hopper, set the environment variable SHAPED_ATTN_FAMILY=portable."
            ) from error
        except watchdog.JobError as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_CALLS_LEGEND if family == "hopper" else _LEGEND)
        for table in fidelity.tables(report):
            console.print(_render(table, torch_device))
        _print_summary(report, console)
    context.exit(1 if report.failures else 0)


def _may_hang(impls: tuple[str, ...], device: torch.device) -> bool:
    """Whether kernels run that no signal interrupts."""
    return "triton" in impls and device.type != "cpu"


def _processes() -> int:
    """How many processes compile kernels side by side and share the GPU."""
    return min(8, os.cpu_count() or 1)


_LEGEND = (
    "Relative error against float64 by standard deviation of the logits; below it, dim, that of\n"
    "composing torch's softmax attention and a mean in the same dtype. Last column: share of the\n"
    "error budget. Causal; the inputs are plain, have a mean, or a key that draws all weight."
)

_CALLS_LEGEND = (
    "Relative error against float64 by standard deviation of the logits; below it, dim, that of\n"
    "eager torch in the same dtype. Last column: share of the error budget. Bits repeated: how\n"
    "many results were not equal bit for bit when the call was made again."
)


def _render(rows: list[list[Measurement]], device: torch.device) -> Group:
    """One fidelity table for the terminal: an error and, below it, the composition's.

    The last column is the largest share of its budget that an error of the row takes up.
    """
    from rich.console import Group
    from rich.text import Text

    from .. import fidelity

    first = rows[0][0]
    where = "interpreter" if first.impl == "triton" and device.type == "cpu" else device
    kernels = "" if first.family is None else f", {first.family} kernels"
    # A title of the table itself would be wrapped at the table's width.
    title = f"{first.impl} ({where}), {first.dtype}, T = {first.length}, {first.regime}{kernels}"
    drawn = common.empty_table("logit std", *(f"{m.logit_std:g}" for m in rows[0]), "used")
    for row in rows:
        errors = [
            Text(fidelity.format_error(m.error), style="" if m.is_within else "bold red")
            for m in row
        ]
        used = max(m.used for m in row)
        is_within = all(m.is_within for m in row)
        drawn.add_row(
            fidelity.label(row[0].quantity),
            *errors,
            Text(f"{used:.0%}", style="green" if is_within else "bold red"),
        )
        composed = [m.composed_error for m in row if m.composed_error is not None]
        if composed:
            drawn.add_row("  composed", *map(fidelity.format_error, composed), "", style="dim")
    return Group(Text(f"\n{title}", style="bold"), drawn)


def _print_summary(report: FidelityReport, console: Console) -> None:
    """Say whether all errors are within their budget, and which are not."""
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
