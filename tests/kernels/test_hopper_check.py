"""The check of the Hopper kernels: `shaped-attn check --family hopper`, on small calls."""

import dataclasses

import pytest
import torch
from command_line import invoke

from shaped_attn import fidelity, shaped_attention
from shaped_attn.kernels.hopper import tiles

CALLS = fidelity.hopper_calls(40)


def test_what_the_check_covers():
    cases = [call.case for call in fidelity.hopper_calls()]

    def pairs(*names):
        return {tuple(getattr(case, name) for name in names) for case in cases}

    widths, dtypes = (64, 96, 128), (torch.bfloat16, torch.float16)
    assert pairs("head_dim", "dtype") >= {(x, y) for x in widths for y in dtypes}
    assert pairs("head_dim", "is_causal") >= {(x, y) for x in widths for y in (True, False)}
    assert {tiles.width_of(case.head_dim, case.value_dim) for case in cases} == set(tiles.WIDTHS)
    assert pairs("dtype", "is_causal") == {(x, y) for x in dtypes for y in (True, False)}
    assert {case.padding for case in cases} == {None, "left", "right", "both"}
    assert {case.residual_dtype for case in cases} >= {torch.float32, None}
    assert any(case.kv_heads < case.heads for case in cases)
    assert any((case.q_offset or 0) > 0 for case in cases)
    assert any((case.q_offset or 0) < 0 for case in cases)
    assert {call.terms for call in fidelity.hopper_calls()} == {"learned", "plain", "centred"}
    assert any(not call.deterministic for call in fidelity.hopper_calls())
    # Both forms of the forward, and more than one tile of each kind, the last of them ragged.
    assert min(case.keys for case in cases) > 2048
    assert all(case.keys % 64 and case.queries % 64 for case in cases)
    assert len({call.id for call in CALLS}) == len(CALLS)


SOME = [
    pytest.param(call, id=call.id, marks=[pytest.mark.slow] if i % 3 else [])
    for i, call in enumerate(CALLS)
]


@pytest.mark.parametrize("call", SOME)
def test_right_kernels_are_within_budget(call, hopper, device):
    with hopper():
        report = fidelity.measure_calls([call], device=device, logit_stds=(1.0,), family="hopper")
    assert not report.failures
    assert {m.family for m in report.measurements} == {"hopper"}
    quantities = {m.quantity for m in report.measurements}
    assert quantities >= {"lse", "grad q", "grad k", "grad v", fidelity.REPEATS}
    names = [*fidelity.GAIN_NAMES[1:3], "branch_gain", "scale"]
    assert (call.terms == "learned") == (quantities >= {f"grad {name}" for name in names})
    assert (fidelity.CENTRED in quantities) == (
        call.terms == "centred" and call.case.residual_dtype is None
    )


def scaled(**factors):
    """The operator with results and gradients off by a factor, lse by a summand."""

    def attention(q, k, v, residual=None, **options):
        def off(x, name):
            x = x.view_as(x)
            x.register_hook(lambda gradient: factors.get(name, 1.0) * gradient)
            return x

        q, k, v = off(q, "grad q"), off(k, "grad k"), off(v, "grad v")
        out, lse = shaped_attention(q, k, v, residual, **options)
        return out * factors.get("out", 1.0), lse + factors.get("lse", 0.0)

    return attention


@pytest.mark.parametrize("name", ["out", "lse", "grad q", "grad k", "grad v"])
def test_wrong_results_exceed_their_budget(name, hopper, device):
    call = next(call for call in CALLS if call.terms == "centred")
    options = {"device": device, "logit_stds": (1.0,), "family": "hopper"}
    with hopper():
        report = fidelity.measure_calls([call], attention=scaled(**{name: 1.1}), **options)
    quantity = fidelity.CENTRED if name == "out" else name
    # What multiplies the output multiplies the gradients too.
    failed = {m.quantity for m in report.failures}
    assert quantity in failed and (name == "out" or failed == {quantity})


def test_other_bits_exceed_their_budget(hopper, device):
    count = iter(range(100))

    def attention(*tensors, **options):
        out, lse = shaped_attention(*tensors, **options)
        return out, lse + 1e-6 * (next(count) == 1)

    call = dataclasses.replace(CALLS[0], terms="centred")
    options = {"device": device, "logit_stds": (1.0,), "family": "hopper"}
    with hopper():
        report = fidelity.measure_calls([call], attention=attention, **options)
    assert [m.quantity for m in report.failures] == [fidelity.REPEATS]


def test_the_command(hopper, monkeypatch):
    monkeypatch.setattr(fidelity, "hopper_calls", lambda length: CALLS[:1])
    monkeypatch.setattr(fidelity, "QUICK_CALL_LOGIT_STDS", (1.0,))
    with hopper():
        result = invoke("check", "--family", "hopper", "--quick", "--length=40")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    for part in (
        "hopper kernels",
        CALLS[0].case.id,
        fidelity.REPEATS,
        "grad scale",
        "All 13 errors",
    ):
        assert part in printed
