"""Scripts for a GPU say what they need where there is none, and leave nothing behind."""

import os
import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("bench/sweep.py", ["sm_80", "gfx942", "lacks a GPU that torch", "`--compile-only 90`"]),
        ("tests/run_on_gpu.py", ["sm_80", "gfx942", "lacks a GPU that torch sees", "`make test`"]),
        ("tests/sanitize.py", ["compute-sanitizer on PATH", "a GPU that torch sees", "emulator"]),
    ],
)
def test_it_says_what_it_needs(script, parts, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PATH")}
    options = ["--output", str(tmp_path / "output")] if "sanitize" not in script else []
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.iterdir())
