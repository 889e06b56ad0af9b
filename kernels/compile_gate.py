"""Compile every shipped kernel configuration without a GPU and check what the assembler says.

The launchers run on meta tensors while a stand-in driver names the target, so what is compiled here
is what a call on that GPU compiles: same specialisation, same options. `python -m
shaped_attn.kernels.compile_gate --write` rewrites the committed table of the installed Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..visibility import Visibility
from . import configs, launch
from .attention import Call, Needs, attention_bwd, attention_fwd
from .priors import PRIORS, prior_parameters
from .stand_in import StandInDriver

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may use; sm_80's table also serves consumer cards."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Variant(NamedTuple):
    """One set of arguments that changes the code: which terms, which mask, which prior."""

    name: str
    gains: str
    has_mask: bool = False
    has_key_range: bool = False
    prior: str | None = None

    @property
    def weighed_by(self) -> str | None:
        """What weighs the keys one by one, which takes other tiles."""
        return "prior" if self.prior is not None else "mask" if self.has_mask else None


VARIANTS = (
    Variant("shaped", "tensor", has_key_range=True),
    Variant("plain", "softmax"),
    Variant("masked", "number", has_mask=True),
    Variant("espa", "tensor", has_key_range=True, prior="geometric"),
    Variant("uspa", "number", prior="column"),
    Variant("dense", "number", prior="dense"),
)
"""Every term with learnable gains; softmax attention alone; an arbitrary mask; each form of prior,
of which the geometric one is learned."""


class Case(NamedTuple):
    """One call to compile: forward and backward of one variant."""

    arch: int | str
    dtype: str
    head_dim: int
    variant: Variant


def cases() -> Iterator[Case]:
    """All calls of the gate: every entry of the tables at the widest head it serves.

    bfloat16 in all variants, the dense prior at one width only, and at the narrowest head as well;
    float16 and float32 differ from it in how they multiply, so they are compiled with the most
    terms, and float32 with a mask and with a prior that is learned.
    """
    shaped, _, masked, learned, _, dense = VARIANTS
    for arch, head_dim in itertools.product(configs.ARCHITECTURES, (64, 128, 256)):
        for variant in VARIANTS:
            if variant is not dense or head_dim == 128:
                yield Case(arch, "bf16", head_dim, variant)
        yield Case(arch, "fp16", head_dim, shaped)
        for variant in (shaped, masked, learned):
            yield Case(arch, "fp32", head_dim, variant)
    for arch in configs.ARCHITECTURES:
        yield Case(arch, "bf16", 16, shaped)


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel: a row of the table.

    registers and spills are per thread (spills in bytes), shared in bytes per program; tensor_core
    counts wgmma, mma or mfma instructions, whichever `instruction` names.
    """

    arch: str
    dtype: str
    head_dim: int
    variant: str
    kernel: str
    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    instruction: str
    tensor_core: int
    serialized: bool
    has_float64: bool
    measured_on: str


class Compiled(NamedTuple):
    """One launch: name of its function, its constants, the kernel and what the assembler said."""

    function: str
    constants: dict[str, Any]
    kernel: Any
    log: str


@contextlib.contextmanager
def compiling_for(arch: int | str) -> Iterator[list[Compiled]]:
    """Let launches compile for `arch` instead of running; yields what they made.

    The stand-in driver stays: without a GPU there is none to go back to. Hence the own processes.
    """
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        self.device_caches.clear()  # or a kernel of an earlier case would leave no log
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, kwargs, kernel, log.getvalue()))
        return kernel

    with knobs.nvidia.scope(), knobs.compilation.scope(), launch.assume_architecture(arch):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        driver.set_active(StandInDriver(arch))
        launch.forget_plans()  # those of earlier cases have compiled already
        JITFunction.run = compile_only
        try:
            yield compiled
        finally:
            JITFunction.run = run


_KERNEL_NAMES = {
    "value_sums_kernel": "value_sums",
    "value_prefix_kernel": "value_prefix",
    "attention_fwd_kernel": "forward",
    "attention_bwd_preprocess_kernel": "preprocess",
    "attention_bwd_dkdv_kernel": "dkdv",
    "attention_bwd_dq_kernel": "dq",
}


def compile_case(case: Case) -> list[Row]:
    """Compile the forward and the backward of one case; one row per kernel."""
    B, H, HKV, T = 2, 4, 2, 512
    D = case.head_dim

    def tensor(*shape, dtype=_DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(B, H, T, D), tensor(B, HKV, T, D), tensor(B, HKV, T, D)
    residual = None if case.variant.gains == "softmax" else tensor(B, H, T, D)
    gains = {
        "tensor": tuple(tensor(H, dtype=torch.float32) for _ in range(6)),
        "number": (1.0, 1.0, 1.0, 0.9, 0.4, 0.01),
        "softmax": (0.0, 1.0, 0.0, 1.0, 1.0, 0.1),
    }[case.variant.gains]
    key_start = tensor(B, dtype=torch.int32) if case.variant.has_key_range else None
    mask = tensor(B, 1, T, T, dtype=torch.bool).expand(B, H, T, T)
    attn_mask = mask if case.variant.has_mask else None
    visibility = Visibility(True, 0, key_start, key_start, attn_mask)
    call = Call(q, k, v, residual, gains, visibility)
    if case.variant.prior is not None:
        shape = {"geometric": (H, 5), "column": (H, 4, T), "dense": (H, T, T)}[case.variant.prior]
        values = tensor(*shape, dtype=torch.float32)
        parameters = prior_parameters(case.variant.prior, values, H, T, T, 0)
        call = call._replace(prior=PRIORS[case.variant.prior], prior_parameters=parameters)
    is_learned = case.variant.gains == "tensor"
    needs = Needs(
        residual=residual is not None,
        gains=is_learned,
        scale=is_learned,
        prior=is_learned and case.variant.prior is not None,
    )
    prior = {"prior": call.prior, "prior_parameters": call.prior_parameters}
    with compiling_for(case.arch) as compiled:
        saved = attention_fwd(*call[:6], **prior, save_for_backward=True)
        attention_bwd(tensor(B, H, T, D), None, *call[:6], *saved[2:], **prior, needs=needs)
        tiles = {kernel: call.config(kernel) for kernel in configs.KERNELS}
    # The backward launches the block sums of v a second time, already compiled.
    first = {}
    for function, constants, kernel, log in compiled:
        form = " bounded" if constants.get("BOUNDED") else ""
        first.setdefault(_KERNEL_NAMES[function] + form, (kernel, log))
    return [
        # The block sums and both forms of the forward take its tiles.
        _row(case, tiles.get(name, tiles["forward"]), name, kernel, log)
        for name, (kernel, log) in first.items()
    ]


_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma_",
}


