"""Every shipped kernel configuration compiles for every architecture, without spills.

Spills and serialised products are for tiles that were measured.
"""

import dataclasses
import warnings

import pytest
import triton
from fresh_python import compile_table

from shaped_attn.kernels import compile_gate, configs

GOOD_ROW = compile_gate.Row(
    arch="90",
    dtype="bf16",
    head_dim=128,
    variant="shaped",
    kernel="forward",
    block_t=128,
    block_s=64,
    num_warps=8,
    num_stages=2,
    registers=200,
    spills=0,
    shared=100_000,
    instruction="wgmma",
    tensor_core=24,
    serialized=False,
    has_float64=False,
    measured_on="",
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"spills": 8}, "8 bytes of spills"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"serialized": True}, "wgmma is serialised"),
        ({"spills": 8, "serialized": True, "measured_on": "H100"}, None),
        ({"shared": 300_000, "measured_on": "H100"}, "300000 bytes of shared memory"),
        ({"has_float64": True}, "float64 arithmetic"),
        ({"instruction": "mma"}, "no wgmma"),
        ({"instruction": "mma", "dtype": "fp32"}, None),
        ({"instruction": "mma", "arch": "80", "shared": 90_000}, None),
        ({"instruction": "mma", "head_dim": 256}, "no wgmma"),
        ({"instruction": "mma", "head_dim": 256, "kernel": "dkdv"}, None),
    ],
    ids=str,
)
def test_the_gate_can_fail(change, message):
    found = compile_gate.failures([dataclasses.replace(GOOD_ROW, **change)])
    assert found == [] if message is None else message in found[0]


def test_cases_reach_every_entry_of_the_tables(monkeypatch):
    """Every entry of 16 bits in every variant that takes it, every one of 32 bits in some."""
    reached = set()

    class Recording(dict):
        def get(self, width):
            if width in self:
                reached.add((self.entry, width))
            return super().get(width)

    tables = {}
    for key, table in configs._TABLES.items():
        tables[key] = {}
        for name, by_width in table.items():
            tables[key][name] = Recording(by_width)
            tables[key][name].entry = (key, name)
    monkeypatch.setattr(configs, "_TABLES", tables)
    for case in compile_gate.cases():
        for kernel in configs.KERNELS:
            itemsize = 4 if case.dtype == "fp32" else 2
            configs.pick_config(
                kernel,
                case.head_dim,
                case.head_dim,
                itemsize,
                case.arch,
                weighed_by=case.variant.weighed_by,
                is_centered=case.variant.gains != "softmax",
            )
    entries = {
        (by_width.entry, width)
        for table in tables.values()
        for by_width in table.values()
        for width in by_width
    }
    assert reached == entries


REGISTER_UNIT = 8  # in which GPUs allocate registers


def changes(row, expected):
    """What differs from a committed row.

    The order in which LLVM puts instructions varies between runs of one release: registers vary by
    a few, and where there are spills, so does their number (428 or 620 bytes of one kernel).
    """
    changed = {key: (value, row[key]) for key, value in expected.items() if row[key] != value}
    if abs(int(row["registers"]) - int(expected["registers"])) <= REGISTER_UNIT:
        changed.pop("registers", None)
    fewer, more = sorted((int(row["spills"]), int(expected["spills"])))
    if more <= 2 * fewer:
        changed.pop("spills", None)
    return changed


def test_changes_of_a_row():
    row = {key: str(value) for key, value in dataclasses.asdict(GOOD_ROW).items()}
    assert changes(row, row) == {}
    assert changes({**row, "registers": "202"}, row) == {}
    assert changes({**row, "registers": "209"}, row) == {"registers": ("200", "209")}
    assert changes({**row, "spills": "4"}, row) == {"spills": ("0", "4")}
    spilled = {**row, "spills": "620"}
    assert changes({**row, "spills": "428"}, spilled) == {}
    assert changes({**row, "spills": "300"}, spilled) == {"spills": ("620", "300")}
    assert changes(row, spilled) == {"spills": ("620", "0")}


@pytest.mark.slow
def test_all_configurations_compile_and_the_table_is_current(tmp_path):
    """Compiles in fresh processes: here the kernels may be decorated for the interpreter."""
    rows = compile_gate.read_table(compile_table("shaped_attn.kernels.compile_gate", tmp_path))
    assert {row["arch"] for row in rows} == {"80", "90", "100", "gfx942"}
    committed = compile_gate.table_path()
    if committed.exists():
        expected = compile_gate.read_table(committed)
        assert [changes(*pair) for pair in zip(rows, expected, strict=True)] == [{}] * len(rows)
    else:
        # The gates above hold for any release; exact registers are recorded for tested ones.
        warnings.warn(f"no committed table for Triton {triton.__version__}", stacklevel=1)


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_a_table_is_committed_for_each_tested_release(version):
    path = compile_gate.table_path().with_name(f"compile_table_triton_{version}.csv")
    rows = compile_gate.read_table(path)
    beside = {"value_sums", "value_prefix", "forward bounded"}
    assert {row["kernel"] for row in rows} == beside | set(configs.KERNELS)
    typed = [
        compile_gate.Row(
            **{
                field.name: {"int": int, "str": str, "bool": lambda x: x == "True"}[field.type](
                    row[field.name]
                )
                for field in dataclasses.fields(compile_gate.Row)
            }
        )
        for row in rows
    ]
    assert compile_gate.failures(typed) == []
