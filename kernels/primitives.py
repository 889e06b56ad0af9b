"""Parts that the kernels share: casts, products, loads and stores. Grammar: README.md."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .configs import block_width

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Places of the gains in the tuple that the kernels take.
IDENTITY = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)
CENTER = tl.constexpr(2)
SKIP = tl.constexpr(3)
BRANCH = tl.constexpr(4)
SCALE = tl.constexpr(5)

# Rows of a head in the numbers per row that the backward's kernels leave for each other: a multiple
# of this, which every BLOCK_T divides, so that nothing need be masked.
ROW_ALIGNMENT = tl.constexpr(128)


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
def load_gain(gains, strides, IS_TENSOR: tl.constexpr, GAIN: tl.constexpr, head):
    """One gain of one head as float32, from a number or a tensor."""
    if IS_TENSOR[GAIN]:
        value = tl.load(gains[GAIN] + head * strides[GAIN]).to(tl.float32)
    else:
        # A Python float is float64 in some launch paths.
        value = tl.full((), gains[GAIN], tl.float32)
    return value


@triton.jit
def softmax_sign(gains, gain_strides, IS_TENSOR: tl.constexpr, head):
    """Sign of `branch_gain * softmax_gain` of one head, 0 where their size cannot be divided by."""
    weight = load_gain(gains, gain_strides, IS_TENSOR, BRANCH, head)
    weight *= load_gain(gains, gain_strides, IS_TENSOR, SOFTMAX, head)
    return tl.where(tl.abs(weight) < 2.0**-100, 0.0, tl.where(weight > 0.0, 1.0, -1.0))


@triton.jit
def index(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """0 .. BLOCK-1, int64 where strides inside a tile need it."""
    offs = tl.arange(0, BLOCK)
    if WIDE:
        offs = offs.to(tl.int64)
    return offs


tile_width = triton.constexpr_function(block_width)

# A matrix, of one batch entry and head of a tensor (B, H, rows, columns), is a tuple: descriptor of
# the tensor or None, its pointer, batch, head, number of rows, its four strides.


@triton.jit
def tile_pointers(matrix, row, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to rows `row .. row + ROWS - 1` of a matrix."""
    base = head_base(matrix[1], matrix[2], matrix[3], matrix[5:])
    origin = base + tl.cast(row, tl.int64) * matrix[7]
    # [ROWS, COLS]
    offsets = index(ROWS, WIDE)[:, None] * matrix[7] + index(COLS, WIDE)[None, :] * matrix[8]
    return origin + offsets


@triton.jit
def load_tile(
    matrix,
    row,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHECK_ROWS: tl.constexpr = True,
):
    """Rows `row .. row + ROWS - 1` of a matrix, 0 outside it and past WIDTH."""
    COLS: tl.constexpr = tile_width(WIDTH)
    if matrix[0] is not None:
        tile = matrix[0].load([matrix[2], matrix[3], row, 0]).reshape(ROWS, COLS)
    else:
        pointers = tile_pointers(matrix, row, ROWS, COLS, WIDE)
        offs_r = row + tl.arange(0, ROWS)
        offs_c = tl.arange(0, COLS)
        if CHECK_ROWS:
            mask = ((offs_r >= 0) & (offs_r < matrix[4]))[:, None]
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
def store_tile(matrix, row, tile, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Write `tile` to the rows from `row` on, nothing past the matrix and WIDTH."""
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    in_rows = row + tl.arange(0, ROWS) < matrix[4]
    mask = in_rows[:, None] & (tl.arange(0, COLS) < WIDTH)[None, :]
    pointers = tile_pointers(matrix, row, ROWS, COLS, WIDE)
    tl.store(pointers, cast(tile, matrix[1].dtype.element_ty), mask=mask)


@triton.jit
def aligned_rows(rows):
    """`rows` rounded up to a multiple of ROW_ALIGNMENT."""
    return tl.cdiv(rows, ROW_ALIGNMENT) * ROW_ALIGNMENT


@triton.jit
def head_base(ptr, batch, head, strides):
    """Pointer to the matrix of one batch entry and head of a (B, H, rows, columns) tensor."""
    return ptr + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
