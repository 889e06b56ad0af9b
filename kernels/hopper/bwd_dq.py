"""Gradients of q and the scale on Hopper: consumers of 64 queries each, a warp that loads for them.

The queries of a program and their d_out stay; blocks of keys and values pass by.

Barriers, all in one array; the parities of a stage count the blocks (`g`) of this program:

  Q_FULL [consumer]         queries and d_out, once
  K_FULL, V_FULL [stage]    keys; values
  K_EMPTY, V_EMPTY [stage]  free once per consumer, values ahead of keys
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..primitives import LOG2_E, SCALE, aligned_rows
from ..visibility import load_bounds
from .primitives import (
    ROWS,
    Gains,
    Shape,
    accumulator,
    barrier,
    before,
    gain_of,
    place,
    sign_of,
    tma_load,
    tma_store,
)


@dataclass(frozen=True)
class DqShape(Shape):
    """What the kernel is compiled for.

    Attributes:
        consumers: warpgroups, of 64 queries each.
        block_s, stages: keys of a block, and how many blocks are in flight.
        is_pinned: the weights are computed ahead of the wait for dP.
    """

    consumers: int
    block_s: int
    stages: int
    is_pinned: bool

    @property
    def block_t(self) -> int:
        """Queries of a program."""
        return 64 * self.consumers

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        """Layout of a tile of scores, [ROWS, block_s]."""
        return accumulator(self.block_s)


class Descriptors(NamedTuple):
    """Tensors that TMA reads and writes."""

    q: object
    k: object
    v: object
    d_out: object
    dq: object


class Memory(NamedTuple):
    """Shared memory: q, then d_out; k, then v; barriers."""

    queries: gl.shared_memory_descriptor
    keys: gl.shared_memory_descriptor
    bars: gl.shared_memory_descriptor


class Sizes(NamedTuple):
    """Numbers of the launch."""

    H: gl.tensor
    T: gl.tensor
    S: gl.tensor
    diagonal: gl.tensor
    heads_together: gl.tensor


class Every(NamedTuple):
    """All that a warpgroup is given."""

    descriptors: Descriptors
    row_terms_ptr: gl.tensor
    scale_dots_ptr: gl.tensor
    visibility: tuple
    gains: Gains
    sizes: Sizes
    memory: Memory


class Place(NamedTuple):
    """Queries of a program: batch and head, apart and in one; tile of the head, first query.

    They see keys of `[key_lo, key_hi)`, in `blocks` blocks from key_lo on.
    """

    batch: gl.tensor
    head: gl.tensor
    batch_head: gl.tensor
    number: gl.tensor
    row: gl.tensor
    key_lo: gl.tensor
    key_hi: gl.tensor
    blocks: gl.tensor


# --------------------------------------------------------------------------- barriers and places
K_FULL = gl.constexpr(0)
V_FULL = gl.constexpr(1)
K_EMPTY = gl.constexpr(2)
V_EMPTY = gl.constexpr(3)


@gluon.jit
def _ring(bars, KIND: gl.constexpr, g, C: gl.constexpr):
    """Barrier of the stage of block g."""
    return bars.index(g % C.stages + (C.consumers + KIND * C.stages))


@gluon.jit
def _place(visibility, sizes, C: gl.constexpr):
    batch_head, number = place(
        gl.program_id(0), gl.cdiv(sizes.T, C.block_t), sizes.heads_together, C.is_causal, True
    )
    row = number * C.block_t
    batch = batch_head // sizes.H
    T, S, key_lo, key_hi, diagonal = load_bounds(
        visibility, batch, sizes.T, sizes.S, sizes.diagonal
    )
    end = key_hi
    if C.is_causal:
        end = gl.minimum(end, gl.minimum(row + C.block_t, T) - 1 + diagonal)
    blocks = gl.cdiv(gl.maximum(end - key_lo, 0), C.block_s)
    return Place(batch, batch_head % sizes.H, batch_head, number, row, key_lo, key_hi, blocks)


# ------------------------------------------------------------------------------------- producer
@gluon.jit
def _producer(every, c: gl.constexpr, C: gl.constexpr):
    descriptors = every.descriptors
    memory = every.memory
    bars = memory.bars
    where = _place(every.visibility, every.sizes, C)
    for i in gl.static_range(C.consumers):
        at = [where.batch, where.head, where.row + i * ROWS, 0]
        mbarrier.expect(bars.index(i), 2 * descriptors.q.block_type.nbytes)
        tma_load(descriptors.q, at, bars.index(i), memory.queries.index(i))
        tma_load(descriptors.d_out, at, bars.index(i), memory.queries.index(C.consumers + i))
    for g in range(where.blocks):
        stage = g % C.stages
        at = [where.batch, where.head // C.group, where.key_lo + g * C.block_s, 0]
        parity = (g // C.stages & 1) ^ 1
        # First what is free first.
        full = _ring(bars, V_FULL, g, C)
        mbarrier.wait(_ring(bars, V_EMPTY, g, C), parity)
        mbarrier.expect(full, descriptors.v.block_type.nbytes)
        tma_load(descriptors.v, at, full, memory.keys.index(C.stages + stage))
        full = _ring(bars, K_FULL, g, C)
        mbarrier.wait(_ring(bars, K_EMPTY, g, C), parity)
        mbarrier.expect(full, descriptors.k.block_type.nbytes)
        tma_load(descriptors.k, at, full, memory.keys.index(stage))


# ------------------------------------------------------------------------------------- consumer
def _pin_text() -> str:
    """Assembly of `_pin_weights`: 16 values, from $16 to $31, whose bits are united in `all`."""
    unite = [f"lop3.b32 all, all, ${i}, ${i + 1}, 0xfe;" for i in range(18, 32, 2)]
    move = [f"mov.b32 ${i}, ${i + 16};" for i in range(16)]
    lines = [
        "{ .reg .pred never; .reg .b32 all;",
        "or.b32 all, $16, $17;",
        *unite,
        "setp.eq.u32 never, all, 0xff812345;",
        "@never bar.arrive 15, 128;",
        *move,
        "}",
    ]
    return " ".join(lines)


_PIN_TEXT = gl.constexpr(_pin_text())
_PIN_CONSTRAINTS = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 16))


@gluon.jit
def _pin_weights(weights):
    """`pin` for 16 weights at a time: the bits of weights >= 0 never unite to a negative number."""
    return gl.inline_asm_elementwise(
        _PIN_TEXT, _PIN_CONSTRAINTS, [weights], dtype=gl.float32, is_pure=False, pack=16
    )


@gluon.jit
def _step(dq, memory, row, factors, g, key, c: gl.constexpr, C: gl.constexpr, MASKED: gl.constexpr):
    """Add block g, of keys from `key` on, to dq."""
    exponent, delta, ends = row
    logit, sign = factors
    stage = g % C.stages
    parity = g // C.stages & 1
    q = memory.queries.index(c).reshape([ROWS, C.width])
    d_out = memory.queries.index(C.consumers + c).reshape([ROWS, C.width])
    k = memory.keys.index(stage).reshape([C.block_s, C.width])
    v = memory.keys.index(C.stages + stage).reshape([C.block_s, C.width])
    # [ROWS, block_s]
    zeros = gl.zeros([ROWS, C.block_s], gl.float32, C.scores)

    mbarrier.wait(_ring(memory.bars, K_FULL, g, C), parity)
    scores = warpgroup_mma(q, k.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(_ring(memory.bars, V_FULL, g, C), parity)
    d_weights = warpgroup_mma(d_out, v.permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * logit - exponent[:, None])
    if MASKED:
        weights = gl.where(before(ends - key, C.block_s, C.scores), weights, 0.0)
    if C.is_pinned:
        weights = _pin_weights(weights)
    d_weights = warpgroup_mma_wait(0, deps=[d_weights])
    mbarrier.arrive(_ring(memory.bars, V_EMPTY, g, C), count=1)
    d_scores = weights * (sign * d_weights - delta[:, None])
    d_scores = gl.convert_layout(d_scores.to(C.dtype), C.weights)
    dq = warpgroup_mma(d_scores, k, dq, is_async=True)
    dq, d_scores = warpgroup_mma_wait(0, deps=[dq, d_scores])
    mbarrier.arrive(_ring(memory.bars, K_EMPTY, g, C), count=1)
    return dq


@gluon.jit
def _consumer(every, c: gl.constexpr, C: gl.constexpr):
    memory = every.memory
    T = every.sizes.T
    where = _place(every.visibility, every.sizes, C)
    row = where.row + c * ROWS
    scale = gain_of(every.gains, SCALE, where.head, C)
    sign = sign_of(every.gains, where.head, C)
    # [ROWS]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, C.scores))
    inside = rows < T
    tiles = gl.cdiv(T, C.block_t)
    aligned = aligned_rows(T)
    plane = (gl.num_programs(0) // tiles).to(gl.int64) * aligned
    terms = every.row_terms_ptr + where.batch_head.to(gl.int64) * aligned + rows
    exponent = gl.load(terms, mask=inside, other=float("inf"))
    delta = gl.load(terms + plane, mask=inside, other=0.0)
    # Blocks before `whole` are seen by every row.
    ends = gl.minimum(where.key_hi, rows + every.sizes.diagonal)
    whole = gl.minimum(where.key_hi, row + every.sizes.diagonal) - where.key_lo
    whole = gl.minimum(gl.maximum(whole, 0) // C.block_s, where.blocks)

    dq = gl.zeros([ROWS, C.width], gl.float32, C.outputs)
    terms_of_row = (exponent, delta, ends)
    factors = (LOG2_E * scale, sign)
    mbarrier.wait(memory.bars.index(c), 0)
    for g in range(whole):
        key = where.key_lo + g * C.block_s
        dq = _step(dq, memory, terms_of_row, factors, g, key, c, C, False)
    for g in range(whole, where.blocks):
        key = where.key_lo + g * C.block_s
        dq = _step(dq, memory, terms_of_row, factors, g, key, c, C, True)

    q_tile = memory.queries.index(c)
    q = q_tile.reshape([ROWS, C.width])
    if every.scale_dots_ptr is not None:
        # d loss / d scale = sum_i q_i . (dS K)_i; one slot per head and 64 queries.
        dots = gl.sum(gl.sum(dq * q.load(C.outputs).to(gl.float32), 1), 0)
        slot = (where.batch_head * tiles + where.number) * C.consumers + c
        gl.store(every.scale_dots_ptr + slot, dots)
    barrier()  # all warps have read q, whose place dq takes
    q.store((scale * dq).to(C.dtype))
    fence_async_shared()
    barrier()
    tma_store(every.descriptors.dq, [where.batch, where.head, row, 0], q_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "T", "S", "diagonal", "heads_together"])
def attention_bwd_dq_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    d_out_descriptor,
    dq_descriptor,
    row_terms_ptr,
    scale_dots_ptr,
    visibility,
    gains,
    gain_strides,
    H,
    T,
    S,
    diagonal,
    heads_together,
    C: gl.constexpr,
):
    q_layout: gl.constexpr = q_descriptor.layout
    k_layout: gl.constexpr = k_descriptor.layout
    bars_layout: gl.constexpr = mbarrier.MBarrierLayout()
    memory = Memory(
        gl.allocate_shared_memory(C.dtype, [2 * C.consumers, 1, 1, ROWS, C.width], q_layout),
        gl.allocate_shared_memory(C.dtype, [2 * C.stages, 1, 1, C.block_s, C.width], k_layout),
        gl.allocate_shared_memory(gl.int64, [C.consumers + 4 * C.stages, 1], bars_layout),
    )
    for i in gl.static_range(C.consumers):
        mbarrier.init(memory.bars.index(i), count=1)
    for stage in gl.static_range(C.stages):
        mbarrier.init(_ring(memory.bars, K_FULL, stage, C), count=1)
        mbarrier.init(_ring(memory.bars, V_FULL, stage, C), count=1)
        mbarrier.init(_ring(memory.bars, K_EMPTY, stage, C), count=C.consumers)
        mbarrier.init(_ring(memory.bars, V_EMPTY, stage, C), count=C.consumers)
    fence_async_shared()
    barrier()
    every = Every(
        Descriptors(q_descriptor, k_descriptor, v_descriptor, d_out_descriptor, dq_descriptor),
        row_terms_ptr,
        scale_dots_ptr,
        visibility,
        Gains(gains, gain_strides),
        Sizes(H, T, S, diagonal, heads_together),
        memory,
    )
    # Constants must stand inside the call: a tuple assigned before would make them values.
    if C.consumers == 2:
        gl.warp_specialize(
            [
                (_consumer, (every, gl.constexpr(0), C)),
                (_consumer, (every, gl.constexpr(1), C)),
                (_producer, (every, gl.constexpr(0), C)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (every, gl.constexpr(0), C)),
                (_consumer, (every, gl.constexpr(1), C)),
                (_consumer, (every, gl.constexpr(2), C)),
                (_producer, (every, gl.constexpr(0), C)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
