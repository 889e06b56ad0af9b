"""Gradients of k and v on Hopper: consumer warpgroups of 64 keys each, a warp that loads for them.

The keys and values of a program stay. Tiles of queries pass by, each with its rows of d_out and its
row terms, head after head of the group. All products are transposed, S^T = K q^T and dP^T = V dO^T:
W^T and dS^T are then left operands, straight from registers, of dv += W^T dO and dk += dS^T q.

Barriers, all in one array; the parities of a stage count the tiles (`step`) of this program:

  K_FULL, V_FULL                 once
  Q_FULL, D_OUT_FULL [stage]     queries and their row terms; d_out
  Q_EMPTY, D_OUT_EMPTY [stage]   free once per consumer, d_out ahead of the queries

Fused, the two consumers also add to dq = dS k, in float32 and in no fixed order: dS^T goes through
shared memory, twice (`step % 2`), with one named barrier of the consumers between writes and reads.
They write dS^T of step + 2 behind the barrier of step + 1, ahead of which they read that of step.

Registers do not hold both sums of the widest heads: two launches make dv, without V, and dk.
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

from ..primitives import BRANCH, CENTER, IDENTITY, LOG2_E, SCALE, SOFTMAX, head_base
from ..visibility import load_bounds
from .primitives import (
    ROWS,
    Gains,
    Shape,
    accumulator,
    barrier,
    before,
    consumers_meet,
    gain_of,
    place,
    sign_of,
    tma_load,
    tma_store,
)

# Columns of half a tile of dq.
HALF = gl.constexpr(64)


@dataclass(frozen=True)
class DkdvShape(Shape):
    """What the kernel is compiled for.

    Attributes:
        consumers: warpgroups, of 64 keys each.
        block_t, stages: queries of a tile, and how many tiles are in flight.
        is_centered, has_identity: which terms there are.
        makes_dk, makes_dv: which of the two sums.
        is_fused: whether dq is summed here, by two consumers, in half tiles of 64 times 64.
    """

    consumers: int
    block_t: int
    stages: int
    makes_dk: bool
    makes_dv: bool
    is_centered: bool
    has_identity: bool
    is_fused: bool = False

    @property
    def block_s(self) -> int:
        """Keys of a program."""
        return 64 * self.consumers

    @property
    def terms(self) -> int:
        """Row terms that are read: t, delta / |b| and, for dv if centred, c / n."""
        return 3 if self.is_centered and self.makes_dv else 2

    @property
    def key_tiles(self) -> int:
        """Tiles of k and v in shared memory: of v none for dv alone."""
        return self.consumers * (2 if self.makes_dk else 1)

    @property
    def has_units(self) -> bool:
        """Whether the heads of a group scale what they add to dk, each in its own way."""
        return self.group > 1 and self.gain_is_tensor[SCALE.value]

    @property
    def lifts_weights(self) -> bool:
        """Whether weights of order 1 / n are scaled before they are rounded."""
        return self.dtype == gl.float16

    @property
    def signs_dv(self) -> bool:
        """Whether the sign of the weights can wait until dv is summed."""
        return self.group == 1 and not self.is_centered and not self.lifts_weights

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        """Layout of a tile of scores, [ROWS, block_t]."""
        return accumulator(self.block_t)

    @property
    def half_tile(self) -> gl.NVMMADistributedLayout:
        """Layout of half a tile of dq, [ROWS, HALF]."""
        return accumulator(HALF.value)


class Descriptors(NamedTuple):
    """Tensors that TMA reads and writes."""

    q: object
    k: object
    v: object
    d_out: object
    row_terms: object
    dk: object
    dv: object


class Memory(NamedTuple):
    """Shared memory: k, then v; q, then d_out; row terms; dS^T, if fused; barriers."""

    keys: gl.shared_memory_descriptor
    queries: gl.shared_memory_descriptor
    terms: gl.shared_memory_descriptor
    d_scores: gl.shared_memory_descriptor
    bars: gl.shared_memory_descriptor


class Sizes(NamedTuple):
    """Numbers of the launch; DV: columns of d_out."""

    H: gl.tensor
    T: gl.tensor
    S: gl.tensor
    DV: gl.tensor
    q_offset: gl.tensor
    diagonal: gl.tensor
    heads_together: gl.tensor


class Every(NamedTuple):
    """All that a warpgroup is given.

    d_out_ptr: the gradient of out before any rounding. dq_sums_ptr: if fused, the half tiles of dq,
    two for each tile of queries of each head (`_place_in_half_tile`).
    """

    descriptors: Descriptors
    d_out_ptr: gl.tensor
    dq_sums_ptr: object
    d_out_strides: tuple
    visibility: tuple
    gains: Gains
    sizes: Sizes
    memory: Memory


class Place(NamedTuple):
    """Keys of a program: batch, head, first key, the range that is seen at all.

    Tiles `first` to `tiles - 1` of the queries of each head see some of them.
    """

    batch: gl.tensor
    key_head: gl.tensor
    key: gl.tensor
    key_lo: gl.tensor
    key_hi: gl.tensor
    first: gl.tensor
    tiles: gl.tensor


class Factors(NamedTuple):
    """What one head multiplies by: scores; dP and delta in dS; r and c / n in W."""

    logit: gl.tensor
    d_weight: gl.tensor
    delta: gl.tensor
    weight: gl.tensor
    center: gl.tensor


# --------------------------------------------------------------------------- barriers and places
K_FULL = gl.constexpr(0)
V_FULL = gl.constexpr(1)
Q_FULL = gl.constexpr(0)
D_OUT_FULL = gl.constexpr(1)
Q_EMPTY = gl.constexpr(2)
D_OUT_EMPTY = gl.constexpr(3)
# Planes of the row terms.
EXPONENT = gl.constexpr(0)
DELTA = gl.constexpr(1)
CENTER_WEIGHT = gl.constexpr(2)


@gluon.jit
def _ring(bars, KIND: gl.constexpr, step, C: gl.constexpr):
    """Barrier of the stage of a tile."""
    return bars.index(step % C.stages + (2 + KIND * C.stages))


@gluon.jit
def _place(visibility, sizes, C: gl.constexpr):
    head, number = place(
        gl.program_id(0), gl.cdiv(sizes.S, C.block_s), sizes.heads_together, C.is_causal, False
    )
    key = number * C.block_s
    key_heads = sizes.H // C.group
    batch = head // key_heads
    T, S, key_lo, key_hi, diagonal = load_bounds(
        visibility, batch, sizes.T, sizes.S, sizes.diagonal
    )
    tiles = gl.cdiv(T, C.block_t)
    first = 0
    if C.is_causal:
        first = gl.minimum(gl.maximum(gl.maximum(key, key_lo) + 1 - diagonal, 0), T) // C.block_t
    first = gl.where((key < key_hi) & (key + C.block_s > key_lo), first, tiles)
    return Place(batch, head % key_heads, key, key_lo, key_hi, first, tiles)


@gluon.jit
def _query_tile(i, where, C: gl.constexpr):
    """Tile of queries that comes i-th.

    Fused without a mask, programs start at tiles of their own: they would all add to the same.
    """
    if C.is_fused and not C.is_causal:
        i += gl.minimum(where.key // C.block_t, where.tiles - 1)
        i = gl.where(i >= where.tiles, i - where.tiles, i)
    return i


# ------------------------------------------------------------------------------------- producer
@gluon.jit
def _load_keys(descriptor, where, full, keys, FIRST: gl.constexpr, C: gl.constexpr):
    mbarrier.expect(full, C.consumers * descriptor.block_type.nbytes)
    for c in gl.static_range(C.consumers):
        at = [where.batch, where.key_head, where.key + c * ROWS, 0]
        tma_load(descriptor, at, full, keys.index(FIRST + c))


@gluon.jit
def _producer(every, c: gl.constexpr, C: gl.constexpr):
    descriptors = every.descriptors
    memory = every.memory
    bars = memory.bars
    where = _place(every.visibility, every.sizes, C)
    q_bytes: gl.constexpr = descriptors.q.block_type.nbytes
    term_bytes: gl.constexpr = descriptors.row_terms.block_type.nbytes
    if where.first < where.tiles:
        _load_keys(descriptors.k, where, bars.index(K_FULL), memory.keys, 0, C)
    step = 0
    for member in range(C.group):
        head = where.key_head * C.group + member
        for tile in range(where.first, where.tiles):
            row = _query_tile(tile, where, C) * C.block_t
            stage = step % C.stages
            parity = (step // C.stages & 1) ^ 1
            # First what is free first.
            full = _ring(bars, D_OUT_FULL, step, C)
            mbarrier.wait(_ring(bars, D_OUT_EMPTY, step, C), parity)
            mbarrier.expect(full, descriptors.d_out.block_type.nbytes)
            d_out = memory.queries.index(C.stages + stage)
            tma_load(descriptors.d_out, [where.batch, head, row, 0], full, d_out)
            full = _ring(bars, Q_FULL, step, C)
            mbarrier.wait(_ring(bars, Q_EMPTY, step, C), parity)
            mbarrier.expect(full, q_bytes + C.terms * term_bytes)
            tma_load(descriptors.q, [where.batch, head, row, 0], full, memory.queries.index(stage))
            for plane in gl.static_range(C.terms):
                at = [plane, where.batch * every.sizes.H + head, row]
                tma_load(
                    descriptors.row_terms, at, full, memory.terms.index(C.terms * stage + plane)
                )
            if C.makes_dk and step == 0:
                _load_keys(descriptors.v, where, bars.index(V_FULL), memory.keys, C.consumers, C)
            step += 1


# ------------------------------------------------------------------------------------- consumer
@gluon.jit
def _largest_weight(gains, head, C: gl.constexpr):
    """The most that a weight W can be under the uniform prior."""
    size = gl.abs(gain_of(gains, SOFTMAX, head, C)) + gl.abs(gain_of(gains, CENTER, head, C))
    return size * gl.abs(gain_of(gains, BRANCH, head, C))


@gluon.jit
def _group_scales(gains, key_head, C: gl.constexpr):
    """Common factors under which the heads of one group accumulate dk and dv.

    Returns the scale of largest size (there may be one for all heads), and the power of two that
    lifts weights of order 1/n out of float16's subnormal range, with a factor of 16 to overflow.
    """
    first = key_head * C.group
    largest_scale = gain_of(gains, SCALE, first, C)
    if C.has_units:
        for member in range(1, C.group):
            scale = gain_of(gains, SCALE, first + member, C)
            largest_scale = gl.where(gl.abs(scale) > gl.abs(largest_scale), scale, largest_scale)
    weight_lift = 1.0
    if C.lifts_weights:
        largest_weight = _largest_weight(gains, first, C)
        for member in range(1, C.group):
            largest_weight = gl.maximum(largest_weight, _largest_weight(gains, first + member, C))
        weight_lift = gl.exp2(12.0 - gl.ceil(gl.log2(gl.maximum(largest_weight, 1e-6))))
    return largest_scale, weight_lift


@gluon.jit
def _factors(gains, head, largest_scale, weight_lift, C: gl.constexpr):
    scale = gain_of(gains, SCALE, head, C)
    sign = sign_of(gains, head, C)
    unit = scale
    d_weight = sign
    if C.has_units:
        # The heads of a group share one accumulator in units of the largest scale.
        unit = gl.where(largest_scale == 0.0, 0.0, scale / largest_scale)
        d_weight = sign * unit
    return Factors(LOG2_E * scale, d_weight, unit, sign * weight_lift, weight_lift)


@gluon.jit
def _row_term(terms, PLANE: gl.constexpr, stage, C: gl.constexpr):
    """One of the terms of the queries of a stage: [1, block_t]."""
    return terms.index(C.terms * stage + PLANE).reshape([1, C.block_t]).load(C.scores)


@gluon.jit
def _first_queries(where, key, diagonal, C: gl.constexpr):
    """For each key from `key` on, the first query that sees it: [ROWS]."""
    keys = key + gl.arange(0, ROWS, gl.SliceLayout(1, C.scores))
    inside = (keys >= where.key_lo) & (keys < where.key_hi)
    return gl.where(inside, keys + 1 - diagonal, 2**30)


@gluon.jit
def _start_dq(d_scores, memory, step, zero, c: gl.constexpr, C: gl.constexpr):
    """Give dS^T to the other consumer; start half of dq: half of the columns, or of the queries."""
    memory.d_scores.index(step % 2 * C.consumers + c).store(d_scores)
    fence_async_shared()
    consumers_meet(C.consumers)
    dq = gl.zeros([ROWS, HALF], gl.float32, C.half_tile)
    for i in gl.static_range(C.consumers):
        d_scores = memory.d_scores.index(step % 2 * C.consumers + i).permute([1, 0])
        k = memory.keys.index(i + zero).reshape([ROWS, C.width])
        if C.block_t == ROWS:
            k = k.slice(c * HALF, HALF, dim=1)
        else:
            d_scores = d_scores.slice(c * ROWS, ROWS, dim=0)
        dq = warpgroup_mma(d_scores, k, dq, use_acc=i > 0, is_async=True)
    return dq


@gluon.jit
def _place_in_half_tile(C: gl.constexpr):
    """Place of each element of a half tile in its 4096 numbers.

    Four that a thread holds next to each other, in rows r and r + 8 and columns x and x + 1, are
    contiguous, and so are those of a warp.
    """
    r = gl.arange(0, ROWS, gl.SliceLayout(1, C.half_tile))[:, None]
    x = gl.arange(0, HALF, gl.SliceLayout(0, C.half_tile))[None, :]
    of_row = r // 16 * 128 + r % 8 * 16 + r // 8 % 2 * 2
    return of_row + (x // 8 * 512 + x // 2 % 4 * 4 + x % 2)


@gluon.jit
def _quads(x):
    """[ROWS, HALF] as four tensors, of the numbers that stand at 0, 1, 2, 3 of their quads."""
    x = x.reshape([4, 2, 8, HALF // 8, 4, 2]).permute([0, 2, 3, 4, 1, 5])
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _add_dq(dq, base, C: gl.constexpr):
    """Add half a tile of dq to the numbers from `base` on, four at a time."""
    at, _, _, _ = _quads(_place_in_half_tile(C))
    first, second, third, fourth = _quads(dq)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;",
        "=r,l,f,f,f,f",
        [(base + at).to(gl.int64), first, second, third, fourth],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _step(
    dk,
    dv,
    memory,
    factors,
    step,
    tile,
    first_queries,
    dq_sums,
    c: gl.constexpr,
    C: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Add a tile of queries to dk and dv, one of them or both, and the keys to its dq.

    first_queries: the first query that sees each key. dq_sums: this consumer's part of the dq of
    the first tile.
    """
    stage = step % C.stages
    parity = step // C.stages & 1
    # 0, but the addresses of k and v are then formed here, not kept in registers.
    zero = step >> 30
    k = memory.keys.index(c + zero).reshape([ROWS, C.width])
    if C.makes_dk:
        v = memory.keys.index(C.consumers + c + zero).reshape([ROWS, C.width])
    q = memory.queries.index(stage).reshape([C.block_t, C.width])
    d_out = memory.queries.index(C.stages + stage).reshape([C.block_t, C.width])
    # [ROWS, block_t]
    zeros = gl.zeros([ROWS, C.block_t], gl.float32, C.scores)

    mbarrier.wait(_ring(memory.bars, Q_FULL, step, C), parity)
    scores = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(_ring(memory.bars, D_OUT_FULL, step, C), parity)
    if C.makes_dk:
        d_weights = warpgroup_mma(v, d_out.permute([1, 0]), zeros, use_acc=False, is_async=True)
    exponent = _row_term(memory.terms, EXPONENT, stage, C)
    scores = warpgroup_mma_wait(1 if C.makes_dk else 0, deps=[scores])
    weights = gl.exp2(scores * factors.logit - exponent)
    if C.makes_dv:
        value_weights = weights
        if not C.signs_dv:
            value_weights = weights * factors.weight
        if C.is_centered:
            center_weight = _row_term(memory.terms, CENTER_WEIGHT, stage, C)
            if C.lifts_weights:
                center_weight *= factors.center
            value_weights -= center_weight
    if MASKED:
        hidden = before(first_queries - tile * C.block_t, C.block_t, C.scores)
        weights = gl.where(hidden, 0.0, weights)
        if C.makes_dv:
            value_weights = gl.where(hidden, 0.0, value_weights)
    if C.makes_dv:
        value_weights = gl.convert_layout(value_weights.to(C.dtype), C.weights)
        dv = warpgroup_mma(value_weights, d_out, dv, is_async=True)
    if C.makes_dk:
        d_weights = warpgroup_mma_wait(1 if C.makes_dv else 0, deps=[d_weights])
        delta = _row_term(memory.terms, DELTA, stage, C)
        if C.has_units:
            delta *= factors.delta
        d_scores = (weights * (factors.d_weight * d_weights - delta)).to(C.dtype)
        operand = gl.convert_layout(d_scores, C.weights)
        if C.is_fused:
            dq = _start_dq(d_scores, memory, step, zero, c, C)
        dk = warpgroup_mma(operand, q, dk, is_async=True)
        # Of what has been started only dk is younger than the last product with d_out.
        if C.is_fused:
            dq, dv, value_weights = warpgroup_mma_wait(1, deps=[dq, dv, value_weights])
        elif C.makes_dv:
            dv, value_weights = warpgroup_mma_wait(1, deps=[dv, value_weights])
        mbarrier.arrive(_ring(memory.bars, D_OUT_EMPTY, step, C), count=1)
        if C.is_fused:
            _add_dq(dq, dq_sums + tile.to(gl.int64) * (2 * ROWS * HALF), C)
        dk, operand = warpgroup_mma_wait(0, deps=[dk, operand])
    else:
        dv, value_weights = warpgroup_mma_wait(0, deps=[dv, value_weights])
        mbarrier.arrive(_ring(memory.bars, D_OUT_EMPTY, step, C), count=1)
    mbarrier.arrive(_ring(memory.bars, Q_EMPTY, step, C), count=1)
    return dk, dv


