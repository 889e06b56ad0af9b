"""The script behind `make sanitize`, as far as it goes without a GPU."""

import sys

import pytest
import torch
from scripts import ROOT, load_script

from shaped_attn.testing import record_families


@pytest.fixture
def sanitize():
    return load_script(ROOT / "tests/sanitize.py")


def test_the_calls_run_on_the_hopper_kernels(sanitize, hopper, device):
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
