"""The emulator of Gluon kernels: right kernels are right under any schedule, bugs are found."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from gluon_emulator import emulated, run
from gluon_mutants import edited, mutants
from gluon_schedule import (
    BarrierError,
    BoundsError,
    Deadlock,
    EmulationError,
    RaceError,
    RegisterError,
    UninitializedError,
    UnsupportedError,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from shaped_attn.kernels.configs import TileConfig
from shaped_attn.kernels.launch import Launch

# Triton 3.9 renamed these.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)
SEEDS = range(3)


def descriptor(tensor, rows, width=None):
    """A descriptor of (B, H, T, D), or of fewer dimensions, in blocks of `rows` times `width`."""
    block = [*[1] * (tensor.ndim - 2), rows, width or tensor.shape[-1]]
    dtype = getattr(gl, str(tensor.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def strided(*shape, dtype=torch.bfloat16):
    """Random numbers in a layout (B, T, H, 2 D), of which the tensor (B, H, T, D) is a part."""
    B, H, T, D = shape
    return torch.randn(B, T, H, 2 * D).to(dtype).transpose(1, 2)[..., :D]


# ------------------------------------------------------------ a pipelined copy, staged on its way
@gluon.jit
def _copy_in(source, ring, bars, tiles, STAGES: gl.constexpr):
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(bars.index(STAGES + stage), (i // STAGES) & 1 ^ 1)
        mbarrier.expect(bars.index(stage), source.block_type.nbytes)
        place = [gl.program_id(0), gl.program_id(1), i * ROWS, 0]
        tma_load(source, place, bars.index(stage), ring.index(stage))


@gluon.jit
def _copy_out(target, ring, staging, bars, tiles, factor, STAGES: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        x = ring.index(stage).reshape([ROWS, D]).load(layout)
        mbarrier.arrive(bars.index(STAGES + stage), count=1)
        x = (x.to(gl.float32) * factor).to(x.dtype)
        tma.store_wait(0)
        barrier()
        staging.reshape([ROWS, D]).store(x)
        fence_async_shared()
        barrier()
        tma_store(target, [gl.program_id(0), gl.program_id(1), i * ROWS, 0], staging)
    tma.store_wait(0)


@gluon.jit
def copy_kernel(source, target, T, factor, STAGES: gl.constexpr, D: gl.constexpr):
    ring = gl.allocate_shared_memory(source.dtype, [STAGES, 1, 1, ROWS, D], source.layout)
    staging = gl.allocate_shared_memory(target.dtype, [1, 1, ROWS, D], target.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    tiles = (T + ROWS - 1) // ROWS
    gl.warp_specialize(
        [
            (_copy_out, (target, ring, staging, bars, tiles, factor, STAGES, D)),
            (_copy_in, (source, ring, bars, tiles, STAGES)),
        ],
        [1],
        [24],
    )


def copied(seed=0, dtype=torch.bfloat16, B=1, H=2, T=300, D=64, interleave=1):
    """Whether the copy is right, and the statistics."""
    torch.manual_seed(0)
    source, target = strided(B, H, T, D, dtype=dtype), torch.full((B, H, T, D), math.nan).to(dtype)
    width = triton.next_power_of_2(D)
    arguments = descriptor(source, 64, width), descriptor(target, 64, width), T, 2.0
    options = {"STAGES": 2, "D": width, "num_warps": 4}
    statistics = run(copy_kernel, (B, H), *arguments, seed=seed, interleave=interleave, **options)
    return torch.equal(target, source * 2), statistics


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy(seed, dtype):
    assert copied(seed, dtype)[0]


@pytest.mark.parametrize("B, H, T, D", [(2, 3, 64, 64), (1, 1, 1, 64), (1, 2, 130, 40)])
def test_copy_of_ragged_tensors(B, H, T, D):
    """Blocks reach past the last row and past the last column."""
    right, statistics = copied(B=B, H=H, T=T, D=D, interleave=2)
    assert right and statistics.programs == B * H


# ---------------------------------------------- a product with k and v in rings, taking turns
@dataclass(frozen=True)
class Sizes:
    """Constants of the kernel below."""

    stages: gl.constexpr
    width: gl.constexpr
    dtype: gl.constexpr

    @property
    def accumulator(self):
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def _turn(number: gl.constexpr, HOW: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.{HOW} {number}, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _bar(bars, kind: gl.constexpr, stage, C: gl.constexpr):
    """K full, k empty, v full, v empty, after those of the two tiles of q."""
    return bars.index(stage + (2 + kind * C.stages))


@gluon.jit
def _attend_in(q, k, v, tiles, ring, bars, blocks, C: gl.constexpr):
    for c in gl.static_range(2):
        mbarrier.expect(bars.index(c), q.block_type.nbytes)
        tma_load(q, [2 * gl.program_id(0) * ROWS + c * ROWS, 0], bars.index(c), tiles.index(c))
    for j in range(blocks):
        stage = j % C.stages
        parity = (j // C.stages) & 1
        mbarrier.wait(_bar(bars, 1, stage, C), parity ^ 1)
        mbarrier.expect(_bar(bars, 0, stage, C), k.block_type.nbytes)
        tma_load(k, [j * ROWS, 0], _bar(bars, 0, stage, C), ring.index(stage))
        mbarrier.wait(_bar(bars, 3, stage, C), parity ^ 1)
        mbarrier.expect(_bar(bars, 2, stage, C), v.block_type.nbytes)
        tma_load(v, [j * ROWS, 0], _bar(bars, 2, stage, C), ring.index(C.stages + stage))


@gluon.jit
def _attend(out, tiles, ring, bars, blocks, c: gl.constexpr, C: gl.constexpr):
    layout: gl.constexpr = C.accumulator
    tile = tiles.index(c)
    acc = gl.zeros([ROWS, C.width], gl.float32, layout)
    if c == 1:
        _turn(8, "arrive")
    mbarrier.wait(bars.index(c), 0)
    for j in range(blocks):
        stage = j % C.stages
        parity = (j // C.stages) & 1
        zeros = gl.zeros([ROWS, ROWS], gl.float32, layout)
        mbarrier.wait(_bar(bars, 0, stage, C), parity)
        _turn(8 + c, "sync")
        k = ring.index(stage).permute([1, 0])
        scores = warpgroup_mma(tile, k, zeros, use_acc=False, is_async=True)
        _turn(9 - c, "arrive")
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(_bar(bars, 1, stage, C), count=1)
        a = gl.convert_layout(scores.to(C.dtype), gl.DotOperandLayout(0, layout, 2))
        mbarrier.wait(_bar(bars, 2, stage, C), parity)
        acc = warpgroup_mma(a, ring.index(C.stages + stage), acc, is_async=True)
        acc, a = warpgroup_mma_wait(0, deps=[acc, a])
        mbarrier.arrive(_bar(bars, 3, stage, C), count=1)
    tile.store(acc.to(C.dtype))
    fence_async_shared()
    barrier()
    tma_store(out, [2 * gl.program_id(0) * ROWS + c * ROWS, 0], tile)
    tma.store_wait(0)


@gluon.jit
def attend_kernel(q, k, v, out, S, C: gl.constexpr):
    tiles = gl.allocate_shared_memory(C.dtype, [2, ROWS, C.width], q.layout)
    ring = gl.allocate_shared_memory(C.dtype, [2 * C.stages, ROWS, C.width], k.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2 + 4 * C.stages, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    for i in gl.static_range(C.stages):
        mbarrier.init(_bar(bars, 0, i, C), count=1)
        mbarrier.init(_bar(bars, 1, i, C), count=2)
        mbarrier.init(_bar(bars, 2, i, C), count=1)
        mbarrier.init(_bar(bars, 3, i, C), count=2)
    fence_async_shared()
    blocks = (S + ROWS - 1) // ROWS
    gl.warp_specialize(
        [
            (_attend, (out, tiles, ring, bars, blocks, gl.constexpr(0), C)),
            (_attend, (out, tiles, ring, bars, blocks, gl.constexpr(1), C)),
            (_attend_in, (q, k, v, tiles, ring, bars, blocks, C)),
        ],
        [4, 1],
        [160, 24],
    )


def attended(seed=0, dtype=torch.bfloat16, T=200, S=300):
    """Whether round(q k') v is right, and the result."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(length, 64).to(dtype) for length in (T, S, S))
    out = torch.full((T, 64), math.nan).to(dtype)
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    sizes = Sizes(*(gl.constexpr(x) for x in (2, 64, kind)))
    arguments = [descriptor(x, 64) for x in (q, k, v, out)]
    run(attend_kernel, (triton.cdiv(T, 128),), *arguments, S, sizes, seed=seed, num_warps=4)
    q, k, v = q.double(), k.double(), v.double()
    # Scores and results are rounded once each; sums of float32 add 2^-24 of their terms each.
    unit = torch.finfo(dtype).eps / 2
    sums = 2**-24
    scores = (unit + 64 * sums) * (q.abs() @ k.abs().T)
    budget = scores @ v.abs() + (S * sums + unit) * ((q @ k.T).abs() + scores) @ v.abs()
    return bool(((out - q @ k.T @ v).abs() <= budget).all()), out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend(dtype):
    results = [attended(seed, dtype) for seed in SEEDS]
    assert all(right for right, _ in results)
    assert all(torch.equal(results[0][1], out) for _, out in results)


# ------------------------------------------------------------------- tiles from an atomic counter
@gluon.jit
def _hand_out(counter, slot, bars, tiles):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = 0
    tile = 0
    while tile < tiles:
        tile = gl.atomic_add(counter, 1)
        mbarrier.wait(bars.index(1), i & 1 ^ 1)
        slot.store(gl.full([1], tile, gl.int32, layout))
        barrier()
        mbarrier.arrive(bars.index(0), count=1)
        i += 1


@gluon.jit
def _next_tile(slot, bars, i):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(bars.index(0), i & 1)
    tile = gl.max(slot.load(layout), 0)
    mbarrier.arrive(bars.index(1), count=1)
    return tile


@gluon.jit
def _count(out, slot, bars, tiles, c: gl.constexpr):
    i = 0
    tile = _next_tile(slot, bars, i)
    while tile < tiles:
        old = gl.load(out + 2 * tile + c)
        gl.store(out + 2 * tile + c, old + tile + 1)
        i += 1
        tile = _next_tile(slot, bars, i)


@gluon.jit
def counter_kernel(counter, out, tiles):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slot = gl.allocate_shared_memory(gl.int32, [1], plain)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=2)
    gl.warp_specialize(
        [
            (_count, (out, slot, bars, tiles, gl.constexpr(0))),
            (_count, (out, slot, bars, tiles, gl.constexpr(1))),
            (_hand_out, (counter, slot, bars, tiles)),
        ],
        [4, 1],
        [160, 24],
    )


