"""Parts that the kernels share: casts, products, loads, visibility. Grammar: README.md."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round float32 `x` to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates float32 to bfloat16: round in integers first.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, DOT_PRECISION: tl.constexpr):
    """`acc + a @ b` accumulated in float32."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 bit patterns as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=DOT_PRECISION)


@triton.jit
def load_gain(gains, strides, IS_TENSOR: tl.constexpr, index: tl.constexpr, head):
    """Gain number `index` of one head as float32, from a number or a tensor."""
    if IS_TENSOR[index]:
        value = tl.load(gains[index] + head * strides[index]).to(tl.float32)
    else:
        # A Python float is float64 in some launch paths.
        value = tl.full((), gains[index], tl.float32)
    return value


@triton.jit
def index(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """0 .. BLOCK-1, int64 where strides inside a tile need it."""
    offs = tl.arange(0, BLOCK)
    if WIDE:
        offs = offs.to(tl.int64)
    return offs


@triton.jit
def tile_pointers(base, row, strides, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to rows `row .. row + ROWS - 1`; `strides` are those of the last two dimensions."""
    origin = base + tl.cast(row, tl.int64) * strides[0]
    # [ROWS, COLS]
    return origin + (
        index(ROWS, WIDE)[:, None] * strides[0] + index(COLS, WIDE)[None, :] * strides[1]
    )


@triton.jit
def load_tile(
    base,
    row,
    row_end,
    strides,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows `row .. row + ROWS - 1` of a matrix, 0 outside `[0, row_end)` and past WIDTH."""
    pointers = tile_pointers(base, row, strides, ROWS, COLS, WIDE)
    offs_r = row + tl.arange(0, ROWS)
    offs_c = tl.arange(0, COLS)
    if CHECK_ROWS:
        mask = ((offs_r >= 0) & (offs_r < row_end))[:, None]
        if WIDTH < COLS:
            mask = mask & (offs_c < WIDTH)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WIDTH < COLS:
        tile = tl.load(pointers, mask=(offs_c < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    # [ROWS, COLS]
    return tile


@triton.jit
def store_tile(
    base,
    row,
    row_end,
    strides,
    tile,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write `tile` to rows `row .. row + ROWS - 1`, nothing at or past `row_end` and WIDTH."""
    mask = (row + tl.arange(0, ROWS) < row_end)[:, None] & (tl.arange(0, COLS) < WIDTH)[None, :]
    pointers = tile_pointers(base, row, strides, ROWS, COLS, WIDE)
    tl.store(pointers, cast(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def head_base(ptr, batch, head, strides):
    """Pointer to the matrix of one batch entry and head of a (B, H, rows, columns) tensor."""
    return ptr + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def load_key_range(key_start_ptr, key_end_ptr, batch, S):
    """Keys `[key_lo, key_hi)` that one batch entry may see, inside `[0, S)`."""
    key_lo = 0
    key_hi = S
    if key_start_ptr is not None:
        key_lo = tl.load(key_start_ptr + batch).to(tl.int64)
        key_lo = tl.minimum(tl.maximum(key_lo, 0), S).to(tl.int32)
    if key_end_ptr is not None:
        key_hi = tl.load(key_end_ptr + batch).to(tl.int64)
        key_hi = tl.minimum(tl.maximum(key_hi, 0), S).to(tl.int32)
    return key_lo, key_hi


@triton.jit
def key_blocks(
    row,
    T,
    key_lo,
    key_hi,
    diagonal,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALL_MASKED: tl.constexpr,
):
    """Key blocks that the query rows `row .. row + BLOCK_T - 1` touch.

    Returns `first` (start of the first block), `full_end` (the blocks from first + BLOCK_S up to
    here are visible to every row) and `masked` (how many blocks need a mask: the first, then those
    from full_end on).
    """
    end = tl.minimum(key_hi, tl.minimum(row + BLOCK_T, T) - 1 + diagonal)
    first = key_lo // BLOCK_S * BLOCK_S
    full_end = first + BLOCK_S
    if not ALL_MASKED:
        full_end = tl.maximum(full_end, tl.minimum(key_hi, row + diagonal) // BLOCK_S * BLOCK_S)
    masked = tl.where(end > key_lo, 1 + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK_S), 0)
    return first, full_end, masked


@triton.jit
def visible_keys(rows, keys, T, key_lo, key_hi, diagonal):
    """Which `keys` the `rows` see; both are broadcast, so either orientation works."""
    return (rows < T) & (keys >= key_lo) & (keys < key_hi) & (keys < rows + diagonal)


@triton.jit
def load_mask(
    base,
    row,
    key,
    T,
    S,
    strides,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile of the boolean mask at query `row` and key `key`, False outside the matrix."""
    if TRANSPOSED:
        # [BLOCK_S, BLOCK_T]
        rows = index(BLOCK_T, WIDE)[None, :]
        keys = index(BLOCK_S, WIDE)[:, None]
    else:
        # [BLOCK_T, BLOCK_S]
        rows = index(BLOCK_T, WIDE)[:, None]
        keys = index(BLOCK_S, WIDE)[None, :]
    origin = base + tl.cast(row, tl.int64) * strides[2] + tl.cast(key, tl.int64) * strides[3]
    inside = (row + rows < T) & (key + keys < S)
    return tl.load(origin + (rows * strides[2] + keys * strides[3]), mask=inside, other=0) != 0
