"""Compile every Hopper kernel without a GPU and check what the assembler made of its loops.

As `shaped_attn.kernels.compile_gate`, for the other family: `python -m
shaped_attn.kernels.hopper.compile_gate --write` rewrites the table of the installed Triton.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...visibility import Visibility
from ..attention import Needs, attention_bwd, attention_fwd
from ..compile_gate import SHARED_MEMORY, Compiled, compiling_for, number_in
from ..families import triton_release, use_family
from .tiles import WIDTHS

_ARCH = 90
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """One call to compile: forward and backward.

    terms: "learned", all of them with learnable gains, key ranges and grouped heads; "fixed", all
    with numbers for gains; "plain", softmax attention alone.
    """

    dtype: str
    width: int
    is_causal: bool
    terms: str
    is_deterministic: bool = True
    length: int = 16384


def cases() -> Iterator[Case]:
    """All calls of the gate."""
    for width, is_causal in itertools.product(WIDTHS, (True, False)):
        for terms in ("fixed", "learned", "plain"):
            yield Case("bf16", width, is_causal, terms)
        yield Case("fp16", width, is_causal, "learned")
        yield Case("bf16", width, is_causal, "fixed", is_deterministic=False)
    for is_causal in (True, False):  # two consumers
        yield Case("bf16", 64, is_causal, "fixed", length=1024)


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel: a row of the table.

    Of the innermost loops with products, one of each consumer is hot: over blocks without a mask,
    hence about as short as the shortest. loop: instructions of that. loop_spills: loads and stores
    of spilled registers, in the hot loop that has most; spills: bytes, in the whole kernel.
    """

    dtype: str
    width: int
    is_causal: bool
    terms: str
    kernel: str
    consumers: int
    block: int
    stages: int
    spills: int
    loop_spills: int
    loop: int
    shared: int
    serialized: bool


class Loop(NamedTuple):
    """An innermost loop of a kernel's machine code."""

    instructions: int
    products: int
    spills: int


