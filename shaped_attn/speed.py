"""What `pytest bench` measured, read and judged.

Its JSON files are those of pytest-benchmark. What is used of an entry is its ``extra_info``: a case
and a pass, times by name, those of the operator as "ours" ("ours-" and a name: of one family of
its kernels), and ratios of medians. Speeds are relative to another candidate's, so that larger is
better; memory is relative too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checks import fail

PASSES = ("forward", "backward", "forward+backward")

Entry = Mapping[str, Any]


class Gate(NamedTuple):
    """A bound on one ratio, asked of one pass at the lengths from `shortest` to `longest`."""

    which: str
    ratio: str
    bound: float
    shortest: float = 0
    longest: float = math.inf

    @property
    def name(self) -> str:
        """What it is a bound on."""
        return f"{self.which}: {_RATIOS[self.ratio]}"

    def applies(self, entry: Entry) -> bool:
        """Whether it is asked of an entry."""
        if entry.get("set") != "gates" or self.ratio not in entry or entry["pass"] != self.which:
            return False
        return self.shortest <= entry["length"] <= self.longest

    def is_met(self, value: float) -> bool:
        """Whether the ratio is on the right side."""
        return value <= self.bound if self.ratio == "memory_vs_cudnn" else value >= self.bound


_RATIOS = {
    "speed_vs_plain": "speed relative to the fastest plain peer",
    "speed_vs_composition": "speed relative to the composition",
    "memory_vs_cudnn": "peak memory relative to cuDNN's",
}

GATES = (
    Gate("forward", "speed_vs_plain", 0.75, shortest=4096),
    Gate("backward", "speed_vs_plain", 0.7, shortest=4096),
    Gate("forward+backward", "speed_vs_composition", 1.0, shortest=4096),
    Gate("forward+backward", "speed_vs_composition", 1.3, longest=1024),
    Gate("forward+backward", "memory_vs_cudnn", 1.05),
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
        if gate.applies(entry)
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


def is_main(entry: Entry) -> bool:
    """Whether it is of the whole formula in its most common form."""
    has_groups = entry["heads"] != entry["kv_heads"]
    return entry["form"] == "fixed" and not has_groups and entry["dtype"] != "float16"


def kind_of(entry: Entry) -> tuple[int, str]:
    """Return head dimension and mask."""
    return entry["head_dim"], "causal" if entry["is_causal"] else "full"
