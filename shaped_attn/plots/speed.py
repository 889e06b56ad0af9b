"""Speed of the operator and its peers over the length of the sequences."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..checks import fail
from ..speed import PASSES, Entry, Report, is_main, kind_of
from . import style


def plot_speed(report: Report) -> Figure:
    """Draw TFLOP/s over T, ours and the peers': a panel for each pass, head dimension and mask.

    It shows the whole formula with fixed gains. More is better.

    Raises:
        ValueError: the report has no such entry.
    """
    entries = [entry for entry in report.attention if is_main(entry)]
    if not entries:
        rule = "must have entries of the whole formula with fixed gains"
        remedy = "Run `pytest bench/bench_attention.py`."
        fail(ValueError, "report", rule, f"{len(report.entries)} others", remedy)
    found = {(entry["pass"], *kind_of(entry)) for entry in entries}
    panels = sorted(found, key=lambda panel: (PASSES.index(panel[0]), *panel[1:]))
    figure, axes_of = style.figure(len(panels), report.describe(), size=(4.2, 3.2))
    series = [_speeds(entry) for entry in entries]
    names = dict.fromkeys(["shaped_attn", *(name for found in series for name in found)])
    styles = {name: (style.color(index), style.marker(index)) for index, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for axes, panel in zip(axes_of, panels, strict=True):
        shown = [entry for entry in entries if (entry["pass"], *kind_of(entry)) == panel]
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