def _row(case: Case, config: configs.TileConfig, name: str, kernel, log: str) -> Row:
    if isinstance(case.arch, str):
        assembly = kernel.asm["amdgcn"]
        registers = number_in(r"\.vgpr_count:\s*(\d+)", assembly)
        # Scratch memory of one thread: spilled vector registers and anything else on the stack.
        spills = number_in(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    else:
        assembly = kernel.asm["ptx"]
        registers = number_in(r"Used (\d+) registers", log)
        spills = sum(number_in(rf"(\d+) bytes spill {way}", log) for way in ("stores", "loads"))
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in _INSTRUCTIONS.items()}
    instruction = max(counts, key=counts.get)
    return Row(
        arch=str(case.arch),
        dtype=case.dtype,
        head_dim=case.head_dim,
        variant=case.variant.name,
        kernel=name,
        block_t=config.block_t,
        block_s=config.block_s,
        num_warps=kernel.metadata.num_warps,
        num_stages=config.num_stages,
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        instruction=instruction if counts[instruction] else "none",
        tensor_core=counts[instruction],
        serialized="wgmma.mma_async instructions are serialized" in log,
        has_float64=re.search(r"xf64\b|: f64\b", kernel.asm["ttgir"]) is not None,
        measured_on=config.measured_on,
    )


def number_in(pattern: str, text: str) -> int:
    """The last number that a pattern finds in what a compiler printed."""
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"the compiler's output lacks {pattern!r}; it holds:\n{text[-2000:]}")
    return int(found[-1])


def failures(rows: list[Row]) -> list[str]:
    """Rows that break a gate, in words: spills, shared memory, wgmma, serialisation.

    Spills and serialisation are recorded, and let pass where the tiles were measured to be fastest.
    """
    found = []
    for row in rows:
        where = f"sm_{row.arch} {row.dtype} D={row.head_dim} {row.variant} {row.kernel}"
        limit = SHARED_MEMORY[int(row.arch) if row.arch.isdigit() else row.arch]
        lacks_wgmma = _needs_wgmma(row) and row.instruction != "wgmma"
        checks = {
            f"{row.spills} bytes of spills": row.spills and not row.measured_on,
            f"{row.shared} bytes of shared memory > {limit}": row.shared > limit,
            # A literal below the smallest normal float32, such as 1e-38, is float64 to Triton.
            "float64 arithmetic": row.has_float64,
            "wgmma is serialised": row.serialized and not row.measured_on,
            f"no wgmma, {row.instruction} instead": lacks_wgmma,
        }
        found += [f"{where}: {what}" for what, fails in checks.items() if fails]
    return found


_PRODUCTS = ("forward", "forward bounded", "dkdv", "dq")


def _needs_wgmma(row: Row) -> bool:
    """Whether a row's tile has the 64 rows that one wgmma takes.

    At D = 256 two accumulators of 64 rows do not fit the registers: the backward and the forward
    of weighed keys use smaller tiles there, and at D = 128 the forward with a prior, which has two
    products more. float32 has no wgmma at full precision.
    """
    if row.arch != "90" or row.dtype == "fp32" or row.kernel not in _PRODUCTS:
        return False
    is_forward = row.kernel.startswith("forward")
    if is_forward and row.variant in ("shaped", "plain"):
        return True
    has_prior = row.variant not in ("shaped", "plain", "masked")
    return row.head_dim <= (64 if is_forward and has_prior else 128)


def compile_all(selected: list[Case] | None = None, processes: int | None = None) -> list[Row]:
    """Compile all (or the selected) cases in parallel; rows in the order of the cases."""
    selected = list(cases()) if selected is None else selected
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        return [row for rows in pool.imap(compile_case, selected) for row in rows]


def table_path() -> Path:
    """Committed table of the installed Triton version."""
    return Path(__file__).parent / f"compile_table_triton_{triton.__version__}.csv"


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table as written, all values as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(rows: list[Row], path: Path) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> int:
    """Compile everything, print failed gates, optionally write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the committed table")
    parser.add_argument("--output", type=Path, help="write the table here instead")
    parser.add_argument("--processes", type=int, default=None)
    arguments = parser.parse_args()
    rows = compile_all(processes=arguments.processes)
    if arguments.output or arguments.write:
        write_table(rows, arguments.output or table_path())
    found = failures(rows)
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
