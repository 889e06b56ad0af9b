"""The two functions that `transformers` calls: attention, and the mask that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ...arguments import Gains, is_zero
from ...checks import fail
from ...functional import is_autocast, shaped_attention
from ...ops import attention_from_gains
from ...visibility import Visibility

ATTENTION = "shaped_attn"
"""Name of the attention in `transformers`, and of the attribute of a config with the choice."""

GAINS = "shaped_gains"
"""Name of the submodule with the gains that each attention module gets."""

# What a caller of the attention function may ask for and this one cannot do.
REFUSED = {
    "softcap": "caps its logits",
    "s_aux": "has attention sinks",
    "sinks": "has attention sinks",
    "position_bias": "adds a position bias to its logits",
    "alibi": "adds a position bias to its logits",
    "head_mask": "masks heads",
    "indices": "picks keys by a sparse index",
    "block_indices": "picks keys by a sparse index",
}


def shaped_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Return which keys each query sees, for `shaped_attention_forward`; registered as its mask.

    One of four forms, all but the first of rank 4, which models pass on as they are:

    None
        every key, or the triangle of as many keys as queries, as for "sdpa".
    int64 (B, 1 to 3, 1, keys)
        position of query 0; or first and end of a range of keys; or all three. Only the first
        ``keys`` keys are in use. The attention is causal if the position is there, and then the
        last query sits at the last key. A view that repeats one number along the keys, so that no
        T x S matrix exists.
    bool (B, 1, T, S)
        True where a query sees a key.
    int8 (B, 1, T, S)
        the same as 1, plus 2 at the query's own position: where there are more keys than queries,
        as with a cache, this tells where a query sits.

    The arguments are those of `transformers.masking_utils.sdpa_mask`.
    """
    tracing = is_tracing(attention_mask) or is_tracing(q_offset)
    if not tracing:
        is_causal = allow_is_causal_skip or mask_function is causal_mask_function
        _check_cache(q_length, kv_length, q_offset, kv_offset, is_causal)
    is_plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and (
        local_size is None or kv_length < local_size
    )
    if is_plain and not tracing:
        is_causal = not allow_is_bidirectional_skip
        keys = int(q_offset) - kv_offset + q_length if is_causal else kv_length
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            padding = padding[:, kv_offset : kv_offset + keys]
        if padding is None or bool(padding.all()):
            if not is_causal or q_length == keys == kv_length:
                return None
            first = torch.full((batch_size,), keys - q_length, device=device)
            return _key_ranges([first], keys)
        start = padding.int().argmax(-1)
        end = start + padding.sum(-1)
        key = torch.arange(keys, device=padding.device)
        if bool((padding == ((key >= start[:, None]) & (key < end[:, None]))).all()):
            first = [torch.full_like(start, keys - q_length)] if is_causal else []
            return _key_ranges([start, end, *first], keys)
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    skips = {
        "allow_is_causal_skip": allow_is_causal_skip and tracing,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip and tracing,
    }
    masks = (mask_function, attention_mask, local_size)
    mask = sdpa_mask(*sizes, *masks, device=device, **skips, **kwargs)
    if mask is None or kv_length == q_length or allow_is_bidirectional_skip:
        return mask
    position = torch.arange(q_length, device=device) + q_offset
    own = torch.arange(kv_length, device=device) + kv_offset == position[:, None]
    return mask + 2 * own.to(torch.int8)


