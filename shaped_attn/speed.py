"""What `pytest bench` measured, read, judged, tabulated and drawn.

Its JSON files are those of pytest-benchmark. What is used of an entry is its ``extra_info``: a case
and a pass, times by name, those of the operator as "ours" ("ours-" and a name: of one family of
its kernels), and ratios of medians. Speeds are relative to another candidate's, so that larger is
better; memory is relative too.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .checks import fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NOT_MEASURED = "not yet measured"
_SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}
PASSES = tuple(_SHORT)

Entry = Mapping[str, Any]


class Gate(NamedTuple):
    """A bound on one ratio, asked of every entry that `applies` says."""

    name: str
    ratio: str
    bound: float
    applies: Callable[[Entry], bool]

    def is_met(self, value: float) -> bool:
        """Whether the ratio is on the right side."""
        return value <= self.bound if self.ratio == "memory_vs_cudnn" else value >= self.bound


def _is_long(entry: Entry) -> bool:
    return entry["length"] >= 4096


def _is_short(entry: Entry) -> bool:
    return entry["length"] <= 1024


def _gate(which: str, ratio: str, bound: float, applies: Callable = lambda entry: True) -> Gate:
    name = {
        "speed_vs_plain": "speed relative to the fastest plain peer",
        "speed_vs_composition": "speed relative to the composition",
        "memory_vs_cudnn": "peak memory relative to cuDNN's",
    }[ratio]
    return Gate(
        f"{which}: {name}", ratio, bound, lambda entry: entry["pass"] == which and applies(entry)
    )


GATES = (
    _gate("forward", "speed_vs_plain", 0.75, _is_long),
    _gate("backward", "speed_vs_plain", 0.7, _is_long),
    _gate("forward+backward", "speed_vs_composition", 1.0, _is_long),
    _gate("forward+backward", "speed_vs_composition", 1.3, _is_short),
    _gate("forward+backward", "memory_vs_cudnn", 1.05),
)


def gates(benchmarks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Judge the entries of the cases that gates are asked of: each is met or missed."""
    entries = [entry["extra_info"] for entry in benchmarks]
    return [
        {
            "gate": gate.name,
            "case": entry["case"],
            "value": entry[gate.ratio],
            "bound": gate.bound,
            "met": gate.is_met(entry[gate.ratio]),
        }
        for gate in GATES
        for entry in entries
        if entry.get("set") == "gates" and gate.ratio in entry and gate.applies(entry)
    ]


class Report(NamedTuple):
    """What one file has: entries, the machine and the state of the sources."""

    entries: list[Entry]
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    gates: Sequence[Mapping[str, Any]]

    @property
    def attention(self) -> list[Entry]:
        """Entries of the operator itself."""
        return [entry for entry in self.entries if "pass" in entry]

    @property
    def others(self) -> list[Entry]:
        """Entries of models and of the covariance SDE."""
        return [entry for entry in self.entries if "pass" not in entry]

    @property
    def device(self) -> str:
        """Name of the GPU, or of the CPU where there is none."""
        gpus = self.machine.get("gpus")
        return gpus[0]["name"] if gpus else self.machine.get("cpu", "unknown CPU")

    def describe(self) -> str:
        """One line on where, with what and of which commit it was measured."""
        libraries = self.machine.get("libraries", {})
        commit = str(self.commit.get("id", "unknown"))[:7]
        changed = " with changes" if self.commit.get("dirty") else ""
        versions = f"torch {libraries.get('torch')}, Triton {libraries.get('triton')}"
        return f"{self.device}, {versions}, commit {commit}{changed}"


