import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import invoke
from fresh_python import python

from shaped_attn import __version__, commands, environment, fidelity, shaped_attention
from shaped_attn.commands import check, common

ROOT = Path(__file__).parents[2]


def run_module(*args, **options):
    """What `python -m shaped_attn` prints in a process of its own."""
    return python("-m", "shaped_attn", *args, cwd=ROOT, **{"TRITON_INTERPRET": None} | options)


def test_env_says_what_a_bug_report_needs():
    result = invoke("env", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["shaped_attn"] == __version__
    assert found["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "os", "cpu", "driver", "cuda", "triton_interpret"} <= set(found)
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["kernels"]["mode"] in ("gpu", "interpreter", "unavailable")

    text = invoke("env")
    assert text.exit_code == 0
    for name, value in environment.lines(found):
        assert f"{name}  " in text.stdout
        assert value in text.stdout


def test_kernels_are_available_where_the_tests_run_them(device):
    kernels = environment.kernel_availability()
    assert kernels["available"] is True
    assert kernels["mode"] == ("gpu" if device.type == "cuda" else "interpreter")


def test_check_prints_every_quantity_and_succeeds(device):
    result = invoke("check", "--impl", "torch", "--quick", "--length", "24")
    assert result.exit_code == 0, result.output
    for quantity in fidelity.QUANTITIES:
        assert fidelity.label(quantity) in result.stdout
    for dtype in fidelity.DTYPES:
        assert f"torch ({device.type}), {dtype}, T = 24" in result.stdout
    assert "within their budget" in result.stdout


def test_check_prints_json(device):
    result = invoke("check", "--impl", "torch", "--quick", "--length", "24", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    rows = report["measurements"]
    assert len(rows) == 3 * len(fidelity.QUICK_LOGIT_STDS) * len(fidelity.QUANTITIES)
    assert all(row["is_within"] and row["length"] == 24 for row in rows)
    assert report["settings"]["device"] == device.type


def test_check_fails_for_a_wrong_implementation(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.02 * shaped_attention(*args, **kwargs)

    monkeypatch.setitem(fidelity.measure.__kwdefaults__, "attention", wrong)
    result = invoke("check", "--impl", "torch", "--quick", "--length", "24")
    assert result.exit_code == 1
    assert "exceed their budget" in result.stdout
    assert "torch bf16 plain, logit std 0.01, centred term" in result.stdout


def test_check_names_the_family_that_ran(device):
    options = {"device": device, "length": 16, "logit_stds": (1.0,), "regimes": ("sink key",)}
    report = fidelity.measure(["triton"], dtypes=["fp32"], family="portable", **options)
    assert {row["family"] for row in report.to_dict()["measurements"]} == {"portable"}
    assert report.settings["family"] == "portable"
    (table,) = fidelity.tables(report)
    title, _ = check._render(table, device).renderables
    assert title.plain.endswith("fp32, T = 16, sink key, portable kernels")


def test_hopper_kernels_are_refused_before_any_work_where_there_is_no_hopper(device, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("needs a machine without a Hopper GPU")
    monkeypatch.setattr(fidelity, "measure_calls", None)
    result = invoke("check", "--family", "hopper")
    assert result.exit_code == 2, result.output
    assert "'hopper' needs a GPU of compute capability 9.0" in " ".join(result.stderr.split())
    result = invoke("check", SHAPED_ATTN_FAMILY="hopper")
    assert result.exit_code == 2, result.output


def test_a_kernel_that_hangs_does_not_hang_the_check(monkeypatch, tmp_path):
    (tmp_path / "broken_kernels.py").write_text(
        "import time\n"
        "def raises(**options):\n    raise RuntimeError('an illegal memory access')\n"
        "def never_ends(**options):\n    time.sleep(1000)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import broken_kernels

    monkeypatch.setattr(check, "_may_hang", lambda *_: True)
    monkeypatch.setattr(check, "_processes", lambda: 1)
    for name, message in (("raises", "illegal memory access"), ("never_ends", "no report in 2 s")):
        monkeypatch.setattr(fidelity, "_measure_point", getattr(broken_kernels, name))
        result = invoke("check", "--impl", "torch", "--quick", "--watchdog", "2")
        assert result.exit_code == 1, result.output
        for part in (message, "torch bf16 plain, logit std 0.01"):
            assert part in result.stderr
    assert "set the environment variable SHAPED_ATTN_FAMILY=portable" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("check", "--family", "fast"), "'fast' is not one of"),
        (("check", "--family", "hopper", "--impl", "torch"), "must have --impl triton alone"),
        (("check", "--watchdog", "0"), "--watchdog"),
        (("check", "--impl", "cublas"), "'cublas' is not one of"),
        (("check", "--device", "abacus"), "'abacus' is not a device of this machine"),
        (("check", "--length", "15"), "--length"),
        (("demo", "--seconds", "0"), "--seconds"),
        (("paint",), "No such command"),
    ],
)
def test_wrong_usage_is_exit_code_2(args, message):
    result = invoke(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_kernels_that_cannot_run_are_wrong_usage(monkeypatch):
    unavailable = {"available": False, "mode": "unavailable", "reason": "no Triton"}
    monkeypatch.setattr(environment, "kernel_availability", lambda: unavailable)
    result = invoke("check", "--impl", "triton")
    assert result.exit_code == 2
    assert "--impl triton cannot run here: no Triton" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("broken"), None)]
)
def test_main_turns_an_interrupt_into_130_and_hides_no_error(monkeypatch, raised, code):
    def fail():
        raise raised

    monkeypatch.setattr(environment, "collect", fail)
    monkeypatch.setattr(sys, "argv", ["shaped-attn", "env"])
    monkeypatch.setattr(common, "is_program", False)
    if code is None:
        with pytest.raises(RuntimeError, match="broken"):
            commands.main()
    else:
        with pytest.raises(SystemExit) as error:
            commands.main()
        assert error.value.code == code


def test_the_module_is_the_command():
    assert run_module("--version") == f"shaped-attn, version {__version__}"
    assert "No such command" in run_module("paint", status=2)


def test_the_help_of_every_command_imports_little():
    code = """
import sys
from click.testing import CliRunner
from shaped_attn import commands
for name in commands.NAMES:
    result = CliRunner().invoke(commands.cli, [name, "--help"])
    assert result.exit_code == 0 and "Options:" in result.stdout, name
print(*{name.partition(".")[0] for name in sys.modules})
"""
    heavy = {"matplotlib", "scipy", "rich", "jinja2", "triton"}
    heavy |= {"accelerate", "datasets", "safetensors", "tensorboard", "transformers"}
    assert not heavy & set(python("-c", code, cwd=ROOT).split())


@pytest.mark.interpreter
def test_check_turns_on_the_interpreter_by_itself():
    # torch may import Triton, which reads TRITON_INTERPRET at that moment, before the command does.
    shown = run_module("check", "--impl", "triton", "--quick", "--length", "16")
    assert "triton (interpreter), bf16, T = 16" in shown


@pytest.mark.interpreter
def test_check_does_not_pass_without_the_interpreter():
    errors = run_module("check", "--impl", "triton", status=2, TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET=1" in errors
