import dataclasses
import json
import math
from functools import partial

import pytest
import torch

from shaped_attn import fidelity, shaped_attention, watchdog
from shaped_attn.testing import Case, make_inputs, relative_error


@pytest.fixture
def small(device):
    """Options of small measurements."""
    return {"device": device.type, "length": 33, "head_dim": 16}


def by_quantity(report, **wanted):
    return {
        m.quantity: m
        for m in report.measurements
        if all(getattr(m, name) == value for name, value in wanted.items())
    }


@pytest.mark.parametrize("dtype", fidelity.DTYPES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_implementations_are_within_budget_in_every_regime(impl, dtype, small):
    report = fidelity.measure([impl], dtypes=[dtype], logit_stds=(0.01, 0.3, 10.0), **small)
    assert report.failures == ()
    plain = by_quantity(report, regime="plain", logit_std=0.3)
    assert tuple(plain) == fidelity.QUANTITIES
    for regime in ("v mean 3", "k mean 4", "sink key"):
        assert set(by_quantity(report, regime=regime)) == {fidelity.CENTRED}


@pytest.mark.parametrize("dtype", fidelity.DTYPES)
def test_kernels_are_within_budget(dtype, small):
    options = {"dtypes": [dtype], "logit_stds": (0.03,), "regimes": ("plain", "v mean 3")}
    report = fidelity.measure(["triton"], **options, **small)
    assert report.failures == ()
    centred = by_quantity(report, quantity=fidelity.CENTRED)[fidelity.CENTRED]
    assert centred.budget == fidelity.CENTRED_BUDGET[dtype]


def test_composing_loses_the_centred_term_at_small_logits(small):
    report = fidelity.measure(
        ["torch"], dtypes=["bf16"], logit_stds=(0.01, 1.0), regimes=["plain"], **small
    )
    small = by_quantity(report, logit_std=0.01)[fidelity.CENTRED]
    large = by_quantity(report, logit_std=1.0)[fidelity.CENTRED]
    assert small.composed_error > 50 * small.error
    assert small.composed_error > 20 * large.composed_error


def test_the_composition_computes_the_same_thing(device):
    # In float64 nothing is lost, so what it is compared with is no straw man.
    case = Case(batch=1, heads=3, queries=20, is_causal=True, residual_dtype=torch.float64)
    inputs = make_inputs(dataclasses.replace(case, dtype=torch.float64), device=device)
    names = fidelity.GAIN_NAMES[:5]
    gains = {
        name: torch.full((3,), 0.5 + 0.2 * i, dtype=torch.float64, device=device)
        for i, name in enumerate(names)
    }
    scale = torch.full((3,), 0.1, dtype=torch.float64, device=device)
    expected = shaped_attention(*inputs, **gains, scale=scale, is_causal=True, impl="reference")
    assert relative_error(fidelity._composed(*inputs, **gains, scale=scale), expected) < 1e-13


def plus_one_percent(*args, **kwargs):
    return 1.01 * shaped_attention(*args, **kwargs)


def without_center(*args, **kwargs):
    return shaped_attention(*args, **{**kwargs, "center_gain": 0.0})


def never_finite(*args, **kwargs):
    return shaped_attention(*args, **kwargs) * math.nan


@pytest.mark.parametrize("wrong", [plus_one_percent, without_center, never_finite])
def test_a_wrong_output_exceeds_its_budget(wrong, small):
    options = {"dtypes": ["fp32"], "logit_stds": (1.0,), "regimes": ["sink key"]}
    report = fidelity.measure(["torch"], attention=wrong, **options, **small)
    assert [m.quantity for m in report.failures] == [fidelity.CENTRED]


def test_a_wrong_gradient_exceeds_its_budget_alone(small):
    def halves_gradient_of_v(q, k, v, *args, **kwargs):
        return shaped_attention(q, k, 0.5 * v + 0.5 * v.detach(), *args, **kwargs)

    options = {"dtypes": ["fp32"], "logit_stds": (1.0,), "regimes": ["plain"]}
    report = fidelity.measure(["torch"], attention=halves_gradient_of_v, **options, **small)
    assert [m.quantity for m in report.failures] == ["grad v"]


@pytest.mark.parametrize("name", fidelity.GAIN_NAMES)
def test_a_gradient_of_a_gain_off_by_a_percent_exceeds_its_budget_alone(name, small):
    def lacks_a_percent(*args, **kwargs):
        if isinstance(kwargs.get(name), torch.Tensor):
            kwargs[name] = 0.99 * kwargs[name] + 0.01 * kwargs[name].detach()
        return shaped_attention(*args, **kwargs)

    options = {"dtypes": ["fp32"], "logit_stds": (1.0,), "regimes": ["plain"]}
    report = fidelity.measure(["torch"], attention=lacks_a_percent, **options, **small)
    assert [m.quantity for m in report.failures] == [f"grad {name}"]


def test_a_report_is_reproducible_and_becomes_json(small):
    options = {"dtypes": ["fp16"], "logit_stds": (1.0,), "regimes": ["plain"], **small}
    first, again, other = (fidelity.measure(["torch"], seed=seed, **options) for seed in (1, 1, 2))
    assert first.measurements == again.measurements
    assert first.measurements != other.measurements

    broken = dataclasses.replace(first.measurements[0], error=math.nan)
    report = dataclasses.replace(first, measurements=(broken, *first.measurements[1:]))
    rows = json.loads(json.dumps(report.to_dict(), allow_nan=False))["measurements"]
    assert rows[0]["error"] == "nan"
    assert rows[0]["is_within"] is False
    assert rows[1]["error"] == first.measurements[1].error


def test_tables_hold_every_measurement_once(small):
    report = fidelity.measure(
        ["torch", "reference"],
        dtypes=["fp32", "bf16"],
        logit_stds=(0.1, 1.0),
        regimes=["plain", "sink key"],
        **small,
    )
    tables = fidelity.tables(report)
    assert len(tables) == 8
    cells = [m for rows in tables for row in rows for m in row]
    assert sorted(cells, key=str) == sorted(report.measurements, key=str)
    for rows in tables:
        assert len({(m.impl, m.dtype, m.regime) for row in rows for m in row}) == 1
        for row in rows:
            assert [m.logit_std for m in row] == [0.1, 1.0]
            assert len({m.quantity for m in row}) == 1


def test_progress_counts_to_the_end(small):
    seen = []
    fidelity.measure(
        ["torch"],
        dtypes=["fp32"],
        logit_stds=(0.1, 1.0),
        regimes=["sink key"],
        on_progress=lambda done, total: seen.append((done, total)),
        **small,
    )
    assert seen == [(1, 2), (2, 2)]


def test_measurements_in_processes_are_the_same(small):
    options = {"dtypes": ["fp32", "bf16"], "logit_stds": (1.0,), "regimes": ["sink key"], **small}
    here = fidelity.measure(["torch"], **options)
    run = partial(watchdog.run, processes=2, limit=300)
    watched = fidelity.measure(["torch"], run=run, **options)
    for a, b in zip(here.measurements, watched.measurements, strict=True):
        assert (a.dtype, a.regime, a.logit_std) == (b.dtype, b.regime, b.logit_std)
        assert a.error == pytest.approx(b.error, rel=0.1)  # sums over other numbers of threads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impls": ["cuda"]}, "impls must be one of 'triton', 'torch', 'reference', got 'cuda'"),
        ({"impls": ["torch"], "dtypes": ["fp8"]}, "dtypes must be one of .*'fp8'"),
        ({"impls": ["torch"], "regimes": ["odd"]}, "regimes must be one of .*'odd'"),
        ({"impls": ["torch"], "length": 15}, "length must be at least 16, got 15"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fidelity.measure(**options)


def test_nothing_is_called_triton_where_the_kernels_cannot_run(monkeypatch, small):
    from shaped_attn import environment

    unavailable = {"available": False, "mode": "unavailable", "reason": "no GPU"}
    monkeypatch.setattr(environment, "kernel_availability", lambda: unavailable)
    with pytest.raises(RuntimeError, match='"triton" cannot run here: no GPU'):
        fidelity.measure(["triton"], **small)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.36e-3, "2.4e-3"),
        (9.99e-4, "1.0e-3"),
        (0.0312, "0.031"),
        (2.4, "2.4"),
        (123456.0, "1.2e5"),
        (math.nan, "nan"),
    ],
)
def test_errors_are_printed_short(value, text):
    assert fidelity.format_error(value) == text
