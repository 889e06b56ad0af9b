"""The specification of shaped attention: eager torch that builds the whole T x S matrices.

It follows the formula term by term, so that it can be checked by eye and serve as the oracle of
every test: differentiable by autograd, and float64 throughout for float64 inputs. It is slow, and
its memory grows with T x S; no other implementation imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Gains, accumulation_dtype, is_zero, output_dtype, per_head
from .priors import PriorTable
from .visibility import Visibility


def visible_keys(q: Tensor, k: Tensor, visibility: Visibility) -> Tensor:
    """Return the bool matrix (B, H, T, S) of the keys that each query sees."""
    is_causal, q_offset, key_start, key_end, attn_mask = visibility
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    key = torch.arange(keys, device=q.device)
    position = q_offset + torch.arange(queries, device=q.device)
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible & (key <= position[:, None])
    if key_start is not None:
        visible = visible & (key >= key_start[:, None, None, None])
    if key_end is not None:
        visible = visible & (key < key_end[:, None, None, None])
    if attn_mask is not None:
        visible = visible & attn_mask
    return visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gains: Gains,
    visibility: Visibility,
    *,
    prior: PriorTable | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute shaped attention with the matrices P (softmax) and A0 (prior) written out.

    The formula:

        out_i = skip * residual_i
              + branch * ( identity * v_p(i)
                         + softmax  * D_i sum_j P_ij v_j
                         - center   * sum_j A0_ij v_j )

        P_i. = softmax_j(scale * q_i . k_j + log A0_ij),     D_i = sum_j A0_ij

    Args:
        q, k, v, residual: as in `shaped_attention`.
        gains: the weights and the scale.
        visibility: the keys that each query sees, validated.
        prior: with log A0; -inf hides a key. None: A0_ij = 1 / n_i.
        compute_dtype: of all arithmetic. None: float32, or float64 for float64 inputs. The dtype
            of q gives what eager torch in that dtype computes.

    Returns:
        ``out`` and ``lse`` as `shaped_attention` returns them.
    """
    lse_dtype = accumulation_dtype(q.dtype)
    dtype = lse_dtype if compute_dtype is None else compute_dtype
    out_dtype = output_dtype(q, residual)
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1]
    visible = visible_keys(q, k, visibility)
    q = q.to(dtype)
    k = k.to(dtype).repeat_interleave(group, dim=1)
    v = v.to(dtype).repeat_interleave(group, dim=1)

    logits = per_head(gains.scale, dtype) * (q @ k.transpose(-1, -2))
    if prior is None:
        count = visible.sum(-1, keepdim=True)
        weights = visible.to(dtype) / count.clamp(min=1).to(dtype)
        weight_sum = (count > 0).to(dtype)
    else:
        q_offset, key_start = visibility.q_offset, visibility.key_start
        log_prior = prior.log_rows(0, queries, keys, q_offset=q_offset, key_start=key_start)
        log_prior = log_prior.to(dtype)
        visible = visible & (log_prior > -torch.inf)
        log_prior = torch.where(visible, log_prior, 0)
        weights = torch.where(visible, log_prior.exp(), 0)
        weight_sum = weights.sum(-1, keepdim=True)
        logits = logits + log_prior

    # A row without a visible key goes through softmax with zero logits and is zeroed after it: a
    # row of -inf would give NaN, in the gradients too.
    empty = ~visible.any(-1, keepdim=True)
    logits = torch.where(visible, logits, -torch.inf).masked_fill(empty, 0)
    probabilities = torch.where(visible, logits.softmax(-1), 0)
    lse = logits.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf).to(lse_dtype)

    branch = per_head(gains.softmax, dtype) * (weight_sum * (probabilities @ v))
    branch = branch - per_head(gains.center, dtype) * (weights @ v)
    if not is_zero(gains.identity):
        own = v[:, :, visibility.q_offset : visibility.q_offset + queries]
        branch = branch + per_head(gains.identity, dtype) * own
    out = per_head(gains.branch, dtype) * branch
    if residual is not None:
        mixed = torch.promote_types(dtype, out_dtype) if compute_dtype is None else dtype
        out = out + per_head(gains.skip, mixed) * residual.to(mixed)
    return out.to(out_dtype), lse
