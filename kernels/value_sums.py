"""Sums of v over the keys that each query sees: prefix sums over blocks of keys, and the rest.

Row i sees the keys of `[key_lo, key_hi)` up to its own position. Blocks of SUM_BLOCK keys are laid
so that multiples of SUM_BLOCK queries start at their boundaries: block b is `[SUM_BLOCK b - lead,
SUM_BLOCK (b + 1) - lead)`, whatever the offset between queries and keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import launch
from .configs import TileConfig
from .primitives import cast, dot, load_tile, tile_width
from .visibility import load_bounds, visibility_arguments, visibility_sizes

if TYPE_CHECKING:
    from .attention import Call

_BLOCKS_AT_ONCE = tl.constexpr(32)
_COLUMNS_AT_ONCE = tl.constexpr(32)


@triton.jit
def lead_of(diagonal, SUM_BLOCK: tl.constexpr):
    """How far blocks are shifted: 1 - diagonal, modulo their size."""
    return (1 - diagonal) & (SUM_BLOCK - 1)


@triton.jit
def _load_block(
    v_ptr, visibility, v_strides, HKV, S, diagonal, DV: tl.constexpr, SUM_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Block of keys of this program as float32, 0 out of range; head, number, blocks, positions."""
    lead = lead_of(diagonal, SUM_BLOCK)
    blocks = tl.cdiv(S + lead, SUM_BLOCK)
    pid = tl.program_id(0)
    pid_s = pid % blocks
    pid_bh = pid // blocks
    batch = pid_bh // HKV
    v_rows = (None, v_ptr, batch, pid_bh % HKV, S) + v_strides
    T, S, key_lo, key_hi, diagonal = load_bounds(visibility, batch, S, S, S)
    row = pid_s * SUM_BLOCK - lead
    offs_s = row + tl.arange(0, SUM_BLOCK)
    in_range = (offs_s >= key_lo) & (offs_s < key_hi)
    # [SUM_BLOCK, columns of a tile]
    v = load_tile(v_rows, row, DV, SUM_BLOCK, WIDE).to(tl.float32)
    return tl.where(in_range[:, None], v, 0.0), pid_bh, pid_s, blocks, offs_s