@gluon.jit
def _meet(C: gl.constexpr):
    """Barrier of all warps that multiply by the keys and values of this consumer."""
    if C.is_fused:
        consumers_meet(C.consumers)
    else:
        barrier()


@gluon.jit
def _add_identity(dv, every, where, key, C: gl.constexpr):
    """Add what the queries at the positions of the keys give to dv directly."""
    sizes = every.sizes
    strides = every.d_out_strides
    rows = key - sizes.q_offset + gl.arange(0, ROWS, gl.SliceLayout(1, C.outputs))
    columns = gl.arange(0, C.width, gl.SliceLayout(0, C.outputs))
    inside = ((rows >= 0) & (rows < sizes.T))[:, None] & (columns < sizes.DV)[None, :]
    offsets = rows.to(gl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]
    for member in range(C.group):
        head = where.key_head * C.group + member
        factor = gain_of(every.gains, BRANCH, head, C)
        factor *= gain_of(every.gains, IDENTITY, head, C)
        base = head_base(every.d_out_ptr, where.batch, head, strides)
        dv += factor * gl.load(base + offsets, mask=inside, other=0.0).to(gl.float32)
    return dv


@gluon.jit
def _consumer(every, c: gl.constexpr, C: gl.constexpr):
    memory = every.memory
    diagonal = every.sizes.diagonal
    where = _place(every.visibility, every.sizes, C)
    key = where.key + c * ROWS
    largest_scale, weight_lift = _group_scales(every.gains, where.key_head, C)
    count = where.tiles - where.first
    # Tiles before `masked` are crossed by the diagonal.
    masked = where.first
    if C.is_causal:
        masked = gl.cdiv(gl.maximum(key + ROWS - diagonal, 0), C.block_t)
        masked = gl.minimum(gl.maximum(masked, where.first), where.tiles)
    if C.is_fused:
        # Keys out of range must not reach dq.
        in_range = (key >= where.key_lo) & (key + ROWS <= where.key_hi)
        masked = gl.where(in_range, masked, where.tiles)
    first_queries = _first_queries(where, key, diagonal, C)
    dk = gl.zeros([ROWS, C.width], gl.float32, C.outputs)
    dv = gl.zeros([ROWS, C.width], gl.float32, C.outputs)
    if count > 0:
        mbarrier.wait(memory.bars.index(K_FULL), 0)
        if C.makes_dk:
            mbarrier.wait(memory.bars.index(V_FULL), 0)
    for member in range(C.group):
        head = where.key_head * C.group + member
        factors = _factors(every.gains, head, largest_scale, weight_lift, C)
        start = member * count - where.first
        dq_sums = every.dq_sums_ptr
        if C.is_fused:
            tiles_before = (where.batch * every.sizes.H + head).to(gl.int64) * where.tiles
            dq_sums += tiles_before * (2 * ROWS * HALF) + c * (ROWS * HALF)
        if C.is_causal or C.is_fused:
            for i in range(where.first, masked):
                tile = _query_tile(i, where, C)
                dk, dv = _step(
                    dk, dv, memory, factors, start + i, tile, first_queries, dq_sums, c, C, True
                )
        for i in range(masked, where.tiles):
            tile = _query_tile(i, where, C)
            dk, dv = _step(dk, dv, memory, factors, start + i, tile, 0, dq_sums, c, C, False)

    # Keys out of range took part so far: each fills a row of its own.
    keys = key + gl.arange(0, ROWS, gl.SliceLayout(1, C.outputs))
    inside = ((keys >= where.key_lo) & (keys < where.key_hi))[:, None]
    _meet(C)  # before dk and dv take the place of k and v
    k_tile = memory.keys.index(c)
    if C.makes_dk:
        dk = gl.where(inside, largest_scale * dk, 0.0)
        k_tile.reshape([ROWS, C.width]).store(dk.to(C.dtype))
    if C.makes_dv:
        v_tile = memory.keys.index(C.key_tiles - C.consumers + c)
        if C.signs_dv:
            dv *= sign_of(every.gains, where.key_head, C)
        elif C.lifts_weights:
            dv *= 1.0 / weight_lift
        dv = gl.where(inside, dv, 0.0)
        if C.has_identity:
            dv = _add_identity(dv, every, where, key, C)
        v_tile.reshape([ROWS, C.width]).store(dv.to(C.dtype))
    fence_async_shared()
    barrier()
    if C.makes_dk:
        tma_store(every.descriptors.dk, [where.batch, where.key_head, key, 0], k_tile)
    if C.makes_dv:
        tma_store(every.descriptors.dv, [where.batch, where.key_head, key, 0], v_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "T", "S", "DV", "q_offset", "diagonal", "heads_together"])
