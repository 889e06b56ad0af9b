"""The command ``shaped-attn bench``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..speed import Entry, Report, is_main, kind_of, load
from .common import READABLE, empty_table, folder_option

if TYPE_CHECKING:
    from rich.table import Table

_PASSES = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}


@click.command(short_help="Time the operator beside its peers.")
@folder_option("shaped-attn-bench", "Folder for speed.json and speed.png.")
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

    code, path = 0, output / "speed.json"
    try:
        if show is None:
            output.mkdir(parents=True, exist_ok=True)
            code = _measure(path, select)
        report = load(show or path)
        console = Console(highlight=False)
        console.print(report.describe(), soft_wrap=True)
        for table in tables(report):
            console.print(table)
        if any(is_main(entry) for entry in report.attention):
            from ..plots import save
            from ..plots.speed import plot_speed

            output.mkdir(parents=True, exist_ok=True)
            console.print(f"\nPlot: {save(plot_speed(report), output / 'speed.png')}")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Numbers: {show or path}")
    context.exit(code)


def _measure(path: Path, select: str | None) -> int:
    """Run `pytest bench` of this checkout and record it in a file; return its exit status.

    Args:
        path: of the JSON file, which a later call continues.
        select: expression that names of cases have to fit, as pytest's ``-k``.

    Raises:
        ValueError: the package is not that of a checkout, or pytest-benchmark is not installed.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "conftest.py").is_file():
        raise ValueError(
            "the benchmark must be run from a clone of the repository, which has it in bench/, got "
            f"a package in {root}. Clone it and install it with pip install -e '.[test]'."
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError(
            "pytest-benchmark must be installed. Install it with pip install -e '.[test]'."
        )
    import torch

    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider"]
    command += ["-k", select] if select else []
    if torch.cuda.is_available():
        # Compilation takes longer than all else, and what is timed must be alone.
        processes = str(min(16, os.cpu_count() or 1))
        subprocess.run([*command, "--compile-only", "-n", processes], cwd=root)
    command += ["--benchmark-quiet", "--record", str(path.resolve())]
    return min(1, subprocess.run(command, cwd=root).returncode)


def tables(report: Report) -> list[Table]:
    """Tables for the terminal: the operator, models and the SDE, gates; as far as there are any."""
    found: list[Table] = []

    def begin(title: str, *columns: str) -> Table:
        style = {"title": f"\n{title}", "title_style": "bold"}
        found.append(empty_table(*columns, is_narrow=False, **style))
        return found[-1]

    if report.attention:
        table = begin(
            "shaped attention; speed relative to the fastest plain peer and to the composition",
            *("case", "pass", "ms", "TFLOP/s", "/ plain", "/ compos.", "memory", "kernels"),
        )
        for entry in report.attention:
            ours = entry["times"]["ours"]
            table.add_row(
                _title(entry),
                _PASSES[entry["pass"]],
                f"{ours['median_ms']:.4g}",
                f"{ours['tflops']:.3g}",
                f"{entry['speed_vs_plain']:.2f}",
                _ratio(entry, "speed_vs_composition"),
                _ratio(entry, "memory_vs_cudnn"),
                entry.get("family") or "-",
            )
    compared = [entry for entry in report.attention if "hopper_vs_portable" in entry]
    if compared:
        table = begin(
            "kernels for Hopper; speed relative to the portable ones, and with sums in any order "
            "relative to a fixed one",
            *("case", "pass", "auto picks", "/ portable", "any order"),
        )
        for entry in compared:
            table.add_row(
                _title(entry),
                _PASSES[entry["pass"]],
                entry["family"],
                _ratio(entry, "hopper_vs_portable"),
                _ratio(entry, "any_order_vs_fixed"),
            )
    if report.others:
        table = begin("models and the covariance SDE", "case", "ms", "peers (ms)")
        for entry in report.others:
            times = {name: f"{x['median_ms']:.4g}" for name, x in entry["times"].items()}
            ours = times.pop("ours")
            table.add_row(entry["case"], ours, ", ".join(map(" ".join, times.items())))
    if report.gates:
        table = begin("gates", "gate", "case", "value", "bound", "")
        for gate in report.gates:
            verdict = "[green]met[/]" if gate["met"] else "[bold red]missed[/]"
            table.add_row(
                gate["gate"], gate["case"], f"{gate['value']:.2f}", f"{gate['bound']:g}", verdict
            )
    return found


def _title(entry: Entry) -> str:
    parts = [entry["form"], f"T {entry['length']}", f"D {entry['head_dim']}", kind_of(entry)[1]]
    parts += ["grouped"] if entry["heads"] != entry["kv_heads"] else []
    parts += ["fp16"] if entry["dtype"] == "float16" else []
    return " ".join(parts)


def _ratio(entry: Entry, name: str) -> str:
    return f"{entry[name]:.2f}" if name in entry else "-"
