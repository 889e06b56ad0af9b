"""Fourth backward kernel, where a prior is learned: the gradient of its table."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2_E,
    SCALE,
    aligned_rows,
    cast,
    dot,
    head_base,
    load_gain,
    load_rows,
    softmax_sign,
)
from .visibility import key_blocks, load_bounds, visible_keys


@triton.jit(do_not_specialize=["H", "T", "S", "q_offset", "diagonal"])
def attention_bwd_dprior_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    d_out_descriptor,
    row_terms_ptr,
    prior_dots_ptr,
    visibility,
    prior,
    d_table_ptr,
    gains,
    gain_strides,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    H,
    T,
    S,
    q_offset,
    diagonal,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    TIMES_PRIOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Last rows first: under a causal mask they take longest.
    row = (tiles - 1 - pid % tiles) * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP
    heads = tl.cast(tl.num_programs(0) // tiles, tl.int64)
    plane = heads * aligned_rows(T)
    first_row = tl.cast(pid_bh, tl.int64) * T

    q_base = head_base(q_ptr, batch, head, q_strides)
    k_base = head_base(k_ptr, batch, kv_head, k_strides)
    v_base = head_base(v_ptr, batch, kv_head, v_strides)
    d_out_base = head_base(d_out_ptr, batch, head, d_out_strides)
    q_rows = (q_descriptor, q_base, batch, head, T, q_strides[2], q_strides[3])
    k_rows = (k_descriptor, k_base, batch, kv_head, S, k_strides[2], k_strides[3])
    v_rows = (v_descriptor, v_base, batch, kv_head, S, v_strides[2], v_strides[3])
    d_out_rows = (d_out_descriptor, d_out_base, batch, head, T, d_out_strides[2], d_out_strides[3])
    scale_log2 = LOG2_E * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
    sign = softmax_sign(gains, gain_strides, GAIN_IS_TENSOR, head)

    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    row_terms = row_terms_ptr + tl.cast(pid_bh, tl.int64) * aligned_rows(T) + offs_t
    exponent = tl.load(row_terms)
    delta = tl.load(row_terms + plane)
    center_weight = tl.load(row_terms + 2 * plane)
    inside = offs_t < T
    d_prior_sum = tl.load(prior_dots_ptr + first_row + offs_t, mask=inside, other=0.0)
    sums = (tl.zeros((BLOCK_T,), tl.float32),) * ENTRIES
    # [BLOCK_T, BLOCK_D], [BLOCK_T, BLOCK_DV]
    q = load_rows(q_rows, row, D, BLOCK_T, BLOCK_D, True, WIDE)
    d_out = load_rows(d_out_rows, row, DV, BLOCK_T, BLOCK_DV, True, WIDE)
    if d_out.dtype != q.dtype:
        d_out = cast(d_out.to(tl.float32), q.dtype)
    # [BLOCK_T, 1]
    positions = (q_offset + offs_t)[:, None]

    bounds = load_bounds(visibility, batch, T, S, diagonal)
    key_lo = bounds[2]
    first, full_end, masked = key_blocks(row, bounds, BLOCK_T, BLOCK_S, True)
    for block in tl.range(0, masked):
        key = tl.where(block == 0, first, full_end + (block - 1) * BLOCK_S)
        # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV], [1, BLOCK_S]
        k = load_rows(k_rows, key, D, BLOCK_S, BLOCK_D, True, WIDE)
        v = load_rows(v_rows, key, DV, BLOCK_S, BLOCK_DV, True, WIDE)
        keys = (key + tl.arange(0, BLOCK_S))[None, :]
        # [BLOCK_T, BLOCK_S]
        zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        visible = visible_keys(
            visibility, bounds, batch, head, row, key, BLOCK_T, BLOCK_S, False, WIDE
        )
        scores = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
        scores = ADD_LOG2_PRIOR(scores, positions, keys, key_lo, head, prior)
        weights = tl.where(visible, tl.math.exp2(scores - exponent[:, None]), 0.0)
        at_zero = TIMES_PRIOR(tl.where(visible, 1.0, 0.0), positions, keys, key_lo, head, prior)
        d_weights = dot(d_out, tl.trans(v), zeros, DOT_PRECISION)
        # Of the natural log of A0: through the softmax, through D and through the centre.
        d_logs = weights * (sign * d_weights - delta[:, None])
        d_logs += at_zero * (d_prior_sum[:, None] - center_weight[:, None] * d_weights)
        sums = ACCUMULATE(sums, d_logs, positions, keys, key_lo)

    # (ENTRIES, B, H, T), summed over rows and batch afterwards in a fixed order.
    out = d_table_ptr + first_row + offs_t
    for entry in tl.static_range(ENTRIES):
        tl.store(out + entry * heads * T, sums[entry], mask=inside)
