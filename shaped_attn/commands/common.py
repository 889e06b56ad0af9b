"""What commands share: options, errors, the device, kernels, and long work."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from rich.table import Table

INTERRUPTED = 130
"""Exit code of work that Ctrl-C ended."""

FILE = click.Path(dir_okay=False, path_type=Path)
READABLE = click.Path(dir_okay=False, exists=True, path_type=Path)

# Whether this process is the command, and not a program that calls it.
is_program = False

device_option = click.option(
    "--device",
    default=None,
    help="torch device, such as cpu or cuda:0.  [default: cuda if present]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def folder_option(default: str, text: str) -> Callable[[Callable], Callable]:
    """Return the option --output of a command that fills a folder."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("--output", type=kind, default=default, show_default=True, help=text)


def empty_table(
    *columns: str, words: Collection[int] = (0,), is_narrow: bool = True, **style: Any
) -> Table:
    """Return a table for the terminal, to add rows to.

    Args:
        columns: their headers.
        words: which columns are words, which begin at the left, and not numbers.
        is_narrow: whether its cells stay on one line.
        style: further arguments of `rich.table.Table`.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title_justify="left", **style)
    for index, column in enumerate(columns):
        justify = "left" if index in words else "right"
        table.add_column(column, justify=justify, no_wrap=is_narrow, overflow="fold")
    return table


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Show what is wrong with settings as wrong usage."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


def resolve_device(name: str | None) -> torch.device:
    """Return the device of this name; without one a GPU if there is one."""
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


def default_impls(device: torch.device) -> tuple[str, ...]:
    """Return the implementations to check on a device."""
    if device.type == "cuda":
        return ("triton",)
    from importlib.util import find_spec

    # Where Triton is not to be had, such as macOS, the torch implementation is all there is.
    return ("torch", "triton") if device.type == "cpu" and find_spec("triton") else ("torch",)


def prepare_kernels(impls: tuple[str, ...], device: torch.device) -> None:
    """See to it that the Triton kernels run if they are asked for, or say why they do not."""
    if "triton" not in impls:
        return
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        # Triton reads it as it defines functions, its own among them, and torch may import Triton.
        if "triton" in sys.modules and is_program:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # NumPy complains about infinities in masked lanes, which the kernels then discard.
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )
    from ..environment import kernel_availability

    kernels = kernel_availability()
    if not kernels["available"]:
        raise click.UsageError(f"--impl triton cannot run here: {kernels['reason']}")


@contextlib.contextmanager
def long_work(device: torch.device) -> Iterator[dict[str, Any]]:
    """Show progress on stderr and take Ctrl-C for a request, for functions that know of both."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ..interrupt import stop_on_interrupt

    with (
        stop_on_interrupt() as request,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        tasks = {}
        threads = torch.get_num_threads()
        if device.type == "cpu":
            # The matrices are small: threads gain little, and cost much where the CPU is busy.
            torch.set_num_threads(1)

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)

        try:
            yield {"on_progress": on_progress, "stop": lambda: request.is_set}
        finally:
            torch.set_num_threads(threads)
