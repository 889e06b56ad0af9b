"""Time candidates for the tables of tiles on this machine's GPU; print what to paste.

`--family portable` is about kernels/configs.py, hopper about kernels/hopper/tiles.py, which has
tiles for each mask and a kernel more, "fused": dkdv and dq in one. Each kernel goes by itself while
the others keep their entries, the portable forward and dkdv also without a centre ("plain"), in 16
bits. First worker processes, one a core, compile the candidates and compare their results with
float64; one that hangs is ended, which loses that candidate alone. Then one process times the
launches of those that passed, for the shaped formula at the paper's scale 1 / (D sqrt(H)) and for
plain attention at 1 / sqrt(D): B T = 16384 tokens, H D = 2048, medians of interleaved rounds, L2
overwritten before each launch. At the limit it reports what there is.

    python bench/sweep.py [--limit SECONDS] [--kernels forward dkdv dq] [--dims 64 128] ...
    python bench/sweep.py --family hopper ...
    python bench/sweep.py --compile-only 90      # without a GPU
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from shaped_attn import shaped_attention
from shaped_attn.environment import collect
from shaped_attn.kernels import compile_gate, configs, launch
from shaped_attn.kernels.configs import TileConfig
from shaped_attn.kernels.families import use_family
from shaped_attn.testing import (
    Case,
    assert_within_budget,
    eager_attention,
    forward_backward,
    make_inputs,
    poison_empty,
)
from shaped_attn.watchdog import HangError, Job, JobError, Worker


def grid(tiles: list[tuple[int, ...]], *options: dict[str, Any]) -> list[TileConfig]:
    """Each set of options with each (block_t, block_s, num_warps, num_stages)."""
    return [TileConfig(*tile, **option) for option in options for tile in tiles]


ONE_STAGE = {"masked_stages": 1}
PRODUCT = ONE_STAGE | {"row_sums": "product"}
POINTERS = ONE_STAGE | {"use_descriptors": False}
# So many that two programs of 8 warps, or three of 4, share a multiprocessor.
OF_8, OF_4 = ONE_STAGE | {"max_registers": 128}, ONE_STAGE | {"max_registers": 168}
CANDIDATES = {
    "forward": [
        *grid([(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)], ONE_STAGE, PRODUCT),
        *grid([(128, 64, 8, 3)], OF_8, OF_8 | PRODUCT, {}, POINTERS),
        *grid([(64, 64, 4, 3)], OF_4, OF_4 | PRODUCT, {}, POINTERS),
        *grid([(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)], ONE_STAGE),
        *grid([(64, 32, 4, 4), (128, 32, 8, 4)], ONE_STAGE),
    ],
    "dkdv": [
        *grid([(64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)], ONE_STAGE),
        *grid([(64, 64, 4, 2)], OF_4, {}, POINTERS),
        *grid([(64, 64, 4, 1), (64, 128, 8, 1), (64, 64, 8, 2), (32, 64, 4, 3)], ONE_STAGE),
    ],
    "dq": [
        *grid([(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)], ONE_STAGE),
        *grid([(128, 64, 8, 3)], OF_8, {}, POINTERS),
        *grid([(64, 64, 4, 3)], OF_4, {}, POINTERS),
        *grid([(128, 128, 8, 1), (64, 32, 4, 4), (128, 32, 8, 3)], ONE_STAGE),
    ],
}
# dq is the same kernel with a centre and without.
VARIANTS = {"forward": ("", "plain"), "dkdv": ("", "plain"), "dq": ("",)}
RESULTS = {
    "forward": ("out", "lse"),
    "dkdv": ("grad k", "grad v"),
    "dq": ("grad q",),
    "fused": ("grad q", "grad k", "grad v"),
}
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3, "fused": 5}
MASKS = ("full", "causal")


def hopper_candidates(kernel: str, dim: int, present: tuple) -> Iterator[tuple]:
    """Tiles of a Hopper kernel, those that do not fit included: compiling them tells."""
    if kernel == "forward":
        tiles = [(3, 128, 3), (3, 64, 4), (3, 128, 2), (3, 64, 3), (2, 128, 3), (2, 128, 2)]
        tiles += [(2, 64, 4)] if dim == 64 else [(2, 64, 3), (2, 64, 4)]
        names = ("consumers", "block_s", "stages")
        for sizes, row_sums in itertools.product(tiles, ("product", "packed")):
            yield present._replace(**dict(zip(names, sizes, strict=True)), row_sums=row_sums)
        yield present._replace(takes_turns=not present.takes_turns)
        return
    consumers, blocks = (2, 3), (64, 128)
    if kernel == "fused":  # whose two consumers sum a half of dq each, of 64 times 64
        consumers, blocks = (2,), (2 * 64 * 64 // dim,)
    for sizes in itertools.product(consumers, blocks, (2, 3)):
        if kernel == "dq":
            yield from (type(present)(*sizes, is_pinned) for is_pinned in (True, False))
        else:
            yield type(present)(*sizes)


class Family(NamedTuple):
    """What the sweep knows of one family.

    functions: names of what is timed, by kernel; before: of what has to run before the backward's.
    table: the file of its tables.
    """

    functions: dict[str, tuple[str, ...]]
    before: tuple[str, ...]
    table: str


BEFORE = ("attention_fwd_kernel", "attention_bwd_preprocess_kernel")
# Of the Hopper family they also set the counter from which programs take their tiles.
VALUE_SUMS = ("value_sums_kernel", "value_sums_by_key_kernel", "value_prefix_kernel")
FAMILIES = {
    "portable": Family(
        {
            "forward": ("attention_fwd_kernel",),
            "dkdv": ("attention_bwd_dkdv_kernel",),
            "dq": ("attention_bwd_dq_kernel",),
        },
        (*VALUE_SUMS, *BEFORE),
        "kernels/configs.py",
    ),
    "hopper": Family(
        {
            "forward": (*VALUE_SUMS, "attention_fwd_kernel"),
            "dkdv": ("attention_bwd_dkdv_kernel",),
            "dq": ("attention_bwd_dq_kernel",),
            "fused": ("attention_bwd_dkdv_kernel", "convert_dq_kernel"),
        },
        (*VALUE_SUMS, *BEFORE),
        "kernels/hopper/tiles.py",
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS, WIDTH = 16384, 2048

MOST_SPILLS = 1024  # bytes a thread, past which a candidate is not worth its time
RISE = 200.0  # of logits: weights overflow float32 if the maximum of a row stays
JOB_LIMIT = 45  # seconds to compile and check a candidate
CHECK_SHARE = 0.6  # of the limit, for compiling and checking
RESERVE = 20  # seconds to start the process that times, and to report
ROUNDS = 6
ROOT = Path(__file__).resolve().parents[1]


def candidates(kernel: str, present: TileConfig, arch: int | str) -> list[TileConfig]:
    """The table's present entry, then all that differs from it and can differ on `arch`."""
    found = [present]
    for config in CANDIDATES[kernel]:
        if isinstance(arch, str):
            config = replace(config, max_registers=None)  # an option of NVIDIA's
        if isinstance(arch, str) or not 90 <= arch < 120:
            config = replace(config, use_descriptors=True)  # there are none
        if all(replace(config, measured_on=other.measured_on) != other for other in found):
            found.append(config)
    return found


