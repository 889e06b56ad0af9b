"""Third backward kernel: gradient of q and of the scale, one query tile per program."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2_E,
    cast,
    dot,
    head_base,
    key_blocks,
    load_gain,
    load_key_range,
    load_mask,
    load_tile,
    store_tile,
    visible_keys,
)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    d_out,
    row_max,
    softmax_weight,
    delta,
    k_base,
    v_base,
    mask_base,
    prior,
    row,
    key,
    T,
    S,
    key_lo,
    key_hi,
    q_offset,
    diagonal,
    head,
    scale_log2,
    k_strides,
    v_strides,
    mask_strides,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """Add one block of keys to the gradient of one query tile, before its factor `scale`."""
    # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV]
    k = load_tile(k_base, key, S, k_strides[2:], D, BLOCK_S, BLOCK_D, MASKED, WIDE)
    v = load_tile(v_base, key, S, v_strides[2:], DV, BLOCK_S, BLOCK_DV, MASKED, WIDE)
    # [BLOCK_T, 1], [1, BLOCK_S]
    rows = (row + tl.arange(0, BLOCK_T))[:, None]
    keys = (key + tl.arange(0, BLOCK_S))[None, :]
    # [BLOCK_T, BLOCK_S]
    zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    scores = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
    scores = ADD_LOG2_PRIOR(scores, q_offset + rows, keys, key_lo, head, prior)
    weights = tl.math.exp2(scores - row_max[:, None])
    if MASKED:
        visible = visible_keys(rows, keys, T, key_lo, key_hi, diagonal)
        if mask_base is not None:
            visible = visible & load_mask(
                mask_base, row, key, T, S, mask_strides, BLOCK_T, BLOCK_S, False, WIDE
            )
        weights = tl.where(visible, weights, 0.0)
    d_weights = dot(d_out, tl.trans(v), zeros, DOT_PRECISION)
    d_scores = weights * (softmax_weight[:, None] * d_weights - delta[:, None])
    return dot(cast(d_scores, k.dtype), k, dq, DOT_PRECISION)


@triton.jit(do_not_specialize=["H", "GROUP", "T", "S", "q_offset", "diagonal"])
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    row_terms_ptr,
    mask_ptr,
    key_start_ptr,
    key_end_ptr,
    prior,
    dq_ptr,
    scale_dots_ptr,
    gains,
    gain_strides,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    mask_strides,
    H,
    GROUP,
    T,
    S,
    q_offset,
    diagonal,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    WEIGHED: tl.constexpr = (mask_ptr is not None) or (not UNIFORM_PRIOR)
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Last rows first: under a causal mask they take longest.
    pid_t = tiles - 1 - pid % tiles
    row = pid_t * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP
    plane = tl.cast(tl.num_programs(0) // tiles, tl.int64) * T
    first_row = tl.cast(pid_bh, tl.int64) * T

    q_base = head_base(q_ptr, batch, head, q_strides)
    k_base = head_base(k_ptr, batch, kv_head, k_strides)
    v_base = head_base(v_ptr, batch, kv_head, v_strides)
    d_out_base = head_base(d_out_ptr, batch, head, d_out_strides)
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = head_base(mask_ptr, batch, head, mask_strides)
    scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, 5, head)

    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    inside = offs_t < T
    row_terms = row_terms_ptr + first_row + offs_t
    row_max = tl.load(row_terms, mask=inside, other=float("inf"))
    softmax_weight = tl.load(row_terms + plane, mask=inside, other=0.0)
    delta = tl.load(row_terms + 2 * plane, mask=inside, other=0.0)
    # [BLOCK_T, BLOCK_D], [BLOCK_T, BLOCK_DV]
    q = load_tile(q_base, row, T, q_strides[2:], D, BLOCK_T, BLOCK_D, True, WIDE)
    d_out = load_tile(d_out_base, row, T, d_out_strides[2:], DV, BLOCK_T, BLOCK_DV, True, WIDE)
    if d_out.dtype != q.dtype:
        d_out = cast(d_out.to(tl.float32), q.dtype)
    dq = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)

    key_lo, key_hi = load_key_range(key_start_ptr, key_end_ptr, batch, S)
    first, full_end, masked = key_blocks(
        row, T, key_lo, key_hi, diagonal, BLOCK_T, BLOCK_S, WEIGHED
    )
    for block in tl.range(0, masked):
        key = tl.where(block == 0, first, full_end + (block - 1) * BLOCK_S)
        dq = _accumulate_dq(
            dq,
            q,
            d_out,
            row_max,
            softmax_weight,
            delta,
            k_base,
            v_base,
            mask_base,
            prior,
            row,
            key,
            T,
            S,
            key_lo,
            key_hi,
            q_offset,
            diagonal,
            head,
            scale * LOG2_E,
            k_strides,
            v_strides,
            mask_strides,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_T,
            BLOCK_S,
            True,
            ADD_LOG2_PRIOR,
            WIDE,
            DOT_PRECISION,
        )
    if not WEIGHED:
        for key in tl.range(first + BLOCK_S, full_end, BLOCK_S):
            dq = _accumulate_dq(
                dq,
                q,
                d_out,
                row_max,
                softmax_weight,
                delta,
                k_base,
                v_base,
                mask_base,
                prior,
                row,
                key,
                T,
                S,
                key_lo,
                key_hi,
                q_offset,
                diagonal,
                head,
                scale * LOG2_E,
                k_strides,
                v_strides,
                mask_strides,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_T,
                BLOCK_S,
                False,
                ADD_LOG2_PRIOR,
                WIDE,
                DOT_PRECISION,
            )

    if scale_dots_ptr is not None:
        # d loss / d scale = sum_i q_i . (dS K)_i; one slot per head and tile.
        dots = tl.sum(dq * q.to(tl.float32))
        tl.store(scale_dots_ptr + tl.cast(pid_bh, tl.int64) * tiles + pid_t, dots)
    store_tile(dq_ptr + first_row * D, row, T, (D, 1), scale * dq, D, BLOCK_T, BLOCK_D, WIDE)
