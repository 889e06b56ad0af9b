"""The Hopper kernels compile as the committed tables say, with what a GPU needs to be fast."""

import csv
import dataclasses
import warnings

import pytest
from fresh_python import compile_table

from shaped_attn.kernels.families import triton_release
from shaped_attn.kernels.hopper import compile_gate, tiles

GOOD_ROW = compile_gate.Row(
    dtype="bf16",
    width=128,
    is_causal=True,
    terms="fixed",
    kernel="forward",
    consumers=2,
    block=128,
    stages=2,
    spills=0,
    loop_spills=0,
    loop=480,
    shared=200_000,
    serialized=False,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"spills": 500}, None),
        ({"loop_spills": 4}, None),
        ({"loop_spills": 5}, "5 spills in a hot loop"),
        ({"loop_spills": 5, "width": 64, "kernel": "fused"}, None),
        ({"serialized": True}, "wgmma is serialised"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"loop": 510}, "510 instructions in a hot loop"),
        ({"loop": 510, "terms": "learned"}, None),
    ],
    ids=str,
)
def test_the_gate_can_fail(change, message, monkeypatch):
    monkeypatch.setattr(compile_gate, "triton_release", lambda: (3, 6))
    found = compile_gate.failures([dataclasses.replace(GOOD_ROW, **change)])
    assert found == [] if message is None else message in found[0]


def test_cases_reach_every_tile():
    reached = {(case.width, case.is_causal, case.is_deterministic) for case in compile_gate.cases()}
    for width in tiles.WIDTHS:
        for is_causal in (True, False):
            assert (width, is_causal, True) in reached
            assert (width, is_causal, False) in reached


@pytest.mark.slow
def test_all_kernels_compile_and_the_table_is_current(tmp_path):
    """In fresh processes: here the plain kernels may be decorated for the interpreter."""
    path = compile_table("shaped_attn.kernels.hopper.compile_gate", tmp_path)
    committed = compile_gate.table_path()
    if not committed.exists():
        warnings.warn(f"no table for Triton {triton_release()}", stacklevel=1)
        return
    with path.open(newline="") as new, committed.open(newline="") as old:
        for row, expected in zip(csv.DictReader(new), csv.DictReader(old), strict=True):
            # The order in which LLVM puts instructions varies between runs: a few more or fewer.
            loop, spills, loop_spills = (
                (int(row.pop(name)), int(expected.pop(name)))
                for name in ("loop", "spills", "loop_spills")
            )
            assert row == expected
            assert abs(loop_spills[0] - loop_spills[1]) <= 8, expected
            assert abs(loop[0] - loop[1]) <= 0.05 * loop[1], expected
            assert min(spills) > 0 or max(spills) <= 200, expected