def config_of(row: dict) -> Any:
    """Tiles of a candidate: a `TileConfig`, or what kernels/hopper/tiles.py has for its kernel."""
    if row["family"] == "portable":
        return TileConfig(**row["config"])
    from shaped_attn.kernels.hopper import tiles

    dq_or_dkdv = tiles.DqTile if row["kernel"] == "dq" else tiles.DkdvTile
    return (tiles.ForwardTile if row["kernel"] == "forward" else dq_or_dkdv)(**row["config"])


def masks_of(row: dict, masks: list[str]) -> list[str]:
    """Masks that a candidate is for: one, or all."""
    return [row["mask"]] if row["mask"] else masks


@contextlib.contextmanager
def trying(row: dict, before: bool) -> Iterator[list[tuple]]:
    """Let the kernel of a candidate have its tiles, others their own; launch no other kernels.

    Unless `before`: then those that have to run before it too. Yields a list that receives each
    launch of the kernel with its arguments.
    """
    family, kernel, config = FAMILIES[row["family"]], row["kernel"], config_of(row)
    of_table, run, kept = configs.pick_config, launch.Launch.__call__, []
    functions = family.functions[kernel]

    def pick(name: str, *arguments: Any, **options: Any) -> TileConfig:
        return config if name == kernel else of_table(name, *arguments, **options)

    def run_some(self, *varying: Any) -> None:
        name = self.kernel.fn.__name__
        if name in functions:
            kept.append((self, varying))
        if name in functions or (before and name in family.before):
            run(self, *varying)

    with contextlib.ExitStack() as stack:
        if row["family"] == "portable":
            package, name, replacement = configs.__package__, "pick_config", pick
        else:
            from shaped_attn.kernels.hopper import attention_bwd, attention_fwd  # noqa: F401

            package, name = f"{configs.__package__}.hopper", f"{kernel}_tile"
            replacement = lambda *_: config  # noqa: E731
        for module_name, module in list(sys.modules.items()):  # wherever it is imported
            if module_name.startswith(package) and hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, replacement))
        stack.enter_context(use_family(row["family"]))
        stack.enter_context(mock.patch.object(launch.Launch, "__call__", run_some))
        launch.forget_plans()  # whose keys know nothing of this
        stack.callback(launch.forget_plans)
        yield kept