def counted(seed=0, interleave=3):
    counter, out = torch.zeros(1, dtype=torch.int32), torch.full((9, 2), 100, dtype=torch.int32)
    run(counter_kernel, (3,), counter, out, 9, seed=seed, interleave=interleave, num_warps=4)
    return out.tolist() == [[101 + i, 101 + i] for i in range(9)]


@pytest.mark.parametrize("interleave", [1, 3])
def test_counter(interleave):
    assert all(counted(seed, interleave) for seed in SEEDS)


# ------------------------------------------------------------------------------------------ bugs
KERNELS = {
    "copy": (copy_kernel, lambda seed: copied(seed)[0]),
    "attend": (attend_kernel, lambda seed: attended(seed)[0]),
    "counter": (counter_kernel, counted),
}
HARMLESS = "_turn: gl.inline_asm_elementwise("  # turns are for speed: no turns at all do no harm


@pytest.mark.parametrize("name", KERNELS)
def test_every_synchronisation_counts(name):
    """Each one left out, weakened or early is found under each seed, and nothing is without it."""
    kernel, is_right = KERNELS[name]
    missed, names = [], []
    for mutant in mutants(kernel):
        names.append(mutant.name)
        for seed in SEEDS:
            with mutant.active():
                try:
                    found = not is_right(seed)
                except EmulationError:
                    found = True
            if found == mutant.name.startswith(HARMLESS):
                missed.append((mutant.name, seed))
    assert not missed
    assert len(names) == len(set(names))
    assert is_right(0)  # no mutant stays