def loops(cubin: bytes) -> list[Loop]:
    """Innermost loops with tensor-core products."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        )
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    spans = []
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        start = labels.get(target[1], end) if target else end
        # A loop of a few instructions is a wait. What waits longer stands behind the last exit.
        if end - start > 20 and not any("EXIT" in x for x in code[start:end]):
            spans.append((start, end + 1))
    innermost = [
        span
        for span in spans
        if not any(span != o and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]
    found = []
    for start, end in innermost:
        body = code[start:end]
        products = sum("HGMMA" in x for x in body)
        spills = sum(re.search(r"\b(STL|LDL)\b", x) is not None for x in body)
        if products:
            found.append(Loop(len(body), products, spills))
    return found


def compile_case(case: Case) -> list[Row]:
    """Compile the forward and the backward of one case; one row per Hopper kernel."""
    B, H, HKV = 2, 4, 2 if case.terms == "learned" else 4

    def tensor(*shape, dtype=_DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, d_out = (tensor(B, H, case.length, case.width) for _ in range(2))
    k, v = (tensor(B, HKV, case.length, case.width) for _ in range(2))
    is_learned = case.terms == "learned"
    gains: tuple = (0.9, 1.1, 0.8, 0.7, 0.4, 0.01)
    if case.terms == "plain":
        gains = (0.0, 1.0, 0.0, 1.0, 1.0, 0.1)
    if is_learned:
        gains = tuple(tensor(H, dtype=torch.float32) for _ in range(6))
    key_start = tensor(B, dtype=torch.int32) if is_learned else None
    visibility = Visibility(case.is_causal, 0, key_start, key_start, None)
    residual = None if case.terms == "plain" else q
    arguments = (q, k, v, residual, gains, visibility)
    needs = Needs(residual=residual is not None, gains=is_learned, scale=is_learned)
    with compiling_for(_ARCH) as compiled, use_family("hopper"):
        saved = attention_fwd(*arguments, save_for_backward=True)
        attention_bwd(
            d_out,
            None,
            *arguments,
            *saved[2:],
            needs=needs,
            is_deterministic=case.is_deterministic,
        )
    return [_row(case, found) for found in compiled if "C" in found.constants]


def _name(case: Case, function: str, shape) -> str:
    if function == "attention_fwd_kernel":
        return "forward"
    if function == "attention_bwd_dkdv_kernel" and not (shape.makes_dk and shape.makes_dv):
        return "dk" if shape.makes_dk else "dv"
    name = function.removeprefix("attention_bwd_").removesuffix("_kernel")
    return "fused" if getattr(shape, "is_fused", False) else name


def _row(case: Case, found: Compiled) -> Row:
    shape = found.constants["C"].shape
    of_loops = loops(found.kernel.asm["cubin"])
    shortest = min(loop.instructions for loop in of_loops)
    return Row(
        dtype=case.dtype,
        width=case.width,
        is_causal=case.is_causal,
        terms=case.terms,
        kernel=_name(case, found.function, shape),
        consumers=shape.consumers,
        block=shape.block_t if hasattr(shape, "is_fused") else shape.block_s,
        stages=shape.stages,
        spills=sum(
            number_in(rf"(\d+) bytes spill {way}", found.log) for way in ("stores", "loads")
        ),
        loop_spills=max(loop.spills for loop in of_loops if loop.instructions < 1.1 * shortest),
        loop=shortest,
        shared=found.kernel.metadata.shared,
        serialized="instructions are serialized" in found.log,
    )


class Prototype(NamedTuple):
    """The hot loops of the prototype that was the fastest on an H100, with Triton 3.6.0."""

    instructions: int
    spills: bool = False


# By kernel, width, and whether causal. Loops may be 5 % longer; those that spill were measured so.
PROTOTYPES = {
    ("forward", 64, True): Prototype(335),
    ("forward", 64, False): Prototype(336),
    ("forward", 128, True): Prototype(477),
    ("forward", 128, False): Prototype(479),
    ("dkdv", 64, True): Prototype(307),
    ("dkdv", 64, False): Prototype(557, spills=True),
    ("dkdv", 128, True): Prototype(342),
    ("dkdv", 128, False): Prototype(344),
    ("dq", 64, True): Prototype(232),
    ("dq", 64, False): Prototype(232),
    ("dq", 128, True): Prototype(388),
    ("dq", 128, False): Prototype(260),
    ("fused", 64, True): Prototype(635, spills=True),
    ("fused", 64, False): Prototype(645, spills=True),
    ("fused", 128, True): Prototype(417),
    ("fused", 128, False): Prototype(421),
}


def failures(rows: list[Row]) -> list[str]:
    """Rows that break a gate, in words: serialised products, spills in loops, longer loops."""
    found = []
    for row in rows:
        mask = "causal" if row.is_causal else "full"
        where = f"{row.dtype} {row.width} {mask} {row.terms} {row.kernel}"
        prototype = PROTOTYPES.get((row.kernel, row.width, row.is_causal))
        is_like = row.dtype == "bf16" and row.terms == "fixed" and triton_release() == (3, 6)
        is_long = is_like and prototype is not None and row.loop > 1.05 * prototype.instructions
        # One instruction in a hundred costs less than the smaller tile that would not need it.
        is_spilled = row.loop_spills > 0.01 * row.loop
        may_spill = prototype is not None and prototype.spills
        checks = {
            f"{row.loop_spills} spills in a hot loop": is_spilled and not may_spill,
            f"{row.shared} bytes of shared memory": row.shared > SHARED_MEMORY[_ARCH],
            "wgmma is serialised": row.serialized,
            f"{row.loop} instructions in a hot loop, the prototype has {prototype}": is_long,
        }
        found += [f"{where}: {what}" for what, fails in checks.items() if fails]
    return found


def compile_all(selected: list[Case] | None = None, processes: int | None = None) -> list[Row]:
    """Compile all (or the selected) cases in parallel; rows in the order of the cases."""
    selected = list(cases()) if selected is None else selected
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        return [row for rows in pool.imap(compile_case, selected) for row in rows]


def table_path() -> Path:
    """Committed table of the installed Triton version."""
    return Path(__file__).parent / f"compile_table_triton_{triton.__version__}.csv"


def main() -> int:
    """Compile everything, print failed gates, optionally write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument("--output", type=Path, help="write the table here instead")
    parser.add_argument("--processes", type=int, default=None)
    arguments = parser.parse_args()
    rows = compile_all(processes=arguments.processes)
    if arguments.output or arguments.write:
        with (arguments.output or table_path()).open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    found = failures(rows)
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