@triton.jit(do_not_specialize=["HKV", "S", "diagonal"])
def value_sums_kernel(
    v_ptr,
    sums_ptr,
    visibility,
    v_strides,
    HKV,
    S,
    diagonal,
    DV: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sum of the keys in range of one block, to the entry that follows it."""
    v, pid_bh, pid_s, blocks, offs_s = _load_block(
        v_ptr, visibility, v_strides, HKV, S, diagonal, DV, SUM_BLOCK, WIDE
    )
    # [columns of a tile]
    total = tl.sum(v, 0)
    offs_d = tl.arange(0, tile_width(DV))
    entry = tl.cast(pid_bh, tl.int64) * (blocks + 1) + pid_s + 1
    tl.store(sums_ptr + entry * DV + offs_d, total, mask=offs_d < DV)


@triton.jit(do_not_specialize=["HKV", "S", "diagonal"])
def value_sums_by_key_kernel(
    v_ptr,
    sums_ptr,
    sums_by_key_ptr,
    visibility,
    v_strides,
    HKV,
    S,
    diagonal,
    DV: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of the keys in range up to each key of one block, itself included."""
    v, pid_bh, pid_s, blocks, offs_s = _load_block(
        v_ptr, visibility, v_strides, HKV, S, diagonal, DV, SUM_BLOCK, WIDE
    )
    offs_d = tl.arange(0, tile_width(DV))
    entry = tl.cast(pid_bh, tl.int64) * (blocks + 1) + pid_s
    before = tl.load(sums_ptr + entry * DV + offs_d, mask=offs_d < DV, other=0.0)
    rows = sums_by_key_ptr + (tl.cast(pid_bh, tl.int64) * S + offs_s)[:, None] * DV
    inside = ((offs_s >= 0) & (offs_s < S))[:, None] & (offs_d < DV)[None, :]
    tl.store(rows + offs_d[None, :], before[None, :] + tl.cumsum(v, 0), mask=inside)


@triton.jit(do_not_specialize=["entries"])
def value_prefix_kernel(sums_ptr, counter_ptr, entries, DV: tl.constexpr):
    """Turn the entries of one head into sums of all up to them, some columns at a time.

    The counter of the forward's tiles, if it has one, starts at 0.
    """
    chunks: tl.constexpr = (DV + _COLUMNS_AT_ONCE - 1) // _COLUMNS_AT_ONCE
    pid = tl.program_id(0)
    if counter_ptr is not None:
        if pid == 0:
            tl.store(counter_ptr, 0)
    offs_d = pid % chunks * _COLUMNS_AT_ONCE + tl.arange(0, _COLUMNS_AT_ONCE)
    base = sums_ptr + tl.cast(pid // chunks, tl.int64) * entries * DV
    # [_COLUMNS_AT_ONCE]
    before = tl.zeros((_COLUMNS_AT_ONCE,), tl.float32)
    for first in range(0, entries, _BLOCKS_AT_ONCE):
        offs_e = first + tl.arange(0, _BLOCKS_AT_ONCE)
        # [_BLOCKS_AT_ONCE, _COLUMNS_AT_ONCE]
        at = base + offs_e[:, None] * DV + offs_d[None, :]
        inside = (offs_e < entries)[:, None] & (offs_d < DV)[None, :]
        # The first entry, before all keys, has not been written.
        sums = tl.load(at, mask=inside & (offs_e > 0)[:, None], other=0.0)
        tl.store(at, before[None, :] + tl.cumsum(sums, 0), mask=inside)
        before += tl.sum(sums, 0)


@triton.jit
def visible_value_sum(
    v_rows,
    sums_ptr,
    row,
    bounds,
    DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """Sum of v over the keys that each of the rows `row .. row + BLOCK_T - 1` sees.

    sums_ptr: the entries of this head. Keys up to the block of the first row's position come from
    them, the others, which some rows see, from a product with ones, exact in every dtype.
    """
    T, S, key_lo, key_hi, diagonal = bounds
    BLOCK_DV: tl.constexpr = tile_width(DV)
    lead = lead_of(diagonal, SUM_BLOCK)
    blocks = tl.cdiv(S + lead, SUM_BLOCK)
    own = tl.minimum(tl.maximum(row + diagonal - 1 + lead, 0) // SUM_BLOCK, blocks)
    entry = tl.where(row + diagonal < key_hi, own, blocks)
    offs_d = tl.arange(0, BLOCK_DV)
    # [BLOCK_DV]
    before = tl.load(sums_ptr + entry.to(tl.int64) * DV + offs_d, mask=offs_d < DV, other=0.0)
    # [BLOCK_T, BLOCK_DV]
    total = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32) + before[None, :]
    start = entry * SUM_BLOCK - lead
    end = tl.minimum(key_hi, tl.minimum(row + BLOCK_T, T) - 1 + diagonal)
    for key in tl.range(start, end, SUM_BLOCK, num_stages=1):
        offs_s = key + tl.arange(0, SUM_BLOCK)
        # [SUM_BLOCK, BLOCK_DV]
        v = load_tile(v_rows, key, DV, SUM_BLOCK, WIDE)
        # The first row that sees a key: a column of the tile is one thread's, and rows are many.
        in_range = (offs_s >= key_lo) & (offs_s < key_hi)
        from_row = tl.where(in_range, offs_s - diagonal - row + 1, BLOCK_T)
        # [BLOCK_T, SUM_BLOCK]
        visible = tl.arange(0, BLOCK_T)[:, None] >= from_row[None, :]
        total = dot(cast(visible.to(tl.float32), v.dtype), v, total, DOT_PRECISION)
    return total


class ValueSums:
    """Sums of v (B, Hkv, S, Dv) before each boundary of the blocks, for one signature of a call.

    A call returns float32 (B, Hkv, blocks + 1, Dv): entry e has the keys in range before block e.
    It sets `counter`, if given, to 0.
    """

    def __init__(self, call: Call, config: TileConfig) -> None:
        B, HKV, S, DV = call.v.shape
        blocks, self.sums = _of_blocks(value_sums_kernel, call, config.sum_block, num_warps=2)
        self.shape = (B, HKV, blocks + 1, DV)
        programs = B * HKV * triton.cdiv(DV, _COLUMNS_AT_ONCE.value)
        config = TileConfig(_BLOCKS_AT_ONCE.value, _COLUMNS_AT_ONCE.value, 4, 1)
        self.prefix = launch.Launch(value_prefix_kernel, programs, (blocks + 1,), config, DV=DV)

    def __call__(self, call: Call, counter: torch.Tensor | None = None) -> torch.Tensor:
        v = call.v
        sums = torch.empty(self.shape, dtype=torch.float32, device=v.device)
        self.sums(v, sums, visibility_arguments(call.visibility))
        self.prefix(sums, counter)
        return sums


class ValueSumsByKey:
    """Sums of v up to each key, from those that `ValueSums` has returned.

    A call returns float32 (B, Hkv, S, Dv).
    """

    def __init__(self, call: Call, config: TileConfig) -> None:
        # It keeps a block of sums in registers.
        kernel = value_sums_by_key_kernel
        _, self.launch = _of_blocks(kernel, call, config.sum_block, num_warps=8)

    def __call__(self, call: Call, sums: torch.Tensor) -> torch.Tensor:
        v = call.v
        sums_by_key = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        self.launch(v, sums, sums_by_key, visibility_arguments(call.visibility))
        return sums_by_key


def _of_blocks(
    kernel: triton.JITFunction, call: Call, sum_block: int, num_warps: int
) -> tuple[int, launch.Launch]:
    """Number of blocks of keys of a head, and the launch of a kernel with a program for each."""
    v = call.v
    B, HKV, S, DV = v.shape
    _, diagonal = visibility_sizes(call.visibility, call.q.shape[2], S)
    blocks = triton.cdiv(S + ((1 - diagonal) & (sum_block - 1)), sum_block)
    config = TileConfig(sum_block, sum_block, num_warps, 1)
    return blocks, launch.Launch(
        kernel,
        B * HKV * blocks,
        (v.stride(), HKV, S, diagonal),
        config,
        DV=DV,
        SUM_BLOCK=sum_block,
        WIDE=launch.needs_wide_index(config, v),
    )
