"""What `pytest bench` measured, read and judged: its JSON files are those of pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Gate(NamedTuple):
    """A bound on one ratio, asked of every entry that `applies` says.

    Speeds are relative and larger is better; memory is relative and smaller is better.
    """

    name: str
    ratio: str
    bound: float
    applies: Callable[[Mapping[str, Any]], bool]

    def is_met(self, value: float) -> bool:
        """Whether the ratio is on the right side."""
        return value <= self.bound if self.ratio == "memory_vs_cudnn" else value >= self.bound


def _is_long(entry: Mapping[str, Any]) -> bool:
    return entry["length"] >= 4096


def _is_short(entry: Mapping[str, Any]) -> bool:
    return entry["length"] <= 1024


def _gate(which: str, ratio: str, bound: float, applies=lambda entry: True) -> Gate:
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
