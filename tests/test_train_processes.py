import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shaped_attn.train import metrics

ROOT = Path(__file__).parents[1]
TINY = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "context": 16,
    "data": argparse.__file__,
    "data-bytes": 50_000,
    "steps": 8,
    "batch-size": 4,
    "evaluate-every": 4,
    "evaluation-windows": 6,
    "checkpoint-every": 4,
}


def train(output, processes, accumulation=1):
    """Run the command in processes of its own."""
    flags = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "shaped_attn", "train", *flags),
            *("--accumulation", str(accumulation), "--output", str(output), "--device", "cpu"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Finished after 8 steps") == 1
    assert json.loads((output / "run.json").read_text())["processes"] == processes
    return metrics.read(output / "metrics.jsonl")


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """Each has half of every batch, and gradients are averaged."""
    one = train(tmp_path / "one", 1)
    two = train(tmp_path / "two", 2, accumulation=2)
    assert [(line["kind"], line["step"]) for line in two] == [
        (line["kind"], line["step"]) for line in one
    ]
    # Sums of float32 in another order, carried through 8 steps of Adam.
    for name in ("loss", "gradient_norm"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (two, one))
        assert found == pytest.approx(expected, rel=1e-4)
