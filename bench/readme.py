"""Write the tables and the figure of speed into README.md, from the committed results.

Run ``python bench/readme.py`` after a result has changed. What lies between two marks is replaced;
a device without a result, and every case that it lacks, is `not yet measured`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shaped_attn import speed
from shaped_attn.plots import save
from shaped_attn.plots.speed import plot_speed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench/results")
KINDS = ((64, "causal"), (64, "full"), (128, "causal"), (128, "full"))
LENGTHS = {"gpu": (512, 1024, 4096, 16384), "cpu": (1024, 2048, 4096)}
NOT_MEASURED = "not yet measured"
FIGURE = ".png"  # an SVG has other identifiers every time


def results(root: Path) -> list[Path]:
    """The files of all devices, each with its figure beside it."""
    return sorted((root / RESULTS).glob("*/speed.json"))


def section(root: Path, name: str) -> str:
    """What stands between the marks of "cpu" or "gpu"."""
    files = [path for path in results(root) if (path.parent.name == "cpu") == (name == "cpu")]
    kinds = KINDS[:2] if name == "cpu" else KINDS
    if not files:
        return f"{NOT_MEASURED.capitalize()}."
    parts = []
    for path in files:
        report = speed.load(path)
        figure = path.with_suffix(FIGURE).relative_to(root)
        parts += [
            f"{report.describe()} ([all numbers]({path.relative_to(root)})):",
            markdown(report, LENGTHS[name], kinds),
            f"![TFLOP/s over T on {report.device}]({figure})",
        ]
        if report.gates:
            met = sum(gate["met"] for gate in report.gates)
            parts.insert(-1, f"Of {len(report.gates)} bounds that `make gpu` asks, {met} are met.")
    return "\n\n".join(parts)


def markdown(
    report: speed.Report, lengths: Sequence[int], kinds: Sequence[tuple[int, str]]
) -> str:
    """Two tables of relative speed over T, for head dimensions and masks; gaps say so.

    The first has forward / backward relative to the fastest plain peer, the second forward and
    backward together relative to the composition.
    """
    entries = {
        (entry["pass"], *speed.kind_of(entry), entry["length"]): entry
        for entry in report.attention
        if speed.is_main(entry)
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
            table("forward / backward, plain peer = 1", "speed_vs_plain", speed.PASSES[:2]),
            table("forward + backward, composition = 1", "speed_vs_composition", speed.PASSES[2:]),
        )
    )


def update(root: Path) -> None:
    """Replace the sections of README.md, and draw the figures."""
    for path in results(root):
        save(plot_speed(speed.load(path)), path.with_suffix(FIGURE))
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    for name in LENGTHS:
        begin, end = f"<!-- speed of the {name}: python bench/readme.py -->\n", "<!-- end -->"
        found = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", text, re.DOTALL)
        if found is None:
            raise ValueError(f"{path} must have the marks {begin!r} and {end!r}. Put them back.")
        text = f"{text[: found.start()]}{begin}\n{section(root, name)}\n\n{text[found.end(1) :]}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update(ROOT)
