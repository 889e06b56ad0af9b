"""Forward: the whole formula in one launch (after the sums of v, if it is centred)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import launch
from .primitives import (
    BRANCH,
    CENTER,
    IDENTITY,
    LN_2,
    LOG2_E,
    SCALE,
    SKIP,
    SOFTMAX,
    cast,
    dot,
    index,
    load_gain,
    load_tile,
    store_tile,
    tile_width,
)
from .row_sums import finish_row_sums, rescale_row_sums, round_and_sum, start_row_sums
from .value_sums import ValueSums, lead_of, visible_value_sum
from .visibility import (
    MASK,
    key_blocks,
    load_bounds,
    visibility_arguments,
    visible_count,
    visible_keys,
)

if TYPE_CHECKING:
    from .attention import Call, ForwardResult

# Keys, in blocks, from which the form with a fixed maximum is worth a launch of its own: estimated.
_FEWEST_BLOCKS = 4
# Sums of weights that a fixed maximum may lead to; times any sensible v they are far from overflow.
_MOST_WEIGHT = tl.constexpr(2.0**32)


@triton.jit
def _raise_maximum(row_max, scores, CENTERED: tl.constexpr):
    """Raise the maximum of each row by an integer, to that of `scores` or above.

    The first is exact, so that a single weight is 1, which no dtype rounds, or an integer if
    centred. Returns weights, the new maximum and the factor, a power of two, for what came before.
    """
    block_max = tl.max(scores, 1)
    starts = row_max == -float("inf")
    rise = tl.where(starts, float("inf"), tl.math.ceil(tl.maximum(block_max - row_max, 0.0)))
    start = tl.math.ceil(block_max) if CENTERED else block_max
    row_max = tl.where(starts, start, row_max + rise)
    return _weights(scores, row_max), row_max, tl.math.exp2(-rise)


@triton.jit
def _weights(scores, row_max):
    """Weights relative to the row maximum, which is -inf for a row that has seen no key."""
    pivot = tl.where(row_max == -float("inf"), 0.0, row_max)
    return tl.math.exp2(scores - pivot[:, None])


@triton.jit(do_not_specialize=["H", "T", "S", "q_offset", "diagonal"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    residual_ptr,
    out_ptr,
    lse_ptr,
    excess_ptr,
    center_ptr,
    row_stats_ptr,
    value_sums_ptr,
    overflow_ptr,
    visibility,
    prior,
    gains,
    gain_strides,
    strides,
    H,
    T,
    S,
    q_offset,
    diagonal,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    CENTERED: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    TIMES_PRIOR: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    # Keys per row are known in closed form unless a mask or a prior weighs them one by one.
    WEIGHED: tl.constexpr = (visibility[MASK] is not None) or (not UNIFORM_PRIOR)
    # A rounded diagonal near 1 would drown the rest of its row.
    IN_TWO: tl.constexpr = (CENTERED and (not UNIFORM_PRIOR)) and (
        v_ptr.dtype.element_ty != tl.float32
    )
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    if overflow_ptr is not None:
        if not BOUNDED:
            if tl.load(overflow_ptr + pid) == 0:
                return
    # Last rows first: under a causal mask they take longest.
    row = (tiles - 1 - pid % tiles) * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP

    q_rows = (q_descriptor, q_ptr, batch, head, T) + strides[0:4]
    k_rows = (k_descriptor, k_ptr, batch, kv_head, S) + strides[4:8]
    v_rows = (v_descriptor, v_ptr, batch, kv_head, S) + strides[8:12]
    scale_log2 = LOG2_E * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)

    bounds = load_bounds(visibility, batch, T, S, diagonal)
    key_lo = bounds[2]
    # [BLOCK_T, 1]
    tile_rows = index(BLOCK_T, WIDE)[:, None]
    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    positions = (q_offset + offs_t)[:, None]
    row_max = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    sums = start_row_sums(BLOCK_T, ROW_SUMS)
    reference = tl.zeros((BLOCK_T,), tl.float32)
    weight_sum = tl.zeros((BLOCK_T,), tl.float32)
    # u of (4), relative to the row maximum; with a prior log2 u, and the sum of u A0.
    reference_log2 = tl.zeros((BLOCK_T,), tl.float32)
    BLOCK_DV: tl.constexpr = tile_width(DV)
    # [BLOCK_T, BLOCK_DV]
    acc = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    value_sum = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    # [BLOCK_T, BLOCK_D]
    q = load_tile(q_rows, row, D, BLOCK_T, WIDE)

    first, full_end, masked = key_blocks(row, bounds, BLOCK_T, BLOCK_S, WEIGHED)
    # The first block and those at the edges of the visible range; the first sets the reference.
    for block in tl.range(0, masked, num_stages=MASKED_STAGES):
        key = tl.where(block == 0, first, full_end + (block - 1) * BLOCK_S)
        # [1, BLOCK_S]
        tile_keys = index(BLOCK_S, WIDE)[None, :]
        keys = (key + tl.arange(0, BLOCK_S))[None, :]
        # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV]
        k = load_tile(k_rows, key, D, BLOCK_S, WIDE)
        v = load_tile(v_rows, key, DV, BLOCK_S, WIDE)
        # [BLOCK_T, BLOCK_S]
        zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        logits = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
        scores = ADD_LOG2_PRIOR(logits, positions, keys, key_lo, head, prior)
        visible = visible_keys(visibility, bounds, batch, head, row, key, tile_rows, tile_keys)
        if CENTERED:
            logit_sum = tl.sum(tl.where(visible, logits, 0.0), 1)
        scores = tl.where(visible, scores, -float("inf"))
        weights, row_max, factor = _raise_maximum(row_max, scores, CENTERED)
        acc *= factor[:, None]
        sums = rescale_row_sums(sums, factor, ROW_SUMS)
        reference *= factor
        if WEIGHED:
            ones = tl.where(visible, 1.0, 0.0)
            count = tl.sum(ones, 1)
            at_zero = TIMES_PRIOR(ones, positions, keys, key_lo, head, prior)
            tile_sum = count if UNIFORM_PRIOR else tl.sum(at_zero, 1)
            if CENTERED:
                rounded = cast(at_zero, v.dtype)
                value_sum = dot(rounded, v, value_sum, DOT_PRECISION)
                if IN_TWO:
                    rest = cast(at_zero - rounded.to(tl.float32), v.dtype)
                    value_sum = dot(rest, v, value_sum, DOT_PRECISION)
        else:
            count = visible_count(offs_t, key, bounds, BLOCK_S)
            tile_sum = count
        if CENTERED:
            # The geometric mean weight of a row's first visible tile, exact in the dtype of v.
            starts = (weight_sum == 0.0) & (count > 0.0)
            mean = logit_sum / tl.where(starts, count, 1.0)
            if UNIFORM_PRIOR:
                typical = cast(tl.math.exp2(mean - row_max), v.dtype).to(tl.float32)
                reference = tl.where(starts, typical, reference)
                weights -= tl.where(visible, reference[:, None], 0.0)
            else:
                # In logs: far from the diagonal A0 underflows, and u alone overflows.
                reference_log2 = tl.where(starts, mean, reference_log2)
                at_reference = ADD_LOG2_PRIOR(
                    reference_log2[:, None] + zeros, positions, keys, key_lo, head, prior
                )
                # A finite maximum: where A0 is 0 so far, both are -inf.
                at_reference = tl.math.exp2(at_reference - tl.maximum(row_max, -1e30)[:, None])
                at_reference = tl.where(visible, at_reference, 0.0)
                reference += tl.sum(at_reference, 1)
                weights -= at_reference
        weight_sum += tile_sum
        rounded, sums = round_and_sum(weights, sums, v.dtype, ROW_SUMS)
        acc = dot(rounded, v, acc, DOT_PRECISION)
        if IN_TWO:
            rest = weights - rounded.to(tl.float32)
            rest, sums = round_and_sum(rest, sums, v.dtype, ROW_SUMS)
            acc = dot(rest, v, acc, DOT_PRECISION)

    if not WEIGHED:
        # Blocks that every row sees whole.
        for key in tl.range(first + BLOCK_S, full_end, BLOCK_S):
            k = load_tile(k_rows, key, D, BLOCK_S, WIDE, CHECK_ROWS=False)
            v = load_tile(v_rows, key, DV, BLOCK_S, WIDE, CHECK_ROWS=False)
            # [BLOCK_T, BLOCK_S]
            zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
            scores = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
            if BOUNDED:
                weights = _weights(scores, row_max)
            else:
                weights, row_max, factor = _raise_maximum(row_max, scores, CENTERED)
                acc *= factor[:, None]
                sums = rescale_row_sums(sums, factor, ROW_SUMS)
                reference *= factor
            if CENTERED:
                weights -= reference[:, None]
            rounded, sums = round_and_sum(weights, sums, v.dtype, ROW_SUMS)
            acc = dot(rounded, v, acc, DOT_PRECISION)
        T, S, key_lo, key_hi, diagonal = bounds
        row_end = tl.minimum(key_hi, offs_t + diagonal)
        weight_sum = tl.maximum(row_end - key_lo, 0).to(tl.float32)

    # [BLOCK_T]
    excess_sum = finish_row_sums(sums, ROW_SUMS)
    if BOUNDED:
        # NaN is not below the limit either; rows past T hold anything.
        fits = (excess_sum < _MOST_WEIGHT) | (offs_t >= bounds[0])
        tl.store(overflow_ptr + pid, 1 - tl.min(fits.to(tl.int32), 0))
    normalizer = excess_sum + (weight_sum * reference if UNIFORM_PRIOR else reference)
    has_keys = row_max > -float("inf")
    inverse_normalizer = tl.where(has_keys, 1.0 / tl.where(has_keys, normalizer, 1.0), 0.0)
    inverse_weight_sum = tl.where(weight_sum > 0.0, 1.0 / tl.maximum(weight_sum, 1e-30), 0.0)
    # D of the formula: 1 for a prior whose rows sum to 1.
    prior_sum = 1.0 if UNIFORM_PRIOR else weight_sum[:, None]
    if CENTERED:
        if not WEIGHED:
            entries = tl.cdiv(S + lead_of(diagonal, SUM_BLOCK), SUM_BLOCK) + 1
            sums_ptr = value_sums_ptr + tl.cast(pid_bh // GROUP, tl.int64) * entries * DV
            # A descriptor is for tiles of BLOCK_S rows.
            edge_rows = v_rows if SUM_BLOCK == BLOCK_S else (None,) + v_rows[1:]
            value_sum = visible_value_sum(
                edge_rows, sums_ptr, row, bounds, DV, BLOCK_T, SUM_BLOCK, WIDE, DOT_PRECISION
            )
        center = value_sum
        excess = acc - (excess_sum * inverse_weight_sum)[:, None] * value_sum
        excess *= inverse_normalizer[:, None]
        if UNIFORM_PRIOR:
            center *= inverse_weight_sum[:, None]
    else:
        excess = acc * inverse_normalizer[:, None]

    # Saved tensors are contiguous (B, H, T, ...). They go first: their registers are then free.
    first_row = tl.cast(pid_bh, tl.int64) * T
    inside = offs_t < T
    log2_normalizer = row_max + tl.math.log2(tl.where(has_keys, normalizer, 1.0))
    tl.store(lse_ptr + first_row + offs_t, log2_normalizer * LN_2, mask=inside)
    if excess_ptr is not None:
        excess_rows = (None, excess_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
        store_tile(excess_rows, row, excess, DV, WIDE)
        if center_ptr is not None:
            center_rows = (None, center_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
            store_tile(center_rows, row, center, DV, WIDE)
        plane = tl.cast(tl.num_programs(0) // tiles, tl.int64) * T
        stats = row_stats_ptr + first_row + offs_t
        tl.store(stats, log2_normalizer, mask=inside)
        tl.store(stats + plane, weight_sum, mask=inside)

    # Loaded this late, the gains cost no registers above.
    branch_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, BRANCH, head)
    softmax_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SOFTMAX, head)
    out = softmax_gain * prior_sum * excess
    if CENTERED:
        center_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, CENTER, head)
        out += (softmax_gain - center_gain) * center
    if HAS_IDENTITY:
        identity_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, IDENTITY, head)
        own_rows = (None,) + v_rows[1:]
        own = load_tile(own_rows, q_offset + row, DV, BLOCK_T, WIDE)
        out += identity_gain * own.to(tl.float32)
    if residual_ptr is not None:
        skip_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SKIP, head)
        residual_rows = (None, residual_ptr, batch, head, T) + strides[12:16]
        residual = load_tile(residual_rows, row, DV, BLOCK_T, WIDE)
        out += skip_gain * residual.to(tl.float32)
    out_rows = (None, out_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
    store_tile(out_rows, row, out, DV, WIDE)


class ForwardPlan:
    """The launches of a forward, for one signature of a call; calling it launches them.

    value_sums is None where it does not need the sums, bounded where it has no form of its own.
    """

    def __init__(self, call: Call, saves: bool) -> None:
        q, k, v, residual = call[:4]
        B, H, T, _ = q.shape
        config = call.config("forward")
        programs = triton.cdiv(T, config.block_t) * B * H

        def forward(is_bounded: bool) -> launch.Launch:
            return launch.Launch.for_call(
                call, attention_fwd_kernel, programs, config, q, k, v, residual, BOUNDED=is_bounded
            )

        is_weighed = call.weighed_by is not None
        has_bounded = not is_weighed and _FEWEST_BLOCKS * config.block_s <= k.shape[2]
        has_sums = call.is_centered and not is_weighed
        tiles = ((q, config.block_t), (k, config.block_s), (v, config.block_s))
        self.value_sums = ValueSums(call, config) if has_sums else None
        self.descriptors = launch.Descriptors(config, launch.architecture(q), *tiles)
        self.bounded = forward(True) if has_bounded else None
        self.running = forward(False)

    def __call__(self, call: Call, result: ForwardResult) -> None:
        q, k, v, residual, gains, visibility, _, prior_parameters = call
        value_sums = None if self.value_sums is None else self.value_sums(call)
        arguments = (q, k, v, *self.descriptors(q, k, v), residual, *result, value_sums)
        varying = (visibility_arguments(visibility), prior_parameters, tuple(gains))
        overflow = None
        if self.bounded is not None:
            overflow = torch.empty(self.bounded.grid[0], dtype=torch.int32, device=q.device)
            self.bounded(*arguments, overflow, *varying)
        self.running(*arguments, overflow, *varying)
