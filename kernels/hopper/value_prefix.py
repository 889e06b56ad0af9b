"""Sums of v over all keys before each tile of queries: plain Triton, ahead of the forward.


Row i of head h sees the keys of `[key_lo, key_hi)` up to its own position. Blocks of 64 keys are
laid so that tiles of queries start at their boundaries: block b is `[64 b - lead, 64 (b + 1) -
lead)`, whatever the offset between queries and keys.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from .. import launch
from ..configs import TileConfig
from ..primitives import load_tile, tile_width
from ..visibility import load_bounds

_BLOCK = tl.constexpr(64)
_BLOCKS_AT_ONCE = tl.constexpr(32)
_COLUMNS_AT_ONCE = tl.constexpr(32)


@triton.jit
def _load_block(v_ptr, visibility, v_strides, HKV, S, lead, DV: tl.constexpr, WIDE: tl.constexpr):
    """Block of keys of this program as float32, 0 out of range; head, number, blocks, positions."""
    blocks = tl.cdiv(S + lead, _BLOCK)
    pid = tl.program_id(0)
    pid_s = pid % blocks
    pid_bh = pid // blocks
    batch = pid_bh // HKV
    v_rows = (None, v_ptr, batch, pid_bh % HKV, S) + v_strides
    T, S, key_lo, key_hi, diagonal = load_bounds(visibility, batch, S, S, S)
    row = pid_s * _BLOCK - lead
    offs_s = row + tl.arange(0, _BLOCK)
    in_range = (offs_s >= key_lo) & (offs_s < key_hi)
    # [_BLOCK, columns of a tile]
    v = load_tile(v_rows, row, DV, _BLOCK, WIDE).to(tl.float32)
    return tl.where(in_range[:, None], v, 0.0), pid_bh, pid_s, blocks, offs_s


@triton.jit(do_not_specialize=["HKV", "S", "lead"])
def value_sums_kernel(
    v_ptr,
    sums_ptr,
    visibility,
    v_strides,
    HKV,
    S,
    lead,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sum of the keys in range of one block, to the entry that follows it."""
    v, pid_bh, pid_s, blocks, offs_s = _load_block(
        v_ptr, visibility, v_strides, HKV, S, lead, DV, WIDE
    )
    # [columns of a tile]
    total = tl.sum(v, 0)
    offs_d = tl.arange(0, tile_width(DV))
    entry = tl.cast(pid_bh, tl.int64) * (blocks + 1) + pid_s + 1
    tl.store(sums_ptr + entry * DV + offs_d, total, mask=offs_d < DV)


@triton.jit(do_not_specialize=["HKV", "S", "lead"])
def value_sums_by_key_kernel(
    v_ptr,
    sums_ptr,
    sums_by_key_ptr,
    visibility,
    v_strides,
    HKV,
    S,
    lead,
    DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of the keys in range up to each key of one block, itself included."""
    v, pid_bh, pid_s, blocks, offs_s = _load_block(
        v_ptr, visibility, v_strides, HKV, S, lead, DV, WIDE
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


class ValuePrefixSums:
    """Sums of v (B, Hkv, S, Dv) before each boundary of the blocks, for one signature of a call.

    A call returns float32 (B, Hkv, ceil((S + lead) / 64) + 1, Dv): entry e has the keys in range
    below 64 e - lead. Where it is `by_key` it returns (B, Hkv, S, Dv): entry s has those up to s.
    It sets `counter`, if given, to 0.
    """

    def __init__(self, v: torch.Tensor, lead: int, by_key: bool) -> None:
        B, HKV, S, DV = v.shape
        blocks = triton.cdiv(S + lead, _BLOCK.value)
        config = TileConfig(_BLOCK.value, _BLOCK.value, 4, 1)
        chunks = triton.cdiv(DV, _COLUMNS_AT_ONCE.value)
        self.shape = (B, HKV, blocks + 1, DV)

        def of_blocks(kernel: triton.JITFunction, config: TileConfig) -> launch.Launch:
            return launch.Launch(
                kernel,
                B * HKV * blocks,
                (v.stride(), HKV, S, lead),
                config,
                DV=DV,
                WIDE=launch.needs_wide_index(config, v),
            )

        self.sums = of_blocks(value_sums_kernel, config)
        self.prefix = launch.Launch(
            value_prefix_kernel, B * HKV * chunks, (blocks + 1,), config, DV=DV
        )
        # It keeps a block of sums in registers.
        more_warps = dataclasses.replace(config, num_warps=8)
        self.by_key = of_blocks(value_sums_by_key_kernel, more_warps) if by_key else None

    def __call__(
        self, v: torch.Tensor, visibility: tuple, counter: torch.Tensor | None
    ) -> torch.Tensor:
        sums = torch.empty(self.shape, dtype=torch.float32, device=v.device)
        self.sums(v, sums, visibility)
        self.prefix(sums, counter)
        if self.by_key is None:
            return sums
        sums_by_key = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        self.by_key(v, sums, sums_by_key, visibility)
        return sums_by_key
