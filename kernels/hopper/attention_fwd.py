"""Forward on Hopper: consumer warpgroups of 64 queries each, and one warp that loads for them.

Barriers, all in one array (`_own`, `_ring`); parities count tiles (`turn`) or blocks of keys (`g`)
of this program. A worker keeps every buffer that it uses in a register: hence few arrays.

  Q_FULL, Q_EMPTY    [consumer]   queries of a tile; free after the last product with them
  OWN_FULL, OWN_EMPTY [consumer]  own rows of v and the residual; free when the results that take
                                  their place have left, which the next tile finds out
  K_FULL, K_EMPTY, V_FULL, V_EMPTY [stage]   blocks of keys and values; free once per consumer
  TILE_FULL [2]   number of a tile, from the warp that loads
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import launch
from ..attention_fwd import attention_fwd_kernel as portable_kernel
from ..configs import TileConfig
from ..primitives import (
    BRANCH,
    CENTER,
    IDENTITY,
    LN_2,
    LOG2_E,
    SCALE,
    SKIP,
    SOFTMAX,
)
from ..value_sums import ValueSums, ValueSumsByKey, lead_of
from ..visibility import KEY_START, load_bounds, visibility_arguments, visibility_sizes
from .descriptors import DTYPES, Describe
from .primitives import (
    MOST_REGISTERS,
    ROWS,
    Constants,
    Gains,
    Shape,
    accumulator,
    barrier,
    before,
    gain_of,
    pack,
    pin,
    place,
    sum_packed,
    tma_load,
    tma_store,
    turn_pass,
    turn_wait,
    uniform,
    unpack,
)
from .tiles import (
    MOST_COLUMNS_AT_ONCE,
    ForwardTile,
    forward_tile,
    heads_together,
    marked_tile,
    width_of,
)

if TYPE_CHECKING:
    from ..attention import Call, ForwardResult


# Sums of weights that a pivot may lead to; times any sensible v they are far from overflow.
MOST_WEIGHT = gl.constexpr(2.0**64)


@dataclass(frozen=True, kw_only=True)
class ForwardShape(Shape):
    """What a forward is compiled for.

    Attributes:
        consumers: warpgroups, of 64 queries each.
        block_s, stages: keys of a block, and how many blocks are in flight.
        row_sums: "packed" or "product", as in the portable `row_sums`.
        takes_turns: consumers take turns to issue products.
        is_centered, has_identity: which terms there are.
        residual: "none", "tile" (by TMA, of the dtype of q), or "direct".
        saves: whether the backward's tensors are written.
    """

    consumers: int
    block_s: int
    stages: int
    row_sums: str
    takes_turns: bool
    is_centered: bool
    has_identity: bool
    residual: str
    saves: bool

    @property
    def block_t(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers

    @property
    def has_room(self) -> bool:
        """Whether shared memory holds results and own rows of v too; else they go directly."""
        return self.width <= MOST_COLUMNS_AT_ONCE

    @property
    def has_own(self) -> bool:
        """Whether TMA reads the rows of v at the queries' own positions."""
        return self.has_room and (self.has_identity or (self.is_centered and self.is_causal))

    @property
    def gathers_own(self) -> bool:
        """Whether these rows are read directly."""
        return self.has_identity and not self.has_room

    @property
    def sums_by_key(self) -> bool:
        """Whether the prefix sums of v are by keys, for want of own rows, and not by blocks."""
        return not self.has_room and self.is_centered and self.is_causal

    @property
    def is_direct(self) -> bool:
        """Whether out is written directly."""
        return self.residual == "direct" or not self.has_room

    @property
    def row_tiles(self) -> int:
        """Tiles of queries, results and own rows in shared memory."""
        if not self.has_room:
            return self.consumers
        return self.consumers * (3 if self.has_own or self.saves else 2)

    @property
    def bytes_at_the_end(self) -> int:
        """Bytes that a consumer's epilogue waits for."""
        return 2 * 64 * self.width * (self.has_own + (self.residual == "tile"))

    @property
    def has_short_range(self) -> bool:
        """Whether weights much above 1 overflow, and small ones lose bits."""
        return self.dtype == gl.float16

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        """Layout of a tile of scores, [ROWS, block_s]."""
        return accumulator(self.block_s)

    @property
    def sums(self) -> gl.NVMMADistributedLayout:
        """Layout of row sums that are a product with eight columns of ones."""
        return accumulator(8)

    @property
    def triangle(self) -> gl.NVMMADistributedLayout:
        """Layout of which own keys each query sees, [ROWS, ROWS]."""
        return accumulator(64)

    @property
    def quarter(self) -> gl.NVMMADistributedLayout:
        """Layout of a quarter of the columns of a tile of results."""
        return accumulator(self.width // 4)


class Memory(NamedTuple):
    """Shared memory: q, results, own rows of v; keys, values; ones; tile numbers; barriers."""

    rows: gl.shared_memory_descriptor
    blocks: gl.shared_memory_descriptor
    ones: gl.shared_memory_descriptor
    tiles: gl.shared_memory_descriptor
    bars: gl.shared_memory_descriptor


class Place(NamedTuple):
    """A tile of queries: batch, head and key head; first query; its keys, in blocks of them."""

    batch: gl.tensor
    head: gl.tensor
    key_head: gl.tensor
    row: gl.tensor
    key_lo: gl.tensor
    key_hi: gl.tensor
    blocks: gl.tensor


# --------------------------------------------------------------------------- barriers and tiles
Q_FULL = gl.constexpr(0)
Q_EMPTY = gl.constexpr(1)
OWN_FULL = gl.constexpr(2)
OWN_EMPTY = gl.constexpr(3)
K_FULL = gl.constexpr(0)
K_EMPTY = gl.constexpr(1)
V_FULL = gl.constexpr(2)
V_EMPTY = gl.constexpr(3)


@gluon.jit
def _own(bars, KIND: gl.constexpr, c: gl.constexpr, C: gl.constexpr):
    """Barrier of consumer c."""
    return bars.index(KIND * C.consumers + c)


@gluon.jit
def _ring(bars, KIND: gl.constexpr, g, C: gl.constexpr):
    """Barrier of the stage of block g."""
    return bars.index(g % C.stages + (4 * C.consumers + KIND * C.stages))


@gluon.jit
def _queries(rows, c: gl.constexpr, C: gl.constexpr):
    return rows.index(c)


@gluon.jit
def _results(rows, c: gl.constexpr, C: gl.constexpr):
    """Tile of consumer c for its residual, then for its results."""
    return rows.index(C.consumers + c)


@gluon.jit
def _own_values(rows, c: gl.constexpr, C: gl.constexpr):
    """Tile of consumer c for its own rows of v, then for what is saved."""
    return rows.index(2 * C.consumers + c)


@gluon.jit
def _keys(blocks, g, C: gl.constexpr):
    return blocks.index(g % C.stages)


@gluon.jit
def _values(blocks, g, C: gl.constexpr):
    return blocks.index(g % C.stages + C.stages)


@gluon.jit
def _matrix(tile, ROWS_OF: gl.constexpr, C: gl.constexpr):
    return tile.reshape([ROWS_OF, C.width])


@gluon.jit
def _tile_full(bars, i, C: gl.constexpr):
    """Barrier of the number of this program's tile i."""
    return bars.index(i % 2 + (4 * C.consumers + 4 * C.stages))


@gluon.jit
def _announce(memory, tile, i, C: gl.constexpr):
    """Tell the consumers the number of this program's tile i.

    They have read that of tile i - 2: tile i - 1 has been loaded, for which they gave back the
    queries of tile i - 2.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    memory.tiles.index(i % 2).store(gl.full([1], tile, gl.int32, layout))
    barrier()
    mbarrier.arrive(_tile_full(memory.bars, i, C), count=1)


@gluon.jit
def _announced(memory, i, C: gl.constexpr):
    """Number of this program's tile i; past the last one when there are no more."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(_tile_full(memory.bars, i, C), i // 2 & 1)
    return gl.max(memory.tiles.index(i % 2).load(layout), 0)


@gluon.jit
def _place(tile, visibility, sizes, C: gl.constexpr):
    head, number = place(tile, gl.cdiv(sizes.T, C.block_t), sizes.heads_together, C.is_causal, True)
    row = number * C.block_t
    batch = head // sizes.H
    head = head % sizes.H
    T, S, key_lo, key_hi, diagonal = load_bounds(
        visibility, batch, sizes.T, sizes.S, sizes.diagonal
    )
    end = key_hi
    if C.is_causal:
        end = gl.minimum(end, gl.minimum(row + C.block_t, T) - 1 + diagonal)
    # One block at least: a row without keys has results too.
    blocks = gl.maximum(gl.cdiv(end - key_lo, C.block_s), 1)
    batch = uniform(batch)
    head = uniform(head)
    return Place(
        batch,
        head,
        head // C.group,
        uniform(row),
        uniform(key_lo),
        uniform(key_hi),
        uniform(blocks),
    )


class Sizes(NamedTuple):
    """Numbers of the launch; heads: of all batch entries."""

    H: gl.tensor
    T: gl.tensor
    S: gl.tensor
    q_offset: gl.tensor
    diagonal: gl.tensor
    value_dim: gl.tensor
    heads: gl.tensor
    heads_together: gl.tensor
    tiles: gl.tensor


class Descriptors(NamedTuple):
    """Tensors that TMA reads and writes; own: v by tiles of queries."""

    q: object
    k: object
    v: object
    own: object
    residual: object
    out: object
    excess: object


class Pointers(NamedTuple):
    """Tensors that are read and written directly."""

    v: object
    v_strides: tuple
    residual: object
    residual_strides: tuple
    out: object
    excess: object
    lse: object
    row_stats: object
    value_sums: object
    marks: object
    counter: object


class Every(NamedTuple):
    """All that a warpgroup is given."""

    descriptors: Descriptors
    pointers: Pointers
    memory: Memory
    visibility: tuple
    gains: Gains
    sizes: Sizes


# ------------------------------------------------------------------------------------- producer
@gluon.jit
def _load(descriptor, at, full, tile):
    mbarrier.expect(full, descriptor.block_type.nbytes)
    tma_load(descriptor, at, full, tile)


@gluon.jit
def _load_queries(q, memory, where, turn, c: gl.constexpr, C: gl.constexpr):
    mbarrier.wait(_own(memory.bars, Q_EMPTY, c, C), (turn & 1) ^ 1)
    at = [where.batch, where.head, where.row + c * ROWS, 0]
    _load(q, at, _own(memory.bars, Q_FULL, c, C), _queries(memory.rows, c, C))


@gluon.jit
def _load_keys(k, memory, where, block, g, C: gl.constexpr):
    mbarrier.wait(_ring(memory.bars, K_EMPTY, g, C), (g // C.stages & 1) ^ 1)
    at = [where.batch, where.key_head, where.key_lo + block * C.block_s, 0]
    _load(k, at, _ring(memory.bars, K_FULL, g, C), _keys(memory.blocks, g, C))


@gluon.jit
def _load_values(v, memory, where, block, g, C: gl.constexpr):
    mbarrier.wait(_ring(memory.bars, V_EMPTY, g, C), (g // C.stages & 1) ^ 1)
    at = [where.batch, where.key_head, where.key_lo + block * C.block_s, 0]
    _load(v, at, _ring(memory.bars, V_FULL, g, C), _values(memory.blocks, g, C))


@gluon.jit
def _own_row(where, sizes, c: gl.constexpr, C: gl.constexpr):
    """Row of v at the position of the first query of consumer c."""
    # Where every query sees all keys or none the diagonal is clamped, and no identity term left.
    offset = sizes.diagonal - 1 if C.is_causal else sizes.q_offset
    return where.row + c * ROWS + offset


@gluon.jit
def _load_own(descriptors, memory, where, sizes, turn, c: gl.constexpr, C: gl.constexpr):
    full = _own(memory.bars, OWN_FULL, c, C)
    mbarrier.wait(_own(memory.bars, OWN_EMPTY, c, C), (turn & 1) ^ 1)
    mbarrier.expect(full, C.bytes_at_the_end)
    if C.residual == "tile":
        at = [where.batch, where.head, where.row + c * ROWS, 0]
        tma_load(descriptors.residual, at, full, _results(memory.rows, c, C))
    if C.has_own:
        at = [where.batch, where.key_head, _own_row(where, sizes, c, C), 0]
        tma_load(descriptors.own, at, full, _own_values(memory.rows, c, C))


@gluon.jit
def _load_tile(descriptors, memory, where, sizes, g, turn, C: gl.constexpr):
    """Ask for all that one tile of queries needs, in the order in which it needs it."""
    _load_queries(descriptors.q, memory, where, turn, 0, C)
    _load_keys(descriptors.k, memory, where, 0, g, C)
    for c in gl.static_range(1, C.consumers):
        _load_queries(descriptors.q, memory, where, turn, c, C)
    for block in range(1, where.blocks):
        _load_keys(descriptors.k, memory, where, block, g + block, C)
        _load_values(descriptors.v, memory, where, block - 1, g + block - 1, C)
    _load_values(descriptors.v, memory, where, where.blocks - 1, g + where.blocks - 1, C)
    if C.bytes_at_the_end > 0:
        for c in gl.static_range(C.consumers):
            _load_own(descriptors, memory, where, sizes, turn, c, C)


@gluon.jit
def _producer(every, c: gl.constexpr, C: gl.constexpr):
    g = 0
    i = 0
    tile = gl.program_id(0)
    while tile < every.sizes.tiles:
        # Asked for ahead of the loads, which hide how long it takes.
        following = gl.num_programs(0) + gl.atomic_add(every.pointers.counter, 1)
        _announce(every.memory, tile, i, C)
        where = _place(tile, every.visibility, every.sizes, C)
        _load_tile(every.descriptors, every.memory, where, every.sizes, g, i, C)
        g += where.blocks
        i += 1
        tile = following
    _announce(every.memory, tile, i, C)


# ------------------------------------------------------------------------------------- consumer
@gluon.jit
def _row_ends(where, diagonal, c: gl.constexpr, C: gl.constexpr):
    """For each query of consumer c, the end of the keys that it sees: [ROWS]."""
    row_layout: gl.constexpr = gl.SliceLayout(1, C.scores)
    rows = where.row + c * ROWS + gl.arange(0, ROWS, row_layout)
    if C.is_causal:
        ends = gl.minimum(rows + diagonal, where.key_hi)
    else:
        ends = rows * 0 + where.key_hi
    return ends


@gluon.jit
def _weights(s, scale_log2, m, u, ends, key, C: gl.constexpr, MASKED: gl.constexpr):
    """Packed weights of a block."""
    weights = gl.exp2(s * scale_log2 - m[:, None])
    if C.is_centered:
        weights -= u[:, None]
    if MASKED:
        weights = gl.where(before(ends - key, C.block_s, C.scores), weights, 0.0)
    return pack(weights, C.dtype)


@gluon.jit
def _first_weights(s, scale_log2, ends, key, C: gl.constexpr):
    """Packed weights of the first block, which sets the pivot m and the reference u of each row."""
    visible = before(ends - key, C.block_s, C.scores)
    # The geometric mean weight of the keys seen is 2 to this power.
    count = gl.minimum(gl.maximum(ends - key, 1), C.block_s).to(gl.float32)
    mean = gl.sum(gl.where(visible, s, 0.0), 1) * (scale_log2 / count)
    m = mean
    if C.has_short_range:
        top = gl.max(gl.where(visible, s * scale_log2, -float("inf")), 1)
        m = gl.where(top == -float("inf"), 0.0, top)
    m = gl.ceil(m)
    # Exact in the dtype of v.
    u = gl.exp2(mean - m).to(C.dtype).to(gl.float32)
    return _weights(s, scale_log2, m, u, ends, key, C, True), m, u


@gluon.jit
def _start_scores(memory, g, c: gl.constexpr, C: gl.constexpr, IN_TURN: gl.constexpr):
    """Start s = q @ k^T of block g."""
    mbarrier.wait(_ring(memory.bars, K_FULL, g, C), g // C.stages & 1)
    if IN_TURN:
        turn_wait(c)
    q = _matrix(_queries(memory.rows, c, C), ROWS, C)
    k = _matrix(_keys(memory.blocks, g, C), C.block_s, C)
    zeros = gl.zeros([ROWS, C.block_s], gl.float32, C.scores)
    return warpgroup_mma(q, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_product(weights, acc, sums, memory, g, C: gl.constexpr):
    """Start acc += weights @ v of block g, and with it the row sums if they are a product."""
    mbarrier.wait(_ring(memory.bars, V_FULL, g, C), g // C.stages & 1)
    v = _matrix(_values(memory.blocks, g, C), C.block_s, C)
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    if C.row_sums == "product":
        sums = warpgroup_mma(weights, memory.ones.permute([1, 0]), sums, is_async=True)
    return acc, sums


@gluon.jit
def _finish_product(weights, acc, sums, memory, g, C: gl.constexpr):
    if C.row_sums == "product":
        acc, sums, weights = warpgroup_mma_wait(0, deps=[acc, sums, weights])
    else:
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(_ring(memory.bars, V_EMPTY, g, C), count=1)
    return acc, sums


@gluon.jit
def _step(
    packed,
    acc,
    sums,
    m,
    u,
    memory,
    g,
    scale_log2,
    ends,
    key,
    zero,
    c: gl.constexpr,
    C: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Block g: its scores start ahead of the product of block g - 1, whose weights are at hand."""
    # Younger than the scores: the product, and the row sums if they are one.
    YOUNGER: gl.constexpr = 2 if C.row_sums == "product" else 1
    weights = unpack(packed, zero, C.dtype, C.weights)
    s = _start_scores(memory, g, c, C, C.takes_turns)
    acc, sums = _start_product(weights, acc, sums, memory, g - 1, C)
    if C.takes_turns:
        turn_pass(c, C.consumers)
    s = warpgroup_mma_wait(YOUNGER, deps=[s])
    mbarrier.arrive(_ring(memory.bars, K_EMPTY, g, C), count=1)
    packed = _weights(s, scale_log2, m, u, ends, key, C, MASKED)
    if C.row_sums == "packed":
        sums = pin(sums + _row_sums(packed, C))
    acc, sums = _finish_product(weights, acc, sums, memory, g - 1, C)
    return packed, acc, sums


@gluon.jit
def _row_sums(packed, C: gl.constexpr):
    return gl.convert_layout(sum_packed(packed, C.dtype), gl.SliceLayout(1, C.scores))


@gluon.jit
def _visible_value_sum(
    own,
    where,
    ends,
    sizes,
    value_sums,
    turn,
    c: gl.constexpr,
    C: gl.constexpr,
    has_key_start: gl.constexpr,
):
    """Sum of v over the keys that each query sees: [ROWS, width].

    Those before the position of the first query come from the prefix sums, which end there; the
    others are among the own rows, and come from a product with ones.
    """
    lead = lead_of(sizes.diagonal, ROWS)
    blocks = gl.cdiv(sizes.S + lead, ROWS)
    if C.is_causal:
        first = _own_row(where, sizes, c, C)
        entry = gl.minimum(gl.maximum((first + lead) // ROWS, 0), blocks)
    else:
        entry = blocks
    columns = gl.arange(0, C.width, gl.SliceLayout(0, C.outputs))
    key_heads = sizes.H // C.group
    head = where.batch.to(gl.int64) * key_heads + where.key_head
    sums = value_sums + (head * (blocks + 1) + entry) * sizes.value_dim
    sums = gl.load(sums + columns, mask=columns < sizes.value_dim, other=0.0)
    total = sums[None, :] + gl.zeros([ROWS, C.width], gl.float32, C.outputs)
    if C.is_causal:
        ones_layout: gl.constexpr = C.triangle
        # turn >> 30 is 0: the triangle is not to be kept in registers from tile to tile.
        keys = first + gl.arange(0, ROWS, gl.SliceLayout(0, ones_layout)) + (turn >> 30)
        ends = gl.convert_layout(ends, gl.SliceLayout(1, ones_layout))
        seen = keys[None, :] < ends[:, None]
        if has_key_start:  # keys before 0 are zeros
            seen = seen & (keys >= where.key_lo)[None, :]
        ones = gl.where(seen, 1.0, 0.0).to(C.dtype)
        total = warpgroup_mma(gl.convert_layout(ones, C.weights), own, total)
    return total


@gluon.jit
def _gathered_value_sum(where, ends, sizes, value_sums, columns, C: gl.constexpr, rows_of):
    """As `_visible_value_sum`, some columns of it, from prefix sums alone."""
    key_heads = sizes.H // C.group
    head = where.batch.to(gl.int64) * key_heads + where.key_head
    inside = (columns < sizes.value_dim)[None, :]
    if C.sums_by_key:
        entry = head * sizes.S + gl.convert_layout(ends, rows_of) - 1
        inside = inside & (gl.convert_layout(ends, rows_of) > 0)[:, None]
    else:
        blocks = gl.cdiv(sizes.S + lead_of(sizes.diagonal, ROWS), ROWS)
        entry = head * (blocks + 1) + blocks + gl.zeros([ROWS], gl.int64, rows_of)
    at = entry[:, None] * sizes.value_dim + columns[None, :]
    return gl.load(value_sums + at, mask=inside, other=0.0)


@gluon.jit
def _attend(every, where, g, turn, c: gl.constexpr, C: gl.constexpr):
    """One tile of queries of consumer c, from its scores to its results."""
    memory = every.memory
    sizes = every.sizes
    row_layout: gl.constexpr = gl.SliceLayout(1, C.scores)
    g = uniform(g)
    zero = uniform(sizes.T >> 30)
    scale_log2 = LOG2_E * gain_of(every.gains, SCALE, where.head, C)
    ends = _row_ends(where, sizes.diagonal, c, C)

    mbarrier.wait(_own(memory.bars, Q_FULL, c, C), turn & 1)
    s = _start_scores(memory, g, c, C, False)
    # The results of the tile before have left: their memory may take what this one reads.
    tma.store_wait(0)
    if C.bytes_at_the_end > 0:
        barrier()
        mbarrier.arrive(_own(memory.bars, OWN_EMPTY, c, C), count=1, pred=turn > 0)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(_ring(memory.bars, K_EMPTY, g, C), count=1)
    packed, m, u = _first_weights(s, scale_log2, ends, where.key_lo, C)
    acc = gl.zeros([ROWS, C.width], gl.float32, C.outputs)
    if C.row_sums == "product":
        sums = gl.zeros([ROWS, 8], gl.float32, C.sums)
    else:
        sums = _row_sums(packed, C)

    # Blocks that all queries of this consumer see whole, then those at the diagonal or the end.
    whole_end = where.key_hi
    if C.is_causal:
        whole_end = gl.minimum(whole_end, where.row + c * ROWS + sizes.diagonal)
    whole = gl.minimum((whole_end - where.key_lo) // C.block_s, where.blocks)
    for block in range(1, whole):
        key = where.key_lo + block * C.block_s
        packed, acc, sums = _step(
            packed, acc, sums, m, u, memory, g + block, scale_log2, ends, key, zero, c, C, False
        )
    for block in range(gl.maximum(whole, 1), where.blocks):
        key = where.key_lo + block * C.block_s
        packed, acc, sums = _step(
            packed, acc, sums, m, u, memory, g + block, scale_log2, ends, key, zero, c, C, True
        )

    mbarrier.arrive(_own(memory.bars, Q_EMPTY, c, C), count=1)
    last = g + where.blocks - 1
    weights = unpack(packed, zero, C.dtype, C.weights)
    acc, sums = _start_product(weights, acc, sums, memory, last, C)
    acc, sums = _finish_product(weights, acc, sums, memory, last, C)
    if C.row_sums == "product":
        sums = gl.convert_layout(gl.max(sums, 1), row_layout)  # of equal numbers
    _finish(every, where, turn, ends, acc, sums, m, u, c, C)


@gluon.jit
def _finish(every, where, turn, ends, acc, sums, m, u, c: gl.constexpr, C: gl.constexpr):
    """Results of a tile from its products: what is saved, then the other terms."""
    pointers = every.pointers
    sizes = every.sizes
    row_layout: gl.constexpr = gl.SliceLayout(1, C.scores)
    first = where.row + c * ROWS
    # [ROWS]
    rows = first + gl.arange(0, ROWS, row_layout)
    inside = rows < sizes.T
    count = gl.maximum(ends - where.key_lo, 0).to(gl.float32)
    has_keys = count > 0.0
    inverse_count = gl.where(has_keys, 1.0 / gl.maximum(count, 1.0), 0.0)
    # NaN is not below the limit either; rows past T hold anything.
    fits = (sums < MOST_WEIGHT) | (rows >= sizes.T)
    # As the portable kernel counts its programs, if they have 64 queries: the last first.
    blocks = gl.cdiv(sizes.T, ROWS)
    last_first = blocks - 1 - first // ROWS
    mark = pointers.marks + (where.batch * sizes.H + where.head) * blocks + last_first
    gl.store(mark, 1 - gl.min(fits.to(gl.int32), 0), mask=last_first >= 0)
    normalizer = sums
    if C.is_centered:
        normalizer += count * u
    normalizer = gl.where(has_keys, normalizer, 1.0)
    inverse_normalizer = gl.where(has_keys, 1.0 / normalizer, 0.0)
    log2_normalizer = gl.where(has_keys, m + gl.log2(normalizer), -float("inf"))
    at = (where.batch.to(gl.int64) * sizes.H + where.head) * sizes.T + rows
    gl.store(pointers.lse + at, LN_2 * log2_normalizer, mask=inside)
    if C.saves:
        plane = sizes.heads.to(gl.int64) * sizes.T
        gl.store(pointers.row_stats + at, log2_normalizer, mask=inside)
        gl.store(pointers.row_stats + at + plane, count, mask=inside)

    of_rows = (sums, inverse_count, inverse_normalizer)
    if C.has_room:
        _write(every, where, turn, ends, acc, of_rows, 0, c, C, C.outputs)
    else:
        # A quarter at a time: all terms of all columns do not fit the registers.
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        _write(every, where, turn, ends, first, of_rows, 0, c, C, C.quarter)
        _write(every, where, turn, ends, second, of_rows, C.width // 4, c, C, C.quarter)
        _write(every, where, turn, ends, third, of_rows, C.width // 2, c, C, C.quarter)
        _write(every, where, turn, ends, fourth, of_rows, 3 * C.width // 4, c, C, C.quarter)


@gluon.jit
def _halves(x):
    """[ROWS, N] as its left and right columns, [ROWS, N / 2]."""
    left, right = gl.split(x.reshape([ROWS, 2, x.shape[1] // 2]).permute([0, 2, 1]))
    return left, right


@gluon.jit
def _offsets(where, head, rows, columns, strides):
    """Where rows and columns of one head stand in a tensor with these strides."""
    at = where.batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    return at + rows.to(gl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]


@gluon.jit
def _write(
    every,
    where,
    turn,
    ends,
    acc,
    of_rows,
    FIRST: gl.constexpr,
    c: gl.constexpr,
    C: gl.constexpr,
    layout: gl.constexpr,
):
    """Results and what is saved, of the columns from FIRST on whose products are in acc."""
    descriptors = every.descriptors
    pointers = every.pointers
    memory = every.memory
    sizes = every.sizes
    sums, inverse_count, inverse_normalizer = of_rows
    rows_of: gl.constexpr = gl.SliceLayout(1, layout)
    first = where.row + c * ROWS
    branch_gain = gain_of(every.gains, BRANCH, where.head, C)
    softmax_gain = branch_gain * gain_of(every.gains, SOFTMAX, where.head, C)
    rows = first + gl.arange(0, ROWS, rows_of)
    columns = FIRST + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    in_columns = (columns < sizes.value_dim)[None, :]
    inside = (rows < sizes.T)[:, None] & in_columns
    own_tile = memory.rows
    if C.has_room and (C.has_own or C.saves):
        own_tile = _matrix(_own_values(memory.rows, c, C), ROWS, C)
    if C.bytes_at_the_end > 0:
        mbarrier.wait(_own(memory.bars, OWN_FULL, c, C), turn & 1)
    # [ROWS, columns]
    acc = gl.convert_layout(acc, layout)
    excess = acc * gl.convert_layout(inverse_normalizer, rows_of)[:, None]
    out = softmax_gain * excess
    if C.is_centered:
        if C.has_room:
            value_sum = _visible_value_sum(
                own_tile,
                where,
                ends,
                sizes,
                pointers.value_sums,
                turn,
                c,
                C,
                every.visibility[KEY_START] is not None,
            )
        else:
            value_sum = _gathered_value_sum(
                where, ends, sizes, pointers.value_sums, columns, C, rows_of
            )
        on_sum = gl.convert_layout(sums * inverse_count * inverse_normalizer, rows_of)
        excess -= on_sum[:, None] * value_sum
        center_gain = branch_gain * gain_of(every.gains, CENTER, where.head, C)
        on_center = gl.convert_layout((softmax_gain - center_gain) * inverse_count, rows_of)
        out = softmax_gain * excess + on_center[:, None] * value_sum
    at = (where.batch.to(gl.int64) * sizes.H + where.head) * sizes.T
    at = (at + rows)[:, None] * sizes.value_dim + columns[None, :]
    if C.saves and not C.has_room:
        gl.store(pointers.excess + at, excess.to(C.dtype), mask=inside)
    if C.has_identity:
        identity_gain = branch_gain * gain_of(every.gains, IDENTITY, where.head, C)
        if C.has_room:
            own = own_tile.load(C.outputs)
        else:
            keys = _own_row(where, sizes, c, C) + gl.arange(0, ROWS, rows_of)
            in_keys = ((keys >= 0) & (keys < sizes.S))[:, None]
            own_at = _offsets(where, where.key_head, keys, columns, pointers.v_strides)
            own = gl.load(pointers.v + own_at, mask=in_keys & in_columns, other=0.0)
        out += identity_gain * own.to(gl.float32)
    results = memory.rows
    if not C.is_direct:
        results = _matrix(_results(memory.rows, c, C), ROWS, C)
    if C.residual == "tile":
        skip_gain = gain_of(every.gains, SKIP, where.head, C)
        out += skip_gain * results.load(C.outputs).to(gl.float32)
    if C.residual == "direct":
        skip_gain = gain_of(every.gains, SKIP, where.head, C)
        residual_at = _offsets(where, where.head, rows, columns, pointers.residual_strides)
        residual = gl.load(pointers.residual + residual_at, mask=inside, other=0.0)
        out += skip_gain * residual.to(gl.float32)
    if C.is_direct:
        gl.store(pointers.out + at, out.to(pointers.out.dtype.element_ty), mask=inside)
    if C.has_room and (not C.is_direct or C.saves):
        # Every warp has read what the results replace.
        barrier()
        if not C.is_direct:
            results.store(out.to(C.dtype))
        if C.saves:
            own_tile.store(excess.to(C.dtype))
        fence_async_shared()
        barrier()
        place_of = [where.batch, where.head, first, 0]
        if not C.is_direct:
            tma_store(descriptors.out, place_of, _results(memory.rows, c, C))
        if C.saves:
            tma_store(descriptors.excess, place_of, _own_values(memory.rows, c, C))


@gluon.jit
def _consumer(every, c: gl.constexpr, C: gl.constexpr):
    if C.takes_turns and c == C.consumers - 1:
        turn_pass(c, C.consumers)
    g = 0
    i = 0
    tile = _announced(every.memory, 0, C)
    while tile < every.sizes.tiles:
        where = _place(tile, every.visibility, every.sizes, C)
        _attend(every, where, g, i, c, C)
        g += where.blocks
        i += 1
        tile = _announced(every.memory, i, C)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "H", "T", "S", "q_offset", "diagonal", "value_dim", "heads", "heads_together", "tiles",
    ]
)  # fmt: skip
def attention_fwd_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    own_descriptor,
    residual_descriptor,
    out_descriptor,
    excess_descriptor,
    v_ptr,
    residual_ptr,
    out_ptr,
    excess_ptr,
    lse_ptr,
    row_stats_ptr,
    value_sums_ptr,
    marks_ptr,
    counter_ptr,
    visibility,
    gains,
    gain_strides,
    v_strides,
    residual_strides,
    H,
    T,
    S,
    q_offset,
    diagonal,
    value_dim,
    heads,
    heads_together,
    tiles,
    C: gl.constexpr,
):
    rows_layout: gl.constexpr = q_descriptor.layout
    blocks_layout: gl.constexpr = k_descriptor.layout
    rows = gl.allocate_shared_memory(C.dtype, [C.row_tiles, 1, 1, ROWS, C.width], rows_layout)
    blocks = gl.allocate_shared_memory(
        C.dtype, [2 * C.stages, 1, 1, C.block_s, C.width], blocks_layout
    )
    bars = gl.allocate_shared_memory(
        gl.int64, [4 * C.consumers + 4 * C.stages + 2, 1], mbarrier.MBarrierLayout()
    )
    ones = bars
    if C.row_sums == "product":
        one_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, C.block_s], C.dtype)
        one = gl.full([8, C.block_s], 1.0, C.dtype, one_layout)
        ones = gl.allocate_shared_memory(C.dtype, [8, C.block_s], ones_layout, one)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    tiles_smem = gl.allocate_shared_memory(gl.int32, [2, 1], flat)
    memory = Memory(rows, blocks, ones, tiles_smem, bars)
    for i in gl.static_range(4 * C.consumers):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(C.stages):
        mbarrier.init(_ring(bars, K_FULL, i, C), count=1)
        mbarrier.init(_ring(bars, K_EMPTY, i, C), count=C.consumers)
        mbarrier.init(_ring(bars, V_FULL, i, C), count=1)
        mbarrier.init(_ring(bars, V_EMPTY, i, C), count=C.consumers)
    for i in gl.static_range(2):
        mbarrier.init(_tile_full(bars, i, C), count=1)
    fence_async_shared()
    barrier()

    descriptors = Descriptors(
        q_descriptor,
        k_descriptor,
        v_descriptor,
        own_descriptor,
        residual_descriptor,
        out_descriptor,
        excess_descriptor,
    )
    pointers = Pointers(
        v_ptr,
        v_strides,
        residual_ptr,
        residual_strides,
        out_ptr,
        excess_ptr,
        lse_ptr,
        row_stats_ptr,
        value_sums_ptr,
        marks_ptr,
        counter_ptr,
    )
    gains = Gains(gains, gain_strides)
    sizes = Sizes(H, T, S, q_offset, diagonal, value_dim, heads, heads_together, tiles)
    every = Every(descriptors, pointers, memory, visibility, gains, sizes)
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


class ForwardPlan:
    """The launches of a forward, for one signature of a call; calling it launches them.

    The second, of the portable kernel, computes the queries that the first has marked.
    """

    def __init__(self, call: Call, saves: bool) -> None:
        q, k, v, residual = call[:4]
        width = width_of(q.shape[3], v.shape[3])
        tile = forward_tile(width, call.visibility.is_causal, k.shape[2])
        self.shape, self.first = _first_launch(call, saves, width, tile)
        rows, keys = [1, 1, ROWS.value, width], [1, 1, tile.block_s, width]
        self.describe = Describe(rows, keys, keys, rows, rows, rows, rows)
        self.marks = (*q.shape[:2], triton.cdiv(q.shape[2], ROWS.value))
        config = marked_tile(width)
        self.second = launch.Launch.for_call(
            call, portable_kernel, math.prod(self.marks), config, q, k, v, residual, BOUNDED=False
        )
        self.value_sums = ValueSums(call, config) if call.is_centered else None
        self.sums_by_key = ValueSumsByKey(call, config) if self.shape.sums_by_key else None

    def __call__(self, call: Call, result: ForwardResult) -> None:
        q, k, v, residual, gains, visibility, _, _ = call
        shape = self.shape
        seen, gains = visibility_arguments(visibility), tuple(gains)
        marks = torch.empty(self.marks, dtype=torch.int32, device=q.device)
        value_sums = sums_by_key = None
        # The prepass sets it to 0, if there is one.
        allocate = torch.zeros if self.value_sums is None else torch.empty
        counter = allocate(1, dtype=torch.int32, device=q.device)
        if self.value_sums is not None:
            value_sums = self.value_sums(call, counter)
        if self.sums_by_key is not None:
            sums_by_key = self.sums_by_key(call, value_sums)
        self.first(
            *self.describe(
                q,
                k,
                v,
                v if shape.has_own else None,
                residual if shape.residual == "tile" else None,
                None if shape.is_direct else result.out,
                result.excess if shape.has_room else None,
            ),
            v if shape.gathers_own else None,
            residual if shape.residual == "direct" else None,
            result.out if shape.is_direct else None,
            None if shape.has_room else result.excess,
            result.lse,
            result.row_stats,
            value_sums if sums_by_key is None else sums_by_key,
            marks,
            counter,
            seen,
            gains,
        )
        descriptors = (None, None, None)
        self.second(
            *(q, k, v, *descriptors, residual, *result, value_sums, marks, seen, None, gains)
        )


def _first_launch(
    call: Call, saves: bool, width: int, tile: ForwardTile
) -> tuple[ForwardShape, launch.Launch]:
    q, k, v, residual, gains, visibility, _, _ = call
    B, H, T, _ = q.shape
    HKV, S, DV = v.shape[1:]
    gain_strides, gain_is_tensor = launch.gain_arguments(gains)
    fits = residual is not None and residual.dtype == q.dtype and launch.fits_tma(residual)
    fits = fits and width <= MOST_COLUMNS_AT_ONCE
    shape = ForwardShape(
        consumers=tile.consumers,
        block_s=tile.block_s,
        stages=tile.stages,
        width=width,
        dtype=DTYPES[q.dtype],
        row_sums=tile.row_sums,
        takes_turns=tile.takes_turns,
        is_causal=visibility.is_causal,
        is_centered=call.is_centered,
        has_identity=call.has_identity,
        residual="none" if residual is None else "tile" if fits else "direct",
        saves=saves,
        group=H // HKV,
        gain_is_tensor=gain_is_tensor,
    )
    row_tiles = triton.cdiv(T, shape.block_t)
    bytes_of_head = 4 * S * shape.width
    tiles = B * H * row_tiles
    sizes = (
        *(H, T, S, *visibility_sizes(visibility, T, S), DV, B * H),
        heads_together(B * H, H // HKV, row_tiles, bytes_of_head, shape.is_causal),
        tiles,
    )
    return shape, launch.Launch(
        attention_fwd_kernel,
        min(launch.multiprocessors(q), tiles),
        (
            gain_strides,
            launch.strides(v if shape.gathers_own else None),
            launch.strides(residual),
            *sizes,
        ),
        TileConfig(
            shape.block_t, shape.block_s, 4, 1, max_registers=MOST_REGISTERS[shape.consumers]
        ),
        C=Constants(shape),
    )
