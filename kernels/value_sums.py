"""Sums of v over the visible keys of a query tile, from sums over fixed blocks of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .configs import TileConfig
from .primitives import cast, dot, load_tile, tile_width

_BLOCKS_AT_ONCE = tl.constexpr(16)


@triton.jit(do_not_specialize=["HKV", "S"])
def value_block_sums_kernel(
    v_ptr,
    sums_ptr,
    v_strides,
    HKV,
    S,
    DV: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(S, SUM_BLOCK)
    pid = tl.program_id(0)
    pid_s = pid % blocks
    pid_bh = pid // blocks
    v_rows = (None, v_ptr, pid_bh // HKV, pid_bh % HKV, S) + v_strides
    # [SUM_BLOCK, BLOCK_DV]
    v = load_tile(v_rows, pid_s * SUM_BLOCK, DV, SUM_BLOCK, WIDE)
    # [BLOCK_DV]
    total = tl.sum(v.to(tl.float32), 0)
    offs_d = tl.arange(0, tile_width(DV))
    tl.store(sums_ptr + tl.cast(pid, tl.int64) * DV + offs_d, total, mask=offs_d < DV)


class ValueBlockSums:
    """Sums of v (B, Hkv, S, Dv) over blocks of `sum_block` rows, for one signature of v.

    A call returns float32 (B, Hkv, ceil(S / sum_block), Dv).
    """

    def __init__(self, v: torch.Tensor, config: TileConfig) -> None:
        B, HKV, S, DV = v.shape
        blocks = triton.cdiv(S, config.sum_block)
        self.shape = (B, HKV, blocks, DV)
        self.launch = launch.Launch(
            value_block_sums_kernel,
            B * HKV * blocks,
            (v.stride(), HKV, S),
            config,
            DV=DV,
            SUM_BLOCK=config.sum_block,
            WIDE=launch.needs_wide_index(config, v),
        )

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        sums = torch.empty(self.shape, dtype=torch.float32, device=v.device)
        self.launch(v, sums)
        return sums


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

    Blocks that every row sees come from the block sums; those at the edges of the visible range
    from a product with ones, which are exact in every dtype.
    """
    T, S, key_lo, key_hi, diagonal = bounds
    BLOCK_DV: tl.constexpr = tile_width(DV)
    offs_d = tl.arange(0, BLOCK_DV)
    end = tl.minimum(key_hi, tl.minimum(row + BLOCK_T, T) - 1 + diagonal)
    first = key_lo // SUM_BLOCK
    full = tl.cdiv(key_lo, SUM_BLOCK)
    full_end = tl.maximum(full, tl.minimum(key_hi, row + diagonal) // SUM_BLOCK)

    # [BLOCK_DV]
    whole = tl.zeros((BLOCK_DV,), tl.float32)
    for block in tl.range(full, full_end, _BLOCKS_AT_ONCE):
        offs_b = block + tl.arange(0, _BLOCKS_AT_ONCE)
        inside = (offs_b < full_end)[:, None] & (offs_d < DV)[None, :]
        # [_BLOCKS_AT_ONCE, BLOCK_DV]
        pointers = sums_ptr + offs_b[:, None].to(tl.int64) * DV + offs_d[None, :]
        whole += tl.sum(tl.load(pointers, mask=inside, other=0.0), 0)

    # [BLOCK_T, BLOCK_DV]
    total = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32) + whole[None, :]
    head_edge = full - first
    tail_edge = tl.maximum(tl.cdiv(end, SUM_BLOCK) - full_end, 0)
    for edge in tl.range(0, tl.where(end > key_lo, head_edge + tail_edge, 0), num_stages=1):
        key = tl.where(edge < head_edge, first + edge, full_end + edge - head_edge) * SUM_BLOCK
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