def load(path: Path) -> Report:
    """Read a file that `pytest bench` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry["extra_info"] for entry in found["benchmarks"]]
        judged = gates(found["benchmarks"])
    except (ValueError, KeyError, TypeError) as error:
        fail(
            ValueError,
            str(path),
            "must be a JSON file of `pytest bench`",
            f"{type(error).__name__}: {error}",
            "Write one with --benchmark-json or --record.",
        )
    return Report(entries, found.get("machine_info", {}), found.get("commit_info", {}), judged)


def measure(path: Path, select: str | None = None) -> int:
    """Run `pytest bench` of this checkout and record it in a file; return its exit status.

    Args:
        path: of the JSON file, which a later call continues.
        select: expression that names of cases have to fit, as pytest's ``-k``.

    Raises:
        ValueError: the package is not that of a checkout, or pytest-benchmark is not installed.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "conftest.py").is_file():
        fail(
            ValueError,
            "the benchmark",
            "must be run from a clone of the repository, which has it in bench/",
            f"a package in {root}",
            "Clone the repository and install it with pip install -e '.[test]'.",
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        fail(
            ValueError,
            "pytest-benchmark",
            "must be installed",
            "no such package",
            "Install it with pip install -e '.[test]'.",
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
    from rich.table import Table

    def make(title: str, *columns: str) -> Table:
        table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        return table

    found = []
    if report.attention:
        table = make(
            "shaped attention; speed relative to the fastest plain peer and to the composition",
            *("case", "pass", "ms", "TFLOP/s", "/ plain", "/ compos.", "memory", "kernels"),
        )
        for entry in report.attention:
            ours = entry["times"]["ours"]
            table.add_row(
                _title(entry),
                _SHORT[entry["pass"]],
                f"{ours['median_ms']:.4g}",
                f"{ours['tflops']:.3g}",
                f"{entry['speed_vs_plain']:.2f}",
                _ratio(entry, "speed_vs_composition"),
                _ratio(entry, "memory_vs_cudnn"),
                entry.get("family") or "-",
            )
        found.append(table)
    compared = [entry for entry in report.attention if "hopper_vs_portable" in entry]
    if compared:
        table = make(
            "kernels for Hopper; speed relative to the portable ones, and with sums in any order "
            "relative to a fixed one",
            *("case", "pass", "auto picks", "/ portable", "any order"),
        )
        for entry in compared:
            table.add_row(
                _title(entry),
                _SHORT[entry["pass"]],
                entry["family"],
                _ratio(entry, "hopper_vs_portable"),
                _ratio(entry, "any_order_vs_fixed"),
            )
        found.append(table)
    if report.others:
        table = make("models and the covariance SDE", "case", "ms", "peers (ms)")
        for entry in report.others:
            peers = (
                f"{name} {times['median_ms']:.4g}"
                for name, times in entry["times"].items()
                if name != "ours"
            )
            table.add_row(
                entry["case"], f"{entry['times']['ours']['median_ms']:.4g}", ", ".join(peers)
            )
        found.append(table)
    if report.gates:
        table = make("gates", "gate", "case", "value", "bound", "")
        for gate in report.gates:
            verdict = "[green]met[/]" if gate["met"] else "[bold red]missed[/]"
            table.add_row(
                gate["gate"], gate["case"], f"{gate['value']:.2f}", f"{gate['bound']:g}", verdict
            )
        found.append(table)
    return found


def _title(entry: Entry) -> str:
    parts = [entry["form"], f"T {entry['length']}", f"D {entry['head_dim']}", _kind(entry)[1]]
    parts += ["grouped"] if entry["heads"] != entry["kv_heads"] else []
    parts += ["fp16"] if entry["dtype"] == "float16" else []
    return " ".join(parts)


def _ratio(entry: Entry, name: str) -> str:
    return f"{entry[name]:.2f}" if name in entry else "-"


def can_plot(report: Report) -> bool:
    """Whether there is anything for `plot` to draw."""
    return any(_is_main(entry) for entry in report.attention)


def plot(report: Report) -> Figure:
    """Draw TFLOP/s over T, ours and the peers': a panel for each pass, head dimension and mask.

    It shows the whole formula with fixed gains. More is better.

    Raises:
        ValueError: the report has no such entry.
    """
    from .plots import style

    entries = [entry for entry in report.attention if _is_main(entry)]
    if not entries:
        fail(
            ValueError,
            "report",
            "must have entries of the whole formula with fixed gains",
            f"{len(report.entries)} others",
            "Run `pytest bench/bench_attention.py`.",
        )
    kinds = {_kind(entry): None for entry in entries}
    panels = [
        (which, *kind)
        for which, kind in itertools.product(PASSES, sorted(kinds))
        if any((entry["pass"], *_kind(entry)) == (which, *kind) for entry in entries)
    ]
    figure, axes_of = style.figure(len(panels), report.describe(), size=(4.2, 3.2))
    series = [_speeds(entry) for entry in entries]
    names = dict.fromkeys(["shaped_attn", *(name for found in series for name in found)])
    styles = {name: (style.color(index), style.marker(index)) for index, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for axes, panel in zip(axes_of, panels, strict=True):
        shown = [entry for entry in entries if (entry["pass"], *_kind(entry)) == panel]
        for name, (color, marker) in styles.items():
            points = sorted(
                (entry["length"], speeds[name])
                for entry, speeds in zip(entries, series, strict=True)
                if entry in shown and name in speeds
            )
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), color=color, marker=marker)
                line.set(linewidth=2.2 if name == "shaped_attn" else 1.2, markersize=5)
                handles.setdefault(name, line)
        lengths = sorted({entry["length"] for entry in shown})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        which, head_dim, mask = panel
        axes.set_title(f"{which}, D = {head_dim}, {mask}", loc="left", fontsize=11)
        axes.set_xlabel("T")
        axes.set_ylabel("TFLOP/s")
    style.legend(figure, handles)
    return figure


def _speeds(entry: Entry) -> dict[str, float]:
    """TFLOP/s by the name to show; whatever peer is in it, there is one composition."""
    shown = {"ours": "shaped_attn", entry.get("composition"): "composition"}
    return {shown.get(name, name): times["tflops"] for name, times in entry["times"].items()}


def _is_main(entry: Entry) -> bool:
    """Whether it is of the whole formula in its most common form."""
    has_groups = entry["heads"] != entry["kv_heads"]
    return entry["form"] == "fixed" and not has_groups and entry["dtype"] != "float16"


def _kind(entry: Entry) -> tuple[int, str]:
    return entry["head_dim"], "causal" if entry["is_causal"] else "full"


def markdown(
    report: Report | None, lengths: Sequence[int], kinds: Sequence[tuple[int, str]]
) -> str:
    """Two tables of relative speed over T, for head dimensions and masks; gaps say so.

    The first has forward / backward relative to the fastest plain peer, the second forward and
    backward together relative to the composition.
    """
    entries = {
        (entry["pass"], *_kind(entry), entry["length"]): entry
        for entry in report.attention
        if _is_main(entry)
    }

    def cell(ratio: str, passes: Sequence[str], kind: tuple[int, str], length: int) -> str:
        found = [entries.get((which, *kind, length), {}) for which in passes]
        if not all(ratio in entry for entry in found):
            return NOT_MEASURED
        return " / ".join(f"{entry[ratio]:.2f}" for entry in found)

    def table(title: str, ratio: str, passes: Sequence[str]) -> str:
        head = [title, *(f"T = {length}" for length in lengths)]
        rows = [
            [f"D = {kind[0]}, {kind[1]}", *(cell(ratio, passes, kind, t) for t in lengths)]
            for kind in kinds
        ]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    return "\n\n".join(
        (
            table("forward / backward, plain peer = 1", "speed_vs_plain", PASSES[:2]),
            table("forward + backward, composition = 1", "speed_vs_composition", PASSES[2:]),
        )
    )
