"""The script behind `make sanitize`, as far as it goes without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "sanitize.py"


@pytest.fixture
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    for part in ("compute-sanitizer on PATH", "a GPU that torch sees", "emulator"):
        assert part in done.stderr


def test_the_calls_run_on_the_hopper_kernels(sanitize, hopper, device):
    from shaped_attn.testing import record_families

    with hopper(), record_families() as ran:
        assert sanitize.calls(device.type, (7, 70)) == 12
    assert ran == {"hopper"}


@pytest.mark.parametrize("finds", ["memcheck", "synccheck", "nothing"])
def test_what_a_tool_finds_is_the_exit_code(finds, sanitize, tmp_path, monkeypatch, capfd):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\n[ "$2" != {finds} ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "calls.py").touch()
    monkeypatch.setattr(sanitize, "__file__", str(tmp_path / "calls.py"))
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == (finds != "nothing")
    said = capfd.readouterr().out
    for name in sanitize.TOOLS:
        assert f"--tool {name} --error-exitcode 1" in said