def test_the_mutants_of_the_copy():
    """One of each kind is there, by the name that lists of harmless mutants refer to."""
    names = {mutant.name for mutant in mutants(copy_kernel)}
    assert len(names) == 23
    load = "x = ring.index(stage).reshape([ROWS, D]).load(layout)"
    assert names >= {
        "_copy_out: fence_async_shared() left out #1",
        "_copy_out: tma.store_wait(0) waits for one less #2",
        f"_copy_out: mbarrier.arrive(bars.index(STAGES + stage), count=1) ahead of {load} #1",
        "_copy_in: mbarrier.wait(bars.index(STAGES + stage), i // STAGES & 1 ^ 1)"
        " with the other parity #1",
        "_copy_in: mbarrier.expect(bars.index(stage), source.block_type.nbytes) expects half #1",
        "copy_kernel: mbarrier.init(bars.index(i), count=1) counts one more #1",
    }


EDITS = {
    "the other stage": (
        _attend,
        "k = ring.index(stage)",
        "k = ring.index((stage + 1) % C.stages)",
        (RaceError, UninitializedError),
    ),
    "the other's tile": (_attend, "tile = tiles.index(c)", "tile = tiles.index(1 - c)", RaceError),
    "no phase of a ring": (_attend, "(j // C.stages) & 1", "0", EmulationError),
    "output ahead of the product": (
        _attend,
        "        acc, a = warpgroup_mma_wait(0, deps=[acc, a])\n",
        "        acc, a = warpgroup_mma_wait(1, deps=[acc, a])\n",
        RegisterError,
    ),
    "turn of the other": (
        _attend,
        '_turn(9 - c, "arrive")',
        '_turn(8 + c, "arrive")',
        BarrierError,
    ),
    "arrival too much": (
        _copy_out,
        "    tma.store_wait(0)\n    ",
        "    tma.store_wait(0)\n        mbarrier.arrive(bars.index(STAGES), count=1)\n    ",
        EmulationError,
    ),
    "a row off": (_copy_out, "i * ROWS", "i * ROWS + 1", None),
    "rows past the ring": (_copy_in, "ring.index(stage)", "ring.index(i)", BoundsError),
    "a block too much": (
        _attend_in,
        "for j in range(blocks)",
        "for j in range(blocks + 1)",
        EmulationError,
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_bug(name):
    function, old, new, expected = EDITS[name]
    is_right = KERNELS["attend" if function in (_attend, _attend_in) else "copy"][1]
    for seed in SEEDS:
        with edited(function, old, new).active():
            if expected is None:
                assert not is_right(seed)
            else:
                with pytest.raises(expected):
                    is_right(seed)


def test_edit_of_what_is_not_there():
    with pytest.raises(ValueError, match="old must occur once in _attend, not 0 times"):
        edited(_attend, "k = ring.index(3)", "")
    with pytest.raises(ValueError, match="not 2 times"):
        edited(_copy_out, "barrier()", "")


def test_errors_say_where():
    with (
        edited(_attend, "mbarrier.arrive(_bar(bars, 3, stage, C), count=1)", "pass").active(),
        pytest.raises(Deadlock) as error,
    ):
        attended()
    waits = r"program 0, partition 2 \(_attend_in\) waits for parity 0 of bars\[8\] in phase 0"
    place = (
        r" \(2 of 2 arrivals and 0 bytes are missing\), test_gluon_emulator.py:\d+ in _attend_in"
    )
    assert re.search(waits + place, str(error.value))
    with (
        edited(_copy_out, "mbarrier.wait(bars.index(stage), (i // STAGES) & 1)", "pass").active(),
        pytest.raises(RaceError) as error,
    ):
        copied(H=1)
    text = str(error.value)
    assert re.match(r"load of ring\[\d\] \(bf16 \[64, 64\]\) after the TMA load of program 0", text)
    here = r"program 0, partition 0 \(_copy_out\), test_gluon_emulator.py:\d+ in _copy_out, called"
    assert re.search(r"in _copy_in: nothing orders them\n  " + here, text)


@gluon.jit
def _halves(tile, value, START: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    tile.slice(START, 32, dim=1).store(gl.full([64, 32], value, gl.float32, layout))


@gluon.jit
def halves_kernel(START: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile = gl.allocate_shared_memory(gl.float32, [64, 64], plain)
    gl.warp_specialize([(_halves, (tile, 1.0, 0)), (_halves, (tile, 2.0, START))], [4], [120])


def test_columns_of_a_tile_are_told_apart():
    """Their ranges of addresses overlap, their elements do not."""
    run(halves_kernel, 1, 32)
    with pytest.raises(RaceError, match=r"store of tile.slice\((0|16), 32, dim=1\)"):
        run(halves_kernel, 1, 16)


@gluon.jit
def twice_kernel(out):
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    barrier()
    mbarrier.arrive(bars.index(0), count=1)
    mbarrier.arrive(bars.index(0), count=1)
    mbarrier.wait(bars.index(0), 0)
    gl.store(out, 1)


def test_a_phase_that_passes_unseen():
    """The wait would block: it takes phase 2 for phase 0."""
    with pytest.raises(BarrierError, match="wait for phase 0 of .*in phase 2.* is long past"):
        run(twice_kernel, 1, torch.zeros(1))


@gluon.jit
def large_kernel(ROWS_TAKEN: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    gl.allocate_shared_memory(gl.float32, [ROWS_TAKEN, 256], plain)


def test_shared_memory_is_finite():
    assert run(large_kernel, 1, 227).shared_bytes == 227 * 1024
    with pytest.raises(BoundsError, match="233472 bytes of shared memory, of 232448"):
        run(large_kernel, 1, 228)


# --------------------------------------------------------------------------------- the schedule
def test_schedules_differ_and_can_be_repeated():
    statistics = [copied(seed)[1] for seed in (*range(8), *range(8))]
    assert statistics[:8] == statistics[8:]
    assert {x.most_in_flight["TMA load"] for x in statistics} == {1, 2}


# -------------------------------------------------------------------------------------- values
@triton.jit
def _shifted(pointers, i, KINDS: tl.constexpr):
    """A helper in plain Triton: clamp, and add what is there."""
    i = tl.minimum(tl.maximum(i, 0), 5)
    value = i
    if pointers[1] is not None:
        value += tl.load(pointers[1] + i).to(tl.int32)
    if KINDS[0] and pointers[0] is None:
        value = tl.where(value > 100, -value, value)
    return value


class Limits(NamedTuple):
    low: int
    high: int


@gluon.jit
def values_kernel(x, ints, floats, pointers, limits, n, scale, KINDS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 8, layout)
    v = gl.load(x + i, mask=i < n, other=1.0)
    a = i - 4
    gl.store(ints + i, a // 3)
    gl.store(ints + 8 + i, a % 3)
    gl.store(ints + 16 + i, (a << 30) >> 30)
    gl.store(ints + 24 + i, v.to(gl.float32).to(gl.int32, bitcast=True) & -65536)
    halves = [a / 3, (v * 0.1).to(gl.float32)]
    packed = gl.inline_asm_elementwise(
        "{ .reg .pred never; cvt.rn.bf16x2.f32 $0, $2, $1; setp.eq.u32 never, $0, 0x7fc17fc1;"
        " @never bar.arrive 15, 128; }",
        "=r,r,r",
        halves,
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    gl.store(ints + 32 + i, packed)
    bits = gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 4; lop3.b32 $0, $0, $2, 0xff, 0x6a; mov.b32 $1, $3;",
        "=r,=r,r,r",
        [a],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )
    gl.store(ints + 40 + i, bits)
    gl.store(ints + 48 + i, gl.full([8], limits.high, gl.int32, layout) - limits[0])
    for j in gl.static_range(8):
        gl.store(ints + 56 + j, _shifted(pointers, gl.program_id(0) + j, KINDS))
    gl.store(floats + i, a / 3)
    gl.store(floats + 8 + i, v * 0.1)
    gl.store(floats + 16 + i, (packed >> 16).to(gl.int16).to(x.dtype.element_ty, bitcast=True))
    gl.store(floats + 24 + i, gl.maximum(gl.full([8], float("nan"), gl.float32, layout), scale))
    gl.atomic_add(floats + 32 + a * 0, v.to(gl.float32))


def test_values():
    x = torch.randn(8).bfloat16()
    ints, floats = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(5, 8)
    pointers = (None, torch.arange(98, 104, dtype=torch.uint8))
    options = {"KINDS": (True, gl.float32)}
    run(values_kernel, 1, x, ints, floats, pointers, Limits(3, 10), 6, 0.5, **options)
    v = torch.where(torch.arange(8) < 6, x, 1).bfloat16()
    a = torch.arange(-4, 4, dtype=torch.int32)
    assert ints[0].tolist() == [-1, -1, 0, 0, 0, 0, 0, 1]  # as in C
    assert ints[1].tolist() == [-1, 0, -2, -1, 0, 1, 2, 0]
    assert ints[2].tolist() == [0, 1, -2, -1, 0, 1, -2, -1]  # 32 bits
    assert torch.equal(ints[3].view(torch.float32), v.float())
    low, high = ints[4].view(torch.bfloat16).view(8, 2).unbind(1)
    assert torch.equal(low, (a / 3).bfloat16())
    assert torch.equal(high, v * torch.tensor(0.1).bfloat16())  # the number takes the tensor's type
    assert torch.equal(ints[5, ::2], (0xFF ^ ((a << 4) & a))[::2])  # table 0x6a: c ^ (a & b)
    assert torch.equal(ints[5, 1::2], a[1::2])
    assert ints[6].tolist() == [7] * 8
    assert ints[7].tolist() == [98, 100, -102, -104, -106, -108, -108, -108]
    assert torch.equal(floats[0], a / 3)
    assert torch.equal(floats[1], high.float()) and torch.equal(floats[2], high.float())
    assert floats[3].tolist() == [0.5] * 8  # maxima pass over NaN
    exact = v.double().sum()
    assert abs(floats[4, 0] - exact) <= 8 * 2**-24 * v.double().abs().sum()


@gluon.jit
def reductions_kernel(x, along_rows, along_columns, moved):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 8, gl.SliceLayout(0, layout))
    at = rows[:, None] * 8 + columns[None, :]
    v = gl.load(x + at)
    gl.store(along_rows + rows, gl.max(v, 1))
    gl.store(along_rows + 16 + rows, gl.sum(gl.where(v == v, v, 0.0), 1))
    gl.store(along_rows + 32 + rows, gl.sum((v > 0).to(gl.int32), axis=1))
    gl.store(along_columns + columns, gl.min(v, 0))
    low, high = gl.split(v.reshape([16, 4, 2]))
    gl.store(moved + at, gl.convert_layout(gl.join(high, low).reshape([16, 8]), layout))


def test_reductions():
    x = torch.randn(16, 8)
    x[3, 1:] = x[:, 5] = math.nan
    along_rows, along_columns, moved = torch.zeros(3, 16), torch.zeros(8), torch.zeros(16, 8)
    run(reductions_kernel, 1, x, along_rows, along_columns, moved)
    assert torch.equal(along_rows[0], x.nan_to_num(-math.inf).amax(1))  # pass over NaN
    errors = (along_rows[1] - x.double().nansum(1)).abs()
    assert (errors <= 8 * 2**-24 * x.double().abs().nansum(1)).all()
    assert torch.equal(along_rows[2], (x > 0).sum(1).float())
    least = x.nan_to_num(math.inf).amin(0)
    least[5] = math.nan  # but for nothing else
    assert torch.equal(along_columns.nan_to_num(7.0), least.nan_to_num(7.0))
    swapped = x.view(16, 4, 2).flip(2).reshape(16, 8)
    assert torch.equal(moved.nan_to_num(7.0), swapped.nan_to_num(7.0))


def test_addresses_out_of_bounds():
    ints, floats = torch.zeros(64, dtype=torch.int32), torch.zeros(40)
    others = (ints, floats, (None, None), Limits(0, 0), 8, 0.0, (False,))
    with pytest.raises(BoundsError, match="element 7 is none of a tensor that spans 7"):
        run(values_kernel, 1, torch.zeros(7).bfloat16(), *others)
    with pytest.raises(BoundsError, match="element 4 is none of a tensor that spans 14"):
        run(values_kernel, 1, torch.zeros(2, 10).bfloat16()[:, :4], *others)


@gluon.jit
def corners_kernel(source, target, row, column):
    tile = gl.allocate_shared_memory(source.dtype, [8, 16], source.layout)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    fence_async_shared()
    barrier()
    mbarrier.expect(bars.index(0), source.block_type.nbytes)
    tma_load(source, [row, column], bars.index(0), tile)
    mbarrier.wait(bars.index(0), 0)
    tma_store(target, [4, 4], tile)
    tma.store_wait(0)


@pytest.mark.parametrize("row", [-9, -3, 2, 6, 30])
@pytest.mark.parametrize("column", [-20, -5, 0, 12, 99])
def test_boxes_past_every_edge(row, column):
    """Loads give 0 there, stores are clipped."""
    source, target = torch.randn(10, 16), torch.full((9, 16), math.nan)
    run(corners_kernel, 1, descriptor(source, 8), descriptor(target, 8), row, column)
    padded = torch.nn.functional.pad(source, (120, 120, 40, 40))
    expected = torch.full((9, 16), math.nan)
    expected[4:9, 4:16] = padded[row + 40 : row + 45, column + 120 : column + 132]
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------- what is not emulated
@gluon.jit
def unknown_kernel(x, WHAT: gl.constexpr):
    if WHAT == 0:
        gl.store(x, tl.sigmoid(gl.load(x)))
    elif WHAT == 1:
        tma.make_descriptor(x)
    elif WHAT == 2:
        gl.load(x).trans()
    elif WHAT == 3:
        gl.inline_asm_elementwise("sin.f32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=1, pack=1)
    elif WHAT == 4:
        gl.load(x, volatile=True)
    elif WHAT == 5:
        gl.static_assert(WHAT < 5, "five is too much")


@pytest.mark.parametrize(
    "what, kind, text",
    [
        (0, UnsupportedError, "triton.language.standard.sigmoid is not emulated"),
        (1, UnsupportedError, "has no make_descriptor"),
        (2, UnsupportedError, "the attribute trans of a tensor is not emulated"),
        (3, UnsupportedError, "inline assembly: 'sin.f32 \\$0, 0' is not emulated"),
        (4, TypeError, "volatile"),
        (5, EmulationError, "static_assert: five is too much"),
    ],
)
def test_what_is_refused(what, kind, text):
    with pytest.raises(kind, match=text):
        run(unknown_kernel, 1, torch.zeros(1), what)


def test_numbers_that_do_not_fit_are_refused():
    with (
        edited(_count, "i += 1", "i = tile + 2**31").active(),
        pytest.raises(EmulationError, match="2147483648.* does not fit int32"),
    ):
        counted()


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="must be on the CPU to be emulated, got one on meta"):
        run(unknown_kernel, 1, torch.zeros(1, device="meta"), 6)


def test_inference_mode():
    with torch.inference_mode():
        assert counted() and copied()[0]


def test_options_are_checked():
    with pytest.raises(TypeError, match="num_ctax"):
        run(unknown_kernel, 1, torch.zeros(1), 6, num_ctax=2)
    with pytest.raises(UnsupportedError, match="clusters"):
        run(unknown_kernel, 1, torch.zeros(1), 6, num_ctas=2)


# -------------------------------------------------------------------------------------- launches
@triton.jit
def _plain_kernel(x):
    tl.store(x, tl.load(x) + 1)


@pytest.mark.interpreter
def test_emulated_launches():
    """Launches of Gluon kernels inside run here, plain Triton kernels as before."""
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32)
    with emulated(seed=1, interleave=3) as launches:
        Launch(counter_kernel, 3, (9,), TileConfig(64, 64, 4, 2))(counter, out)
        counter.zero_()
        counter_kernel[(2,)](counter, out, 9)
        _plain_kernel[(1,)](counter)
    assert out[:, 0].tolist() == [2 * i + 2 for i in range(9)] and counter.item() == 9 + 2 + 1
    assert [x.programs for x in launches] == [3, 2]
    assert "run" not in vars(GluonJITFunction)
