"""Which keys a tile of queries sees: the kernels' side of `shaped_attn.visibility`.

Row i sees the keys of `[key_lo, key_hi)` below `i + diagonal` that a mask, if any, lets through.
Inside a kernel `bounds` is the tuple of T, S, key_lo, key_hi and diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .primitives import head_base

if TYPE_CHECKING:
    from ..visibility import Visibility

# Places in the tuple that the kernels take. Triton 3.6 forgets that a value which a function
# returns is known to the compiler, so kernels look themselves whether the mask is None.
MASK = tl.constexpr(0)
MASK_STRIDES = tl.constexpr(1)
KEY_START = tl.constexpr(5)
KEY_END = tl.constexpr(6)


def visibility_sizes(visibility: Visibility, T: int, S: int) -> tuple[int, int]:
    """Return the arguments `q_offset` and `diagonal` of the kernels, as 32-bit numbers.

    Row i sees keys below `i + diagonal`; without a causal mask this is past every key. Both are
    clamped to where they still matter, so that any Python integer is a valid `q_offset`: beyond
    2**30 no key is aligned and no prior has weight.
    """
    q_offset = visibility.q_offset
    diagonal = min(max(q_offset + 1, -T), S) if visibility.is_causal else S
    return min(max(q_offset, -(2**30)), 2**30), diagonal


def visibility_arguments(visibility: Visibility) -> tuple:
    """Return the tuple `visibility` of the kernels: mask as bytes, its strides, key range."""
    mask = visibility.attn_mask
    key_range = (visibility.key_start, visibility.key_end)
    if mask is None:
        return (None, 0, 0, 0, 0, *key_range)
    return (mask.view(torch.uint8), *mask.stride(), *key_range)  # neither copied nor expanded


@triton.jit
def load_bounds(visibility, batch, T, S, diagonal):
    """`bounds` of one batch entry: sizes, keys `[key_lo, key_hi)` inside `[0, S)`, diagonal."""
    key_lo = 0
    key_hi = S
    if visibility[KEY_START] is not None:
        key_lo = tl.load(visibility[KEY_START] + batch).to(tl.int64)
        key_lo = tl.minimum(tl.maximum(key_lo, 0), S).to(tl.int32)
    if visibility[KEY_END] is not None:
        key_hi = tl.load(visibility[KEY_END] + batch).to(tl.int64)
        key_hi = tl.minimum(tl.maximum(key_hi, 0), S).to(tl.int32)
    return T, S, key_lo, key_hi, diagonal


@triton.jit
def key_blocks(row, bounds, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, ALL_MASKED: tl.constexpr):
    """Key blocks that the query rows `row .. row + BLOCK_T - 1` touch.

    Returns `first` (start of the first block), `full_end` (the blocks from first + BLOCK_S up to
    here are visible to every row) and `masked` (how many blocks need a mask: the first, then those
    from full_end on).
    """
    T, S, key_lo, key_hi, diagonal = bounds
    end = tl.minimum(key_hi, tl.minimum(row + BLOCK_T, T) - 1 + diagonal)
    first = key_lo // BLOCK_S * BLOCK_S
    full_end = first + BLOCK_S
    if not ALL_MASKED:
        full_end = tl.maximum(full_end, tl.minimum(key_hi, row + diagonal) // BLOCK_S * BLOCK_S)
    masked = tl.where(end > key_lo, 1 + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_S), 0)
    return first, full_end, masked


@triton.jit
def visible_keys(visibility, bounds, batch, head, row, key, rows, keys):
    """Which keys each query of a tile from `row` and `key` on sees, a mask included.

    rows, keys: `index` in the tile, one of them a column, whose product is in its orientation.
    """
    T, S, key_lo, key_hi, diagonal = bounds
    seen = tl.where(row + rows < T, tl.minimum(key_hi, row + rows + diagonal) - key_lo, 0)
    # One comparison a score: keys before key_lo are large without a sign.
    visible = (key + keys - key_lo).to(tl.uint32) < tl.maximum(seen, 0).to(tl.uint32)
    if visibility[MASK] is not None:
        strides = visibility[MASK_STRIDES:KEY_START]
        base = head_base(visibility[MASK], batch, head, strides)
        origin = base + tl.cast(row, tl.int64) * strides[2] + tl.cast(key, tl.int64) * strides[3]
        inside = (row + rows < T) & (key + keys < S)
        offsets = rows * strides[2] + keys * strides[3]
        visible = visible & (tl.load(origin + offsets, mask=inside, other=0) != 0)
    return visible


@triton.jit
def visible_count(rows, key, bounds, BLOCK_S: tl.constexpr):
    """How many of the keys `key .. key + BLOCK_S - 1` each of the `rows` sees without a mask."""
    T, S, key_lo, key_hi, diagonal = bounds
    end = tl.minimum(tl.minimum(key_hi, rows + diagonal), key + BLOCK_S)
    return tl.maximum(end - tl.maximum(key_lo, key), 0).to(tl.float32)


@triton.jit
def query_blocks(
    key, bounds, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, ALL_MASKED: tl.constexpr
):
    """Query blocks that see some of the keys `key .. key + BLOCK_S - 1`.

    Returns `masked_from` and `full_from`, multiples of BLOCK_T: rows in between see some of these
    keys, rows from full_from on see all.
    """
    T, S, key_lo, key_hi, diagonal = bounds
    in_range = (key < key_hi) & (key + BLOCK_S > key_lo)
    whole = (key >= key_lo) & (key + BLOCK_S <= key_hi)
    masked_from = tl.minimum(tl.maximum(tl.maximum(key, key_lo) + 1 - diagonal, 0), T)
    masked_from = tl.where(in_range, masked_from, T) // BLOCK_T * BLOCK_T
    full_from = tl.cdiv(T, BLOCK_T) * BLOCK_T
    if not ALL_MASKED:
        sees_all = tl.cdiv(tl.maximum(key + BLOCK_S - diagonal, 0), BLOCK_T) * BLOCK_T
        full_from = tl.where(whole, tl.minimum(sees_all, full_from), full_from)
    return tl.where(in_range, masked_from, full_from), full_from
