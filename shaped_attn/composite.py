"""``impl="torch"``: shaped attention from torch's own operators, in memory linear in T and S.

The softmax term is ``scaled_dot_product_attention``, the centre a running sum or a mean. All
arithmetic is in float32 (float64 for float64 inputs), so that the difference of the two terms
survives half-precision inputs. No T x S matrix exists in either pass: where a mask depends on the
query, it is built for a few query rows at a time, used, and built again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .arguments import Gain, Gains, accumulation_dtype, is_zero, output_dtype, per_head
from .priors import PriorTable
from .visibility import Visibility

# Query rows per chunk where a mask depends on the query.
CHUNK_ROWS = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gains: Gains,
    visibility: Visibility,
    *,
    prior: PriorTable | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``(out, lse)`` of `shaped_attention` for validated arguments.

    ``prior`` None is the uniform one. ``lse`` is None unless ``return_lse``. Autograd gives the
    gradients of every floating Tensor.
    """
    dtype = accumulation_dtype(q.dtype)
    out_dtype = output_dtype(q, residual)
    queries, keys = q.shape[2], k.shape[2]
    is_causal, q_offset, key_start, key_end, attn_mask = visibility
    if is_causal and q_offset >= keys - 1:
        is_causal = False  # no key is behind any query
    visible = _VisibleKeys(
        queries=queries,
        keys=keys,
        is_causal=is_causal,
        q_offset=q_offset,
        key_start=None if key_start is None else key_start.long(),
        key_end=None if key_end is None else key_end.long(),
        attn_mask=_unexpand(attn_mask),
        prior=prior,
    )
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    own = None if is_zero(gains.identity) else _rows(v, q_offset, queries)
    gains = Gains(*(gain.to(dtype) if isinstance(gain, Tensor) else gain for gain in gains))
    scale = gains.scale
    if isinstance(scale, Tensor) or scale <= 0.0:
        # torch multiplies the -inf of its causal mask by the scale: NaN for 0, +inf for less.
        q, scale = q * per_head(scale, dtype), 1.0

    whole = _Chunk(q, k, v, scale, visible, 0, queries)
    lse = _by_rows(_lse_rows, whole)[0] if return_lse else None
    used = visible.used(q.device)
    if used is not None:
        # Keys that no query sees, such as padding, may hold anything.
        k, v = k.masked_fill(~used, 0), v.masked_fill(~used, 0)
    with_softmax, with_center = not is_zero(gains.softmax), not is_zero(gains.center)
    mean = softmax = center = seen = prior_sum = None
    if q.shape[0] == 0 or queries == 0 or keys == 0:
        # All sums over keys are empty. The product keeps every input in the graph, with gradient 0.
        softmax = center = q @ _to_heads(k, q).transpose(-1, -2) @ _to_heads(v, q)
    else:
        if with_softmax and with_center:
            # A vector added to all rows of v changes neither softmax minus centre nor any gradient.
            # Without the mean of v the two terms, hence their rounding errors, are smallest.
            v, mean = _centered(v, used)
        whole = _Chunk(q, k, v, scale, visible, 0, queries)
        if prior is not None:
            softmax, center, seen, prior_sum = _by_rows(
                _prior_rows, whole, with_softmax, with_center
            )
        elif visible.attn_mask is not None:
            softmax, center, seen = _by_rows(_masked_rows, whole, with_softmax, with_center)
        else:
            if with_softmax and visible.suits_sdpa and _has_fused_sdpa(q):
                softmax = _sdpa(q, k, v, scale, is_causal=visible.is_causal)
            elif with_softmax:
                softmax = _by_rows(_masked_rows, whole, True, False)[0]
            if with_center:
                center, seen = _visible_mean(v, visible)
                center = _to_heads(center, q).expand(-1, -1, queries, -1)

    if mean is not None and prior_sum is not None:
        mean = _to_heads(mean, q) * prior_sum
    out = _mix(q, v.shape[3], gains, own, softmax, center, mean, seen)
    if not with_softmax:
        # A gain of 0.0 skips work; the gradients of q, k and v are still zeros, not missing.
        out = out + (q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum())
    if residual is not None:
        wide = torch.promote_types(dtype, residual.dtype)
        out = out + _times(gains.skip, residual.to(wide))
    return out.to(out_dtype), lse


