"""The benchmark of the operator where the Hopper kernels can run: families beside each other."""

import statistics

import pytest
import torch

from shaped_attn import speed
from shaped_attn.commands.bench import tables
from shaped_attn.testing import Case, record_families


@pytest.fixture
def bench(bench_modules):
    import bench_attention

    return bench_attention


def entry_of(bench, device, **changes):
    from cases import AttentionCase

    sizes = {"batch": 1, "heads": 2, "queries": 70, "head_dim": 64, "is_causal": True}
    sizes |= {"dtype": torch.bfloat16, "residual_dtype": torch.bfloat16} | changes
    return bench.Entry(AttentionCase(Case(**sizes), peers=("sdpa",)), device, is_checked=True)


def test_each_family_runs_beside_the_one_that_auto_picks(bench, hopper, device):
    with hopper():
        entry = entry_of(bench, device)
        assert list(entry.candidates)[:4] == ["ours", *bench.peers.FAMILIES]
        for which in bench.PASSES:
            for name, (family, _) in bench.peers.FAMILIES.items():
                step = entry.step(entry.candidates[name], which)
                with record_families() as ran:
                    step.run(step.prepare())
                assert ran == {family}
    assert entry.plain == ["sdpa"]


def test_what_the_hopper_kernels_do_not_take_has_no_families(bench, hopper, device):
    with hopper():
        entry = entry_of(bench, device, dtype=torch.float32, residual_dtype=torch.float32)
    assert list(entry.candidates) == ["ours", "sdpa"]


def test_where_there_is_no_hopper_there_are_no_families(bench, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("needs a machine without a Hopper GPU")
    entry = entry_of(bench, device)
    assert list(entry.candidates) == ["ours", "sdpa"]
    assert entry.family == ("portable" if device.type == "cuda" else None)


def test_ratios_of_families_are_in_the_report(bench):
    seconds = {"ours": [2.0], "ours-hopper": [2.0], "ours-portable": [3.0], "sdpa": [1.0]}
    found = bench.ratios(seconds, ["sdpa"], None)
    assert found["hopper_vs_portable"] == 1.5 and "any_order_vs_fixed" not in found
    found = bench.ratios(seconds | {"ours-hopper-any-order": [1.6]}, ["sdpa"], None)
    assert found["any_order_vs_fixed"] == 1.25
    entry = {
        **{"case": "a", "pass": "backward", "set": "gates", "form": "fixed", "length": 4096},
        **{"head_dim": 64, "heads": 2, "kv_heads": 2, "is_causal": True, "dtype": "bfloat16"},
        "times": {
            name: {"median_ms": statistics.median(times), "tflops": 1.0}
            for name, times in seconds.items()
        },
        "family": "hopper",
        **found,
    }

    def titles():
        return "".join(str(table.title) for table in tables(speed.Report([entry], {}, {}, [])))

    assert "kernels for Hopper" in titles()
    del entry["hopper_vs_portable"]
    assert "kernels for Hopper" not in titles()
