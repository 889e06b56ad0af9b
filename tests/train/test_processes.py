import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import flags

from shaped_attn.train import metrics

ROOT = Path(__file__).parents[2]
SHORT = {"steps": 8, "evaluate_every": 4, "warmup_steps": None}


def train(output, processes, accumulation=1):
    """Run the command in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "shaped_attn", "train", "--output", str(output)),
            *("--device", "cpu", *flags(**SHORT, accumulation=accumulation)),
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


def run_together(arguments, processes):
    """Return exit codes and stderr of processes that nobody watches.

    torchrun would end one that waits for one that has failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "shaped_attn", "train", *arguments, "--device", "cpu"],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]


@pytest.mark.slow
def test_all_processes_end_where_the_main_one_finds_no_whole_checkpoint(tmp_path):
    train(tmp_path / "run", 2)
    (tmp_path / "run" / "result.json").unlink()
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-00000004", "step-00000008"):
        (folder / name / "optimizer.bin").write_bytes(b"")
    for code, stderr in run_together([*flags(**SHORT), "--output", str(tmp_path / "run")], 2):
        assert code == 1, stderr
        assert "has no checkpoint that is whole" in " ".join(stderr.split())
        assert "Traceback" not in stderr
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["damaged-step-00000004", "damaged-step-00000008"]


@pytest.mark.slow
def test_a_study_of_two_processes_is_recorded_by_one(tmp_path):
    output = tmp_path / "study"
    study = ("--study", "depth", "--depths", "1,2", "--methods", "e_spa", "--no-normalization")
    options = (
        *flags(**SHORT | {"depth": None, "steps": 2}),
        *study,
        "--no-skip",
        "--output",
        str(output),
    )
    for code, stderr in run_together(options, 2):
        assert code == 0, stderr
    found = json.loads((output / "study.json").read_text())
    assert found["is_complete"]
    assert len(found["runs"]) == 2
    assert not list(output.glob("runs/*/checkpoints"))
