"""Scripts for a GPU say what they need where there is none, and leave nothing behind."""

import pytest
from fresh_python import python
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
    hidden = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PATH"), "")
    options = ["--output", str(tmp_path / "output")] if "sanitize" not in script else []
    said = python(ROOT / script, *options, status=2, TRITON_INTERPRET=None, **hidden)
    assert [part for part in parts if part not in said] == []
    assert not list(tmp_path.iterdir())
