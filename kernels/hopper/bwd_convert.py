"""The gradient of q from the float32 sums of the fused kernel, in the order in which it adds."""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives import SCALE, cast, head_base, load_gain


@triton.jit(do_not_specialize=["H", "T"])
def convert_dq_kernel(
    q_ptr,
    dq_sums_ptr,
    dq_ptr,
    scale_dots_ptr,
    gains,
    gain_strides,
    q_strides,
    H,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
):
    """One half tile, [64, 64]: half of the columns, or of the queries where BLOCK_T is 128."""
    half_tiles = 2 * tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    half = pid % 2
    tile = pid % half_tiles // 2
    pid_bh = pid // half_tiles
    batch = pid_bh // H
    head = pid_bh % H
    # Eight columns, sixteen rows, row, pair of columns, eight rows, column.
    sums = tl.load(dq_sums_ptr + pid * 4096 + tl.arange(0, 4096))
    sums = tl.reshape(sums, (8, 4, 8, 4, 2, 2))
    # [64, 64]
    sums = tl.reshape(tl.permute(sums, (1, 4, 2, 0, 3, 5)), (64, 64))
    rows = tile * BLOCK_T + tl.arange(0, 64)[:, None]
    columns = tl.arange(0, 64)[None, :]
    if BLOCK_T == 64:
        columns += half.to(tl.int32) * 64
    else:
        rows += half * 64
    inside = (rows < T) & (columns < D)
    if scale_dots_ptr is not None:
        # As in dq: d loss / d scale = sum_i q_i . (dS K)_i; one slot per half tile.
        q_rows = head_base(q_ptr, batch, head, q_strides) + rows * q_strides[2]
        q = tl.load(q_rows + columns * q_strides[3], mask=inside, other=0.0)
        tl.store(scale_dots_ptr + pid, tl.sum(q.to(tl.float32) * sums))
    scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
    # Gradients are contiguous (B, H, T, D).
    offsets = (pid_bh * T + rows) * D + columns
    tl.store(dq_ptr + offsets, cast(scale * sums, dq_ptr.dtype.element_ty), mask=inside)