def attention_bwd_dkdv_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    d_out_descriptor,
    row_terms_descriptor,
    dk_descriptor,
    dv_descriptor,
    d_out_ptr,
    dq_sums_ptr,
    visibility,
    gains,
    gain_strides,
    d_out_strides,
    H,
    T,
    S,
    DV,
    q_offset,
    diagonal,
    heads_together,
    C: gl.constexpr,
):
    descriptors = Descriptors(
        q_descriptor,
        k_descriptor,
        v_descriptor,
        d_out_descriptor,
        row_terms_descriptor,
        dk_descriptor,
        dv_descriptor,
    )
    k_layout: gl.constexpr = k_descriptor.layout
    q_layout: gl.constexpr = q_descriptor.layout
    term_layout: gl.constexpr = row_terms_descriptor.layout
    terms = gl.allocate_shared_memory(
        gl.float32, [C.terms * C.stages, 1, 1, C.block_t], term_layout
    )
    d_scores = terms
    if C.is_fused:
        d_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, C.block_t], C.dtype)
        d_scores = gl.allocate_shared_memory(C.dtype, [2 * C.consumers, ROWS, C.block_t], d_layout)
    memory = Memory(
        gl.allocate_shared_memory(C.dtype, [C.key_tiles, 1, 1, ROWS, C.width], k_layout),
        gl.allocate_shared_memory(C.dtype, [2 * C.stages, 1, 1, C.block_t, C.width], q_layout),
        terms,
        d_scores,
        gl.allocate_shared_memory(gl.int64, [2 + 4 * C.stages, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(memory.bars.index(K_FULL), count=1)
    mbarrier.init(memory.bars.index(V_FULL), count=1)
    for stage in gl.static_range(C.stages):
        mbarrier.init(_ring(memory.bars, Q_FULL, stage, C), count=1)
        mbarrier.init(_ring(memory.bars, D_OUT_FULL, stage, C), count=1)
        mbarrier.init(_ring(memory.bars, Q_EMPTY, stage, C), count=C.consumers)
        mbarrier.init(_ring(memory.bars, D_OUT_EMPTY, stage, C), count=C.consumers)
    fence_async_shared()
    barrier()
    every = Every(
        descriptors,
        d_out_ptr,
        dq_sums_ptr,
        d_out_strides,
        visibility,
        Gains(gains, gain_strides),
        Sizes(H, T, S, DV, q_offset, diagonal, heads_together),
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
