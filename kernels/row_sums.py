"""Rounding of a tile of weights to the dtype of a product, and sums of the rounded weights by row.

A rounding error that all keys of a row share then cancels, and a row that sees one key returns its
value. How they are summed, ROW_SUMS, is a matter of speed: "product" multiplies by ones on the
tensor cores; "packed" converts two weights at a time and takes both rounded halves from the result
(NVIDIA, 16 bits); "cast" leaves the choice to the compiler, for all else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import cast, dot

# As narrow as a product may be.
_COLUMNS = tl.constexpr(16)
_PACK_BFLOAT16 = tl.constexpr(
    "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;"
)
_PACK_FLOAT16 = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.f16x2.f32 $0, $4, $3; mov.b32 {low, high}, $0;"
    " cvt.f32.f16 $1, low; cvt.f32.f16 $2, high; }"
)
_CONSTRAINTS = tl.constexpr("=r,=r,=r,r,r")


@triton.jit
def start_row_sums(ROWS: tl.constexpr, ROW_SUMS: tl.constexpr):
    """Sums of no weights."""
    if ROW_SUMS == "product":
        sums = tl.zeros((ROWS, _COLUMNS), tl.float32)
    else:
        sums = tl.zeros((ROWS,), tl.float32)
    return sums


@triton.jit
def rescale_row_sums(sums, factor, ROW_SUMS: tl.constexpr):
    """Multiply the sum of each row by its factor."""
    return sums * (factor[:, None] if ROW_SUMS == "product" else factor)


@triton.jit
def round_and_sum(weights, sums, dtype: tl.constexpr, ROW_SUMS: tl.constexpr):
    """`weights` rounded to `dtype`, and `sums` with the rounded weights of each row added."""
    if ROW_SUMS == "packed":
        if dtype == tl.bfloat16:
            rounded, again = tl.inline_asm_elementwise(
                _PACK_BFLOAT16, _CONSTRAINTS, [weights], (tl.bfloat16, tl.float32), True, 2
            )
        else:
            rounded, again = tl.inline_asm_elementwise(
                _PACK_FLOAT16, _CONSTRAINTS, [weights], (tl.float16, tl.float32), True, 2
            )
        sums += tl.sum(again, 1)
    else:
        rounded = cast(weights, dtype)
        if ROW_SUMS == "product":
            ones = tl.full((weights.shape[1], _COLUMNS), 1.0, dtype)
            sums = dot(rounded, ones, sums, "ieee")
        else:
            sums += tl.sum(rounded.to(tl.float32), 1)
    return rounded, sums


@triton.jit
def finish_row_sums(sums, ROW_SUMS: tl.constexpr):
    """One number per row."""
    if ROW_SUMS == "product":
        sums = tl.sum(sums, 1) / _COLUMNS  # a power of two of equal numbers: exact
    return sums