@dataclass(frozen=True)
class _VisibleKeys:
    """A `Visibility` of known sizes and prior, and the masks that follow from it."""

    queries: int
    keys: int
    is_causal: bool
    q_offset: int
    key_start: Tensor | None
    key_end: Tensor | None
    attn_mask: Tensor | None  # (1 or B, 1 or H, 1 or T, 1 or S)
    prior: PriorTable | None

    @property
    def differs_by_row(self) -> bool:
        return self.is_causal or (self.attn_mask is not None and self.attn_mask.shape[2] != 1)

    @property
    def suits_sdpa(self) -> bool:
        """Whether ``scaled_dot_product_attention`` needs no mask: all keys, or its triangle."""
        masks = (self.key_start, self.key_end, self.attn_mask)
        return all(x is None for x in masks) and (not self.is_causal or self.q_offset == 0)

    def reach(self, stop: int) -> int:
        """Return how many of the first keys the queries before ``stop`` may see, at least 1."""
        if not self.is_causal:
            return self.keys
        return max(1, min(self.keys, self.q_offset + stop))

    def in_range(self, keys: int, device: torch.device) -> Tensor | None:
        """Return which of the first keys are in the key range, (B, 1, 1, S), or None for all."""
        key = torch.arange(keys, device=device)
        inside = None
        if self.key_start is not None:
            inside = key >= self.key_start[:, None, None, None]
        if self.key_end is not None:
            inside = _both(inside, key < self.key_end[:, None, None, None])
        return inside

    def used(self, device: torch.device) -> Tensor | None:
        """Return which keys some query may see, (1 or B, 1, S, 1), or None for all."""
        used = self.in_range(self.keys, device)
        if self.attn_mask is not None:
            used = _both(used, self.attn_mask.any(2, keepdim=True).any(1, keepdim=True))
        if used is None:
            return None
        return used.expand(-1, -1, -1, self.keys).transpose(-1, -2)

    def count(self, device: torch.device) -> Tensor:
        """Return n_i, (1 or B, 1, T, 1), for no ``attn_mask``."""
        end = torch.full((1,), self.keys, device=device)
        if self.key_end is not None:
            end = self.key_end.clamp(max=self.keys)
        end = end[:, None, None, None]
        if self.is_causal:
            behind = self.q_offset + 1 + torch.arange(self.queries, device=device)
            end = torch.minimum(end, behind[:, None])
        if self.key_start is not None:
            end = end - self.key_start.clamp(min=0)[:, None, None, None]
        return end.clamp(min=0)