def case_of(row: dict, is_causal: bool, batch: int, heads: int, length: int) -> tuple[Case, dict]:
    """Sizes of a call and its options."""
    dim, dtype, is_plain = row["dim"], DTYPES[row["dtype"]], row["variant"] == "plain"
    case = Case(
        *(batch, heads, heads, length, length, dim, dim, dtype, is_causal),
        residual_dtype=None if is_plain else dtype,
    )
    if is_plain:
        formula = {"identity_gain": 0.0, "center_gain": 0.0, "scale": dim**-0.5}
    else:
        formula = {"skip_gain": 0.9, "branch_gain": math.sqrt(0.19), "scale": case.scale}
    return case, formula | {"is_causal": is_causal, "return_lse": True}


def ours(row: dict, *args: Any, **options: Any) -> Any:
    """The operator, with sums in any order where one kernel makes all gradients."""
    return triton_attention(*args, **options, deterministic=row["kernel"] != "fused")


triton_attention = functools.partial(shaped_attention, impl="triton")


@functools.lru_cache
def example(case: Case, options: tuple, rises: bool, device: str) -> tuple:
    """Inputs, what a call has to return in float64, and what eager torch does."""
    options = dict(options)
    tensors = make_inputs(case, scale=options["scale"], device=device)._asdict()
    if rises:  # else the running form has nothing to do
        strength = math.sqrt(RISE / options["scale"])
        tensors["q"][..., 0], tensors["k"][..., 0] = strength, 0.0
        tensors["k"][:, :, case.queries // 2 :, 0] = strength
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(tensors["q"].shape, generator=generator).to(tensors["q"])
    exact = {name: None if x is None else x.double() for name, x in tensors.items()}
    golden = forward_backward(shaped_attention, exact, d_out, impl="reference", **options)
    eager = forward_backward(eager_attention, tensors, d_out, **options)
    return tensors, d_out, golden, eager


def check(row: dict, length: int = 512, device: str = "cuda") -> dict[str, Any]:
    """Compile and run one candidate; raise if a result is over the budget of the package's tests.

    Returns registers, bytes of spills a thread and shared memory of each form of the kernel.
    """
    kernel, eps32 = row["kernel"], torch.finfo(torch.float32).eps
    masks = masks_of(row, list(MASKS))
    with trying(row, before=True) as kept, poison_empty():
        for mask, rises in itertools.product(masks, (False, True)):
            if rises and kernel != "forward":
                continue
            is_causal = mask == "causal"
            case, options = case_of(row, is_causal, 1, 2, length)
            inputs = example(case, tuple(options.items()), rises, device)
            tensors, d_out, golden, eager = inputs
            attention = functools.partial(ours, row)
            actual = forward_backward(attention, tensors, d_out, **options)
            for name in RESULTS[kernel]:
                yardstick, rounding = eager[name], None
                if rises:
                    # Where eager torch rounds logits this large it is no yardstick. Weights and
                    # result are rounded once each, and a score is a float32 sum of D products.
                    yardstick = golden[name]
                    rounding = torch.finfo(case.dtype).eps + (case.head_dim + 2) * eps32 * RISE
                elif name.startswith("grad"):  # one factor of its product, and the result
                    rounding = torch.finfo(case.dtype).eps + 8 * eps32
                assert_within_budget(
                    actual[name], golden[name], yardstick, factor=2, name=name, rounding=rounding
                )
    compiled = {form_of(found): found.compiled for found, _ in kept}
    return {
        "forms": [
            {
                "kernel": f"{kernel} {name}".strip(),
                "registers": form.n_regs,
                "spills": 4 * form.n_spills,
                "shared": form.metadata.shared,
            }
            for name, form in compiled.items()
            if form is not None  # in the interpreter
        ]
    }


def form_of(found: launch.Launch) -> str:
    """Which form of a kernel a launch is of."""
    if "C" in found.constants:
        return ""
    name = found.kernel.fn.__name__
    if name.startswith(("value", "convert")):  # runs beside the kernel
        return name.removesuffix("_kernel")
    return {True: "bounded", False: "running"}.get(found.constants.get("BOUNDED"), "")


def compile_only(row: dict, arch: int | str) -> dict[str, Any]:
    """Compile one candidate for `arch` as the compile gate does, where all gains are learned."""
    if row["family"] == "hopper":
        from shaped_attn.kernels.hopper import compile_gate as gate

        case = gate.Case(row["dtype"], row["dim"], row["mask"] == "causal", "fixed")
        case = case._replace(is_deterministic=row["kernel"] != "fused")
        with trying(row, before=False):
            forms = gate.compile_case(case)
        names = ("kernel", "loop", "loop_spills", "spills", "shared", "serialized")
    else:
        variant = compile_gate.VARIANTS[row["variant"] == "plain"]
        with trying(row, before=False):
            forms = compile_gate.compile_case(
                compile_gate.Case(arch, row["dtype"], row["dim"], variant)
            )
        names = ("kernel", "registers", "spills", "shared", "serialized")
    return {"forms": [{name: getattr(form, name) for name in names} for form in forms]}


def time_group(
    rows: list[dict], masks: list[str], length: int, seconds: float, device: str = "cuda"
) -> dict[str, Any]:
    """Milliseconds of candidates of one kernel by mask, in the order of `rows`."""
    end = time.monotonic() + seconds
    answers, calls, times = [{"ms": {}} for _ in rows], [], collections.defaultdict(list)
    sizes = (TOKENS // length, WIDTH // rows[0]["dim"], length)
    shape, dtype = (*sizes, rows[0]["dim"]), DTYPES[rows[0]["dtype"]]
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(5)]
    d_out, leaves = tensors[0].detach(), tensors[1 : 4 if rows[0]["variant"] == "plain" else 5]
    for (row, answer), mask in (
        (pair, mask)
        for pair in zip(rows, answers, strict=True)
        for mask in masks_of(pair[0], masks)
    ):
        if time.monotonic() > end:
            answer.setdefault("reason", "not timed before the limit")
            continue
        _, options = case_of(row, mask == "causal", *sizes)
        try:
            with trying(row, before=True) as kept:
                out, _ = ours(row, *leaves, **options)
                if row["kernel"] != "forward":
                    torch.autograd.grad(out, leaves, d_out)
            calls.append((answer, mask, kept))
        except Exception as error:
            answer["reason"] = in_words(error)
    for turn, (answer, mask, kept) in itertools.product(range(ROUNDS), calls):
        if turn == 0 or time.monotonic() < end:
            ms = triton.testing.do_bench(
                lambda kept=kept: [one(*varying) for one, varying in kept],
                warmup=1,
                rep=8,
                return_mode="median",
            )  # with L2 overwritten before each
            times[id(answer), mask].append(ms)
    for answer, mask, _ in calls:
        answer["ms"][mask] = statistics.median(times[id(answer), mask])
    return {"answers": answers}


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def attempt(function: Callable[..., dict], arguments: dict[str, Any]) -> dict[str, Any]:
    """What a function returns, or why it fails."""
    try:
        return function(**arguments)
    except Exception as error:
        return {"reason": in_words(error)}


def run_jobs(jobs: list[tuple], processes: int, job_limit: float, limit: float) -> list[dict]:
    """Answers of worker processes to the jobs, or the reason there is none; limits in seconds.

    A process is ended that is late or fails: a GPU may not take another launch from it.
    """
    deadline = time.monotonic() + limit
    answers = [{"reason": "not reached before the limit"} for _ in jobs]
    waiting = collections.deque(enumerate(jobs))

    def work() -> None:
        worker = None
        while (left := deadline - time.monotonic()) > 0:
            try:
                index, (function, arguments) = waiting.popleft()
            except IndexError:  # all are done
                break
            job = Job("", attempt, {"function": function, "arguments": arguments})
            try:
                if worker is None:
                    worker = Worker(left, stderr=subprocess.DEVNULL)
                    worker.receive()  # it has started
                worker.send(job, min(job_limit, max(0, deadline - time.monotonic())))
                answers[index] = worker.receive()
            except HangError as error:
                answers[index] = {"reason": f"no answer in {error.seconds:.0f} s"}
            except JobError as error:
                answers[index] = {"reason": str(error).removeprefix(": ")}
            if "reason" in answers[index]:
                worker.end()
                worker = None
        if worker is not None:
            worker.end()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def refuse(row: dict[str, Any], shared_memory: float = math.inf) -> None:
    """Give a candidate that is not worth its time the reason; the present entry may spill.

    So may the Hopper kernels, outside their loops.
    """
    for form in row.get("forms", ()):
        if form["shared"] > shared_memory:
            row["reason"] = f"{form['shared']} bytes of shared memory"
        elif form["spills"] > MOST_SPILLS and row["candidate"] > 0 and row["family"] == "portable":
            row["reason"] = f"{form['spills']} bytes of spills a thread"


def groups_of(rows: list[dict]) -> list[tuple[tuple[str, str, int, str], list[dict]]]:
    """Candidates by kernel, variant, head dimension and mask, which are in order."""
    names = ("kernel", "variant", "dim", "mask")
    groups = itertools.groupby(rows, lambda row: tuple(row[name] for name in names))
    return [(key, list(group)) for key, group in groups]


def mean(row: dict[str, Any], masks: list[str]) -> float:
    """Geometric mean of the times, infinite where one is missing."""
    times = [row.get("ms", {}).get(mask, math.inf) for mask in masks_of(row, masks)]
    return math.prod(times) ** (1 / len(times))


def source(config: Any) -> str:
    """`TileConfig(...)` with what differs from the defaults; a tile of Hopper's in the same way."""
    if isinstance(config, tuple):
        names, defaults = config._fields, config._field_defaults
    else:
        names = [x.name for x in fields(config)]
        defaults = {x.name: x.default for x in fields(config) if x.default is not MISSING}
    words = [
        (f"{name}=" if name in defaults else "") + repr(value).replace("'", '"')
        for name in names
        if (value := getattr(config, name)) != defaults.get(name, MISSING)
    ]
    return f"{type(config).__name__}({', '.join(words)})"


def lines_to_paste(rows: list[dict], masks: list[str], gpu: str) -> list[str]:
    """Entries for the tables: the fastest, where they are not by mask by the mean over the masks.

    The Hopper forward has one entry for both masks.
    """
    entries: dict[str, list[str]] = {}
    for (kernel, variant, dim, mask), group in groups_of(rows):
        best = min(group, key=lambda row: mean(row, masks))
        if mean(best, masks) < math.inf:
            config, key = config_of(best), f"({dim}, {mask == 'causal'})" if mask else dim
            if isinstance(config, TileConfig):
                config = replace(config, measured_on=gpu)
            entry = entries.setdefault(f"{kernel} {variant}".strip(), [])
            entry.append(f"{key}: {source(config)}")
    return [f'"{name}": {{{", ".join(entry)}}},' for name, entry in entries.items()]


def short_name(gpu: str) -> str:
    """What `measured_on` calls a GPU: "NVIDIA H100 80GB HBM3" is "H100"."""
    found = re.search(r"(RTX )?\b\w*\d\w*", gpu)
    return found.group() if found else gpu


def report(rows: list[dict], masks: list[str], length: int) -> Iterator[str]:
    """A table for each kernel, variant and head dimension, the fastest first."""
    yield "ms, TFLOP/s, ms / that of the present entry for " + " and ".join(masks)
    if any("loop" in form for row in rows for form in row.get("forms", ())):
        yield "instructions of the hot loop/spills in it/bytes of all spills/of shared memory"
    else:
        yield "registers/bytes of spills/of shared memory of each form of a kernel, s: serialised"
    for (kernel, variant, dim, of_mask), group in groups_of(rows):
        yield f"\n{kernel} {variant or 'centred'} D={dim} {of_mask}".rstrip()
        for row in sorted(group, key=lambda row: mean(row, masks)):
            words = []
            for mask, ms in row.get("ms", {}).items():
                pairs = length * (length + 1) / 2 if mask == "causal" else length**2
                flops = PRODUCTS[kernel] * 2 * TOKENS / length * WIDTH * pairs
                to_present = ms / group[0].get("ms", {}).get(mask, math.nan)
                words.append(f"{ms:7.3f} {flops / ms / 1e9:4.0f} {to_present:6.3f}")
            for form in row.get("forms", ()):
                names = ("registers", "loop", "loop_spills", "spills", "shared")
                numbers = "/".join(str(form[name]) for name in names if name in form)
                words.append(numbers + "s" * form.get("serialized", False))
            words.append(source(config_of(row)) + " (present)" * (row is group[0]))
            yield "  ".join([*words, row.get("reason", "")]).rstrip()


def architecture() -> int | str:
    return launch.architecture(torch.empty(0, device="cuda"))


def rows_of(arguments: argparse.Namespace, arch: int | str) -> Iterator[dict[str, Any]]:
    """All candidates, each group's present entry first."""
    is_hopper = arguments.family == "hopper"
    for kernel in arguments.kernels:
        for variant, dim, mask in itertools.product(
            ("",) if is_hopper else VARIANTS[kernel],
            arguments.dims,
            arguments.masks if is_hopper else ("",),
        ):
            if is_hopper:
                found = hopper_tiles(kernel, dim, mask == "causal", arguments.length)
                found = [tile._asdict() for tile in found]
            else:
                present = configs.pick_config(
                    kernel, dim, dim, 2, arch, weighed_by=None, is_centered=variant == ""
                )
                found = [asdict(config) for config in candidates(kernel, present, arch)]
            fixed = {"family": arguments.family, "kernel": kernel, "variant": variant, "dim": dim}
            fixed |= {"mask": mask, "dtype": arguments.dtype}
            for index, config in enumerate(found):
                yield fixed | {"candidate": index, "config": config}


def hopper_tiles(kernel: str, dim: int, is_causal: bool, length: int) -> list[tuple]:
    """The present tile of a Hopper kernel, or what one would start from; then all others."""
    from shaped_attn.kernels.hopper import tiles

    present = {
        "forward": lambda: tiles.forward_tile(dim, is_causal, length),
        "dkdv": lambda: tiles.dkdv_tile(dim, is_causal),
        "dq": lambda: tiles.dq_tile(dim, is_causal),
        "fused": lambda: (
            tiles.fused_tile(dim, is_causal)
            or next(hopper_candidates(kernel, dim, tiles.DkdvTile(2, 64, 2)))
        ),
    }[kernel]()
    return list(dict.fromkeys([present, *hopper_candidates(kernel, dim, present)]))


def sweep(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    masks, arch = arguments.masks, arguments.compile_only
    gpu = None if arch else torch.cuda.get_device_name()
    if arch is None:
        arch = architecture()
    rows = list(rows_of(arguments, arch))
    # All present entries first, so that at the limit no group is without.
    jobs = sorted(rows, key=lambda row: row["candidate"])
    limit = CHECK_SHARE * arguments.limit if gpu else arguments.limit
    answers = run_jobs(
        [
            (check, {"row": row}) if gpu else (compile_only, {"row": row, "arch": arch})
            for row in jobs
        ],
        arguments.processes,
        JOB_LIMIT,
        limit,
    )
    for row, answer in zip(jobs, answers, strict=True):
        row |= answer
        refuse(row, math.inf if gpu else compile_gate.SHARED_MEMORY[arch])
    seconds = {"compiling and checking": time.monotonic() - start}
    if gpu:
        passed = groups_of([row for row in rows if "reason" not in row])
        left = arguments.limit - (time.monotonic() - start)
        share = max(0.0, left - RESERVE) / max(1, len(passed))
        same = {"masks": masks, "length": arguments.length, "seconds": share}
        timed = [(time_group, {"rows": group, **same}) for _, group in passed]
        answers = run_jobs(timed, 1, share + RESERVE, left)
        for (_, group), answer in zip(passed, answers, strict=True):
            for row, found in zip(group, answer.get("answers", [answer] * len(group)), strict=True):
                row |= found
    seconds["all"] = time.monotonic() - start
    print("\n".join(report(rows, masks, arguments.length)))
    found = lines_to_paste(rows, masks, short_name(gpu)) if gpu else []
    if gpu:
        print(f"\nThe fastest, for {FAMILIES[arguments.family].table}:", *found, sep="\n")
    folder = re.sub(r"[^a-z0-9]+", "-", gpu.lower()) if gpu else None
    name = "sweep.json" if arguments.family == "portable" else f"sweep_{arguments.family}.json"
    output = arguments.output or (folder and ROOT / "bench" / "results" / folder / name)
    if output:
        result = {
            "command": " ".join(["python bench/sweep.py", *sys.argv[1:]]),
            "unit": "milliseconds of the one kernel, median",
            "environment": collect(),
            "architecture": arch,
            "family": arguments.family,
            "sizes": {"B T": TOKENS, "H D": WIDTH, "T": arguments.length},
            "limit": arguments.limit,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "to paste": found,
            "candidates": rows,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    add("--limit", type=float, default=180, help="in seconds, default: %(default)s")
    add("--family", choices=FAMILIES, default="portable")
    kernels = list(FAMILIES["hopper"].functions)
    add("--kernels", nargs="+", choices=kernels, help="default: all of the family")
    add("--dims", nargs="+", type=int, choices=(64, 128), default=[64, 128])
    add("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    add("--dtype", choices=DTYPES, default="bf16")
    add("--length", type=int, choices=[2**n for n in range(10, 15)], default=4096)
    add("--processes", type=int, default=os.cpu_count())
    add("--output", type=Path, help="default: sweep.json or the like in bench/results/GPU")
    arch = {"type": lambda x: int(x) if x.isdigit() else x, "choices": configs.ARCHITECTURES}
    add("--compile-only", help="an architecture, no GPU is needed", **arch)
    arguments = parser.parse_args()
    of_family = FAMILIES[arguments.family].functions
    arguments.kernels = arguments.kernels or list(of_family)
    for kernel in set(arguments.kernels) - set(of_family):
        parser.error(f"--kernels must be of the family {arguments.family}, got {kernel}. Drop it.")
    if arguments.family == "hopper" and arguments.compile_only not in (None, 90):
        parser.error(
            "--family hopper must be compiled for 90, got --compile-only "
            f"{arguments.compile_only}. Correct it, or choose another family."
        )
    if launch.is_interpreted():
        parser.error("TRITON_INTERPRET must be unset, got it set. Compiled kernels are timed.")
    if arguments.compile_only is None and not torch.cuda.is_available():
        print(
            "bench/sweep.py times kernels on a GPU: NVIDIA from sm_80 or AMD gfx942.\n"
            f"This machine lacks a GPU that torch sees (torch {torch.__version__} sees none).\n"
            "Without a GPU, `--compile-only 90` compiles the candidates for sm_90.",
            file=sys.stderr,
        )
        return 2
    if arguments.family == "hopper" and arguments.compile_only is None and architecture() != 90:
        parser.error(
            f"--family hopper must run on a Hopper GPU (sm_90), this is {architecture()}. "
            "Choose --family portable, or --compile-only 90."
        )
    return sweep(arguments)


if __name__ == "__main__":
    import sweep  # under this name workers find its functions

    sys.exit(sweep.main())