def shaped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute shaped attention for an attention module of `transformers`.

    Args:
        module: the attention module, with ``shaped_gains``.
        query: (B, H, T, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: as `shaped_attention_mask` returns it, or a bool mask of the caller's. If
            such a mask has more keys than queries, each query sits at the last key that it sees.
        dropout: must be 0.
        scaling: the model's own scale; None is 1 / sqrt(D).
        is_causal: whether queries see no later key, where the mask does not tell. Default None:
            that of the module.
        **kwargs: what else models pass; nothing that would change the result is accepted.

    Returns:
        (B, T, H, Dv), and None in place of attention weights.
    """
    kind, gains = type(module).__name__, getattr(module, GAINS, None)
    if gains is None:
        rule = "must be chosen with apply_shaped_attention or configure_shaped_attention"
        got = f"a {kind} without gains"
        remedy = "Call apply_shaped_attention on the whole model."
        fail(ValueError, f'attn_implementation="{ATTENTION}"', rule, got, remedy)
    if dropout != 0.0:
        remedy = (
            "Build the model with it set to 0 in the config (attention_dropout, attn_pdrop or "
            "attention_probs_dropout_prob), or call model.eval()."
        )
        rule = f"of the attention weights must be 0 ({kind})"
        fail(ValueError, "dropout", rule, dropout, remedy)
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            refuse(f"{kind}, which {what} ({name})")
    refuse_output_attentions(kwargs)
    if query.shape[1] != gains.heads:
        rule = f"of {kind} must have all {gains.heads} heads"
        remedy = "Tensor parallelism is not supported: use data parallelism or FSDP."
        fail(ValueError, "query", rule, query.shape[1], remedy)
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options = gains()
    options["scale"] = _scale(gains.scale, module, query, scaling)
    queries = query.shape[2]
    if attention_mask is None:
        if is_causal and queries > 1 and key.shape[2] > queries:
            # An empty StaticCache under torch.compile: what was written are the first keys.
            key, value = key[:, :, :queries], value[:, :, :queries]
    elif attention_mask.dtype == torch.int64:
        rows, keys = attention_mask.shape[1], attention_mask.shape[3]
        is_causal = rows != 2
        key, value = key[:, :, :keys], value[:, :, :keys]
        if rows > 1:
            options["key_start"] = attention_mask[:, 0, 0, 0].expand(query.shape[0])
            options["key_end"] = attention_mask[:, 1, 0, 0].expand(query.shape[0])
    elif attention_mask.dtype == torch.bool:
        options["attn_mask"] = attention_mask
    elif attention_mask.dtype == torch.int8:
        options["attn_mask"] = (attention_mask & 1).bool()
    else:
        remedy = (
            "Pass a mask that is True where a query sees a key, or a 2-D mask of padding. An "
            "additive mask, or a model that adds a bias to its logits, cannot be shaped."
        )
        rule = f"of {kind} must be bool if it has 4 dimensions"
        fail(TypeError, "attention_mask", rule, attention_mask.dtype, remedy)
    if not is_zero(options["identity_gain"]) and key.shape[2] != queries:
        is_marked = attention_mask is not None and attention_mask.dtype == torch.int8
        if not is_causal and not is_marked:
            sizes = f"{kind} with {queries} queries and {key.shape[2]} keys"
            rule = f"must be 0.0 in cross-attention, where a query is no key ({sizes})"
            remedy = "Apply with identity_gain=0.0, or to a model without cross-attention."
            fail(ValueError, "identity_gain", rule, options["identity_gain"], remedy)
        if "attn_mask" in options:
            # The operator knows one distance of queries and keys per call, a mask one per row.
            options["residual"] = _own_values(query, value, attention_mask)
            options["skip_gain"] = options["identity_gain"]
            options["identity_gain"] = 0.0
    options["is_causal"] = is_causal and "attn_mask" not in options
    out = _attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    on_cpu = query.device.type == "cpu" and not is_autocast(query)
    if not (on_cpu and torch.compiler.is_compiling()):
        return shaped_attention(query, key, value, **options)
    # As one operator: torch.compile would unroll the chunks of rows, once for each length.
    residual = options.pop("residual", None)
    gains = Gains(
        *(options.pop(f"{name}_gain", 1.0) for name in ("identity", "softmax", "center", "skip")),
        scale=options.pop("scale"),
    )
    visibility = Visibility(**options)
    return attention_from_gains(query, key, value, residual, gains, visibility)[0]


def _key_ranges(rows: list[Tensor], keys: int) -> Tensor:
    return torch.stack(rows, 1)[:, :, None, None].expand(-1, -1, 1, keys)


def _own_values(query: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return the value at each query's own position, (B, H, T, Dv): marked, or the last seen."""
    batch, heads, queries, _ = query.shape
    keys = value.shape[2]
    order = torch.arange(1, keys + 1, device=mask.device)
    order = torch.where(mask > 1, keys + 1, (mask != 0) * order)
    own = order.argmax(-1).expand(batch, -1, queries)
    group = heads // value.shape[1]
    if own.shape[1] != 1:
        value, group = value.repeat_interleave(group, dim=1), 1
    own = own[..., None].expand(-1, value.shape[1], -1, value.shape[3])
    return value.gather(2, own).repeat_interleave(group, dim=1)


def _scale(
    scale: str | float, module: nn.Module, query: Tensor, scaling: float | None
) -> float | None:
    """Return the scale of the operator; ``scaling`` is that which the model asks for."""
    head_dim = query.shape[-1]
    if scale == "standard":
        return head_dim**-0.5 if scaling is None else scaling
    own = getattr(module, "scaling", scaling)
    if scaling is None or own == scaling:
        return None if scale == "width" else scale
    if scaling == 1.0 and own == head_dim**-0.5:  # the queries are scaled already
        return (query.shape[1] ** -0.5 if scale == "width" else scale * head_dim) / own / head_dim
    kind = type(module).__name__
    rule = f'must be "standard" for {kind}, which scales its queries in its own way'
    fail(ValueError, "scale", rule, repr(scale), 'Apply with scale="standard".')


def _check_cache(
    queries: int, keys: int, q_offset: int | Tensor, kv_offset: int, is_causal: bool
) -> None:
    """Check that the keys of these queries fit into a static cache."""
    is_static = isinstance(q_offset, Tensor) or (is_causal and q_offset == 0)
    needed = int(q_offset) - kv_offset + queries
    if is_static and needed > keys:
        rule = f"must have room for all tokens, {needed}"
        remedy = "Build the StaticCache with a larger max_cache_len, or use a DynamicCache."
        fail(ValueError, "cache", rule, f"a length of {keys}", remedy)


def refuse(what: str) -> NoReturn:
    """Raise for attention that does what shaped attention cannot."""
    rule = "must have no attention that shaped attention cannot compute"
    remedy = "Use another model, build it without that, or apply to a part of it that has none."
    fail(ValueError, "model", rule, what, remedy)


def refuse_output_attentions(kwargs: dict[str, Any]) -> None:
    """Raise if attention weights are asked for."""
    if kwargs.get("output_attentions"):
        rule = "must be False: shaped attention has no T x S matrix to return"
        remedy = "Leave it out, or use shaped_attn.nn.ShapedAttention.attention_matrix."
        fail(ValueError, "output_attentions", rule, True, remedy)