@dataclass(frozen=True)
class _Chunk:
    """Some query rows, start to stop, and the keys that they may see."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: _VisibleKeys
    start: int
    stop: int

    def rows(self, start: int, stop: int) -> _Chunk:
        """Return a part of a chunk of all rows."""
        keys = self.visible.reach(stop)
        q, k, v = self.q[:, :, start:stop], self.k[:, :, :keys], self.v[:, :, :keys]
        return _Chunk(q, k, v, self.scale, self.visible, start, stop)

    def mask(self) -> Tensor | None:
        """Return which keys are visible, with size 1 where it is constant; None for all."""
        visible, keys, device = self.visible, self.k.shape[2], self.q.device
        mask = visible.in_range(keys, device)
        if visible.is_causal:
            position = visible.q_offset + torch.arange(self.start, self.stop, device=device)
            triangle = torch.arange(keys, device=device) <= position[:, None]
            mask = _both(mask, triangle[None, None])
        if visible.attn_mask is not None:
            part = visible.attn_mask
            part = part if part.shape[2] == 1 else part[:, :, self.start : self.stop]
            part = part if part.shape[3] == 1 else part[..., :keys]
            mask = _both(mask, part).expand(-1, -1, -1, keys)
        return mask

    def log_prior(self) -> Tensor:
        """Return log A0, -inf where a key is not visible."""
        q_offset, key_start = self.visible.q_offset, self.visible.key_start
        logs = self.visible.prior.log_rows(
            self.start, self.stop, self.k.shape[2], q_offset=q_offset, key_start=key_start
        ).to(self.q.dtype)
        mask = self.mask()
        return logs if mask is None else torch.where(mask, logs, -torch.inf)

    def logits(self) -> Tensor:
        """Return scale q . k, (B, H, rows, keys)."""
        return self.scale * (self.q @ _to_heads(self.k, self.q).transpose(-1, -2))

    def times_values(self, weights: Tensor) -> Tensor:
        """Return the product of weights of keys, (B, H, rows, keys), with v."""
        return weights @ _to_heads(self.v, self.q)

    def sdpa(self, mask: Tensor | None) -> Tensor:
        """Return softmax attention under a mask."""
        return _sdpa(self.q, self.k, self.v, self.scale, mask=mask)

    def expand(self, x: Tensor) -> Tensor:
        """Give x (B, H, rows, any) the number of rows, which may be 1 before."""
        return x.expand(-1, -1, self.stop - self.start, -1)


def _by_rows(function: Callable, whole: _Chunk, *flags: bool) -> list[Tensor | None]:
    """Apply ``function`` to chunks of query rows and concatenate each of its results.

    Chunks are recomputed in backward: what they save for it would add up to T x S elements.
    """
    queries, visible = whole.stop, whole.visible
    if queries <= CHUNK_ROWS or (
        function is _masked_rows and not visible.differs_by_row and _has_fused_sdpa(whole.q)
    ):
        return list(function(whole.rows(0, queries), *flags))
    found = []
    for start in range(0, queries, CHUNK_ROWS):
        chunk = whole.rows(start, min(start + CHUNK_ROWS, queries))
        if torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False}
            found.append(checkpoint(function, chunk, *flags, **options))
        else:
            found.append(function(chunk, *flags))
    return [
        None if parts[0] is None else torch.cat(parts, dim=2) for parts in zip(*found, strict=True)
    ]


def _masked_rows(
    chunk: _Chunk, with_softmax: bool, with_center: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return softmax term, centre and whether a key is visible."""
    mask = chunk.mask()
    seen = None if mask is None else mask.any(-1, keepdim=True)
    softmax = center = None
    if with_softmax:
        # A row that sees no key attends to all and is zeroed after it, so that no NaN arises.
        softmax = chunk.sdpa(None if mask is None else mask | ~seen)
        softmax = softmax if seen is None else softmax.masked_fill(~seen, 0)
    if with_center:
        weights = mask.to(chunk.v.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
        center = chunk.expand(chunk.times_values(weights))
    return softmax, center, None if seen is None else chunk.expand(seen)


def _prior_rows(
    chunk: _Chunk, with_softmax: bool, with_center: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return softmax term, already times D, centre, whether a key is visible, and D."""
    logs = chunk.log_prior()
    seen = (logs > -torch.inf).any(-1, keepdim=True)
    weights = logs.exp()
    prior_sum = weights.sum(-1, keepdim=True)
    softmax = center = None
    if with_softmax:
        bias = torch.where(seen, logs, 0)
        if bias.requires_grad:
            # torch's kernels of linear memory give no gradient of a bias.
            softmax = chunk.times_values((chunk.logits() + bias).softmax(-1))
        else:
            softmax = chunk.sdpa(bias)
        softmax = prior_sum * softmax  # 0 where no key is seen
    if with_center:
        center = chunk.times_values(weights)
    shape = (*chunk.q.shape[:3], 1)
    return softmax, center, seen.expand(shape), prior_sum.expand(shape)


def _lse_rows(chunk: _Chunk) -> tuple[Tensor]:
    """Return the log-sum-exp of the visible logits."""
    logits = chunk.logits()
    if chunk.visible.prior is not None:
        logs = chunk.log_prior()
        logits, mask = logits + torch.where(logs > -torch.inf, logs, 0), logs > -torch.inf
    else:
        mask = chunk.mask()
    if mask is None:
        return (logits.logsumexp(-1),)
    seen = mask.any(-1, keepdim=True)
    # As in _masked_rows: logsumexp of a row of -inf has the gradient NaN.
    logits = logits.masked_fill(~(mask | ~seen), -torch.inf)
    return (logits.logsumexp(-1).masked_fill(~seen.squeeze(-1), -torch.inf),)


def _visible_mean(v: Tensor, visible: _VisibleKeys) -> tuple[Tensor, Tensor | None]:
    """Return the mean of v over the visible keys, (B, Hkv, T or 1, Dv), and where there is one.

    Rows of v outside the key range are zero.
    """
    if visible.is_causal:
        sums = v[:, :, : visible.reach(visible.queries)].cumsum(2)  # in float64 on a CPU
        total = _rows(sums, visible.q_offset, visible.queries)
    else:
        total = v.sum(2, keepdim=True)
    count = visible.count(v.device)
    seen = None if visible.suits_sdpa else count > 0
    return total / count.clamp(min=1).to(v.dtype), seen


def _centered(v: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return v minus its mean over the keys in use, and that mean (B, Hkv, 1, Dv) as a constant.

    Rows not in use are zero, before and after.
    """
    if used is None:
        mean = v.detach().mean(2, keepdim=True)
        return v - mean, mean
    mean = v.detach().sum(2, keepdim=True) / used.sum(2, keepdim=True).clamp(min=1)
    return (v - mean).masked_fill(~used, 0), mean


def _mix(
    q: Tensor,
    value_dim: int,
    gains: Gains,
    own: Tensor | None,
    softmax: Tensor | None,
    center: Tensor | None,
    mean: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    """Return the branch: the sum of its terms, each times its gain and the branch gain.

    ``mean`` is what was subtracted from the softmax term and the centre, wherever a key is
    ``seen``.
    """
    terms = []
    if mean is not None and _is_fixed_equal(gains.softmax, gains.center):
        terms.append(_times(gains.branch * gains.softmax, softmax - center))
    else:
        if softmax is not None:
            terms.append(_times(gains.branch * gains.softmax, softmax))
        if center is not None:
            terms.append(_times(-gains.branch * gains.center, center))
        if mean is not None:
            shared = _times(gains.branch * (gains.softmax - gains.center), _to_heads(mean, q))
            terms.append(shared if seen is None else torch.where(seen, shared, 0))
    if own is not None:
        terms.append(_times(gains.branch * gains.identity, _to_heads(own, q)))
    if not terms:
        # The branch gain stays in the graph, with gradient 0.
        return _times(gains.branch, q.new_zeros(*q.shape[:3], value_dim))
    out = terms[0]
    for term in terms[1:]:
        out = out + term
    return out


def _rows(x: Tensor, start: int, count: int) -> Tensor:
    """Return the rows start to start + count of x (B, H, S, Dv); before the first they are 0.

    After the last they repeat it, as the rows of a running sum do.
    """
    rows = x.shape[2]
    if start == 0 and count == rows:
        return x
    stop = start + count
    if start >= 0 and stop <= rows:
        return x[:, :, start:stop]
    position = torch.arange(start, stop, device=x.device)
    picked = x.index_select(2, position.clamp(0, rows - 1))
    return picked if start >= 0 else picked.masked_fill((position < 0)[:, None], 0)


def _to_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the key-value heads of x so that there is one for each query head."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _times(gain: Gain, x: Tensor) -> Tensor:
    if isinstance(gain, Tensor):
        return x * per_head(gain, x.dtype)
    return x if gain == 1.0 else x * gain


def _is_fixed_equal(a: Gain, b: Gain) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def _unexpand(mask: Tensor | None) -> Tensor | None:
    """Undo the expansion of the mask, so that nothing derived from it is larger than it."""
    if mask is None:
        return None
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if size > 1 and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _has_fused_sdpa(q: Tensor) -> bool:
    """Whether torch's attention has a kernel of linear memory for this device and dtype."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype == torch.float32)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Call torch's attention such that it takes its kernel of linear memory."""
    head_dim, value_dim = q.shape[3], v.shape[3]
    on_cpu = q.device.type == "cpu"
    padded = max(head_dim, value_dim)  # the kernel for CPUs wants equal head dimensions
    if not on_cpu:
        # The kernel for float32 on GPUs knows no grouped heads, and wants aligned rows.
        k, v = _to_heads(k, q), _to_heads(v, q)
        padded = (padded + 7) // 8 * 8
    if head_dim < padded:
        q, k = (F.pad(x, (0, padded - head_dim)) for x in (q, k))
    if value_dim < padded:
        v = F.pad(v, (0, padded - value_dim))
    # The function itself, not what `integrations.torch` makes of it for the module that calls this.
    with torch._C.DisableTorchFunction():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=on_cpu
        )
    return out[..., :value_dim] if value_dim < padded else out
