"""Shaped attention in Hugging Face models: `apply_shaped_attention`.

Importing this module registers an attention function and its mask function under the name
`ATTENTION` and makes `transformers` build every model whose config was written by
`configure_shaped_attention`, or saved from a shaped model, with shaped attention.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "shaped_attn.integrations.transformers needs transformers 5.8 or later, got none. "
        "Install it with: pip install 'shaped-attn[transformers]'."
    ) from error
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from ..arguments import Gains, is_zero
from ..checks import check_choice, check_flag, check_number
from ..functional import is_autocast, shaped_attention
from ..nn.gains import GAIN_NAMES, ShapingGains, check_head_gain
from ..ops import attention_from_gains
from ..visibility import Visibility

__all__ = [
    "ATTENTION",
    "apply_shaped_attention",
    "configure_shaped_attention",
    "remove_shaped_attention",
    "shaped_attention_forward",
    "shaped_attention_mask",
]

ATTENTION = "shaped_attn"
"""Name of the attention in `transformers`, and of the attribute of a config with the choice."""

GAINS = "shaped_gains"
"""Name of the submodule with the gains that each attention module gets."""

SCALES = ("width", "standard")

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

# Attributes of an attention module that, unless None, will end in a refused argument.
REFUSED_ATTRIBUTES = {
    "softcap": ("attn_logit_softcapping", "logit_softcapping", "softcap"),
    "s_aux": ("sinks", "attention_sink_bias", "s_aux"),
}

# How modules whose queries are no keys are named, and what their forward takes.
CROSS_NAME = re.compile(
    r"cross|x_attn|enc_?dec|encoder_attn|token_to_image|image_to_token|pooling|LoFTR", re.I
)
CROSS_PARAMETERS = (
    {"context"},
    {"context_hidden_states"},
    {"latents"},
    {"merged_attention_mask"},
    {"queries"},
    {"query", "key", "value"},
)


def apply_shaped_attention(
    model: PreTrainedModel,
    *,
    identity_gain: float | Sequence[float] = 1.0,
    softmax_gain: float | Sequence[float] = 1.0,
    center_gain: float | Sequence[float] = 1.0,
    scale: str | float = "width",
    trainable_gains: bool = False,
    annealable: bool = False,
) -> PreTrainedModel:
    """Replace the attention of a Hugging Face model by shaped attention, in place.

    Every attention module that dispatches through `transformers.AttentionInterface` computes
    `shaped_attn.shaped_attention`. The weights stay; a submodule ``shaped_gains`` with the gains
    is added to each, and what is tensors of it is in the state dict. The choice is written to the
    config, so that ``from_pretrained`` of what ``save_pretrained`` wrote gives the same model, if
    this module was imported before (otherwise it is an error).

    With ``identity_gain=0.0, center_gain=0.0, scale="standard"`` the model computes what it did.

    Args:
        model: any model that is, or holds, a `transformers.PreTrainedModel`.
        identity_gain: weight of the value at the query's own position, a number or one per query
            head. Default 1.0.
        softmax_gain: weight of the softmax term, the same. Default 1.0.
        center_gain: weight of the mean of the visible values, the same. Default 1.0.
        scale: "width" (the default) is 1 / (head_dim sqrt(heads)), "standard" is the model's own,
            a number is the scale itself.
        trainable_gains: whether identity and centre gain become parameters, one per query head.
            Default False.
        annealable: whether `shaped_attn.nn.anneal_gains` can move the model between shaped (0, the
            start) and plain attention (1). Default False.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value; ``model`` has an attention that this cannot
            compute, or no attention; gains of an earlier call would be lost; trainable gains are
            asked for where autograd is off.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from shaped_attn.integrations.transformers import apply_shaped_attention
        >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = apply_shaped_attention(LlamaForCausalLM(config), trainable_gains=True)
        >>> model.model.layers[0].self_attn.shaped_gains.identity_gain.shape
        torch.Size([4])
    """
    _check_type(model)
    choice = check_choices(
        identity_gain, softmax_gain, center_gain, scale, trainable_gains, annealable
    )
    if trainable_gains and not torch.is_grad_enabled():
        raise ValueError(
            "trainable_gains must be False where autograd is off, got True under torch.no_grad() "
            "or torch.inference_mode(). Call apply_shaped_attention outside of it."
        )
    for path, module in model.named_modules():
        if isinstance(module, ShapedGains) and module.gain_scheme != "fixed":
            raise ValueError(
                "model must not have gains that training or annealing moves, got "
                f"{type(model).__name__} with {path}. "
                "Start again from the original model: a second call would lose their values."
            )
    _check_model(model, choice)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _write(part.config, choice)
    model.set_attn_implementation(ATTENTION)
    _attach(model, choice)
    return model


def configure_shaped_attention(
    config: PreTrainedConfig,
    *,
    identity_gain: float | Sequence[float] = 1.0,
    softmax_gain: float | Sequence[float] = 1.0,
    center_gain: float | Sequence[float] = 1.0,
    scale: str | float = "width",
    trainable_gains: bool = False,
    annealable: bool = False,
) -> PreTrainedConfig:
    """Write the choice to a config, in place: models built from it have shaped attention.

    The form of `apply_shaped_attention` before construction; for ``Model(config)``,
    ``AutoModel.from_config(config)`` and ``from_pretrained(path, config=config)``. Gains that a
    checkpoint lacks start at the values given here.

    Args:
        config: of the model, with its parts if it has any.
        identity_gain, softmax_gain, center_gain, scale, trainable_gains, annealable: as in
            `apply_shaped_attention`.

    Returns:
        ``config``.

    Raises:
        TypeError, ValueError: as in `apply_shaped_attention`; what concerns the model is raised
            when it is built.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"config must be a transformers.PreTrainedConfig, got {type(config).__name__}. "
            "For a model that exists, call apply_shaped_attention."
        )
    choice = check_choices(
        identity_gain, softmax_gain, center_gain, scale, trainable_gains, annealable
    )
    _write(config, choice)
    for part in _sub_configs(config):
        _write(part, choice)
    config._attn_implementation = ATTENTION  # of its parts, too
    return config


def remove_shaped_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model plain whose gains have become plain, in place: no output changes.

    What is saved after it loads without shaped_attn.

    Args:
        model: whose attention is shaped with ``scale="standard"``, and whose identity, softmax and
            centre gains are now 0, 1 and 0: after ``anneal_gains(model, 1.0)``, for example.

    Returns:
        ``model``, with the attention "sdpa".

    Raises:
        TypeError: ``model`` is no `transformers.PreTrainedModel`.
        ValueError: it has no shaped attention, or one that plain attention does not reproduce.
    """
    _check_type(model)
    found = {
        path: module for path, module in model.named_modules() if isinstance(module, ShapedGains)
    }
    if not found:
        raise ValueError(
            f"model must have shaped attention, got a {type(model).__name__} without it. "
            "There is nothing to remove."
        )
    plain = dict(zip(GAIN_NAMES, (0.0, 1.0, 0.0), strict=True))
    for path, gains in found.items():
        is_plain = gains.scale == "standard" and all(
            bool((torch.as_tensor(gain) == plain[name]).all()) for name, gain in gains().items()
        )
        if not is_plain:
            raise ValueError(
                "model must have identity_gain 0, softmax_gain 1, center_gain 0 and scale "
                f'"standard", got {path}: {gains}. '
                "Train it there first: apply with annealable=True and call anneal_gains."
            )
    for path in found:
        delattr(model.get_submodule(path.rpartition(".")[0]), GAINS)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for config in (part.config, *_sub_configs(part.config)):
                for name in (ATTENTION, "attn_implementation"):
                    vars(config).pop(name, None)
            for key, hook in list(part._forward_pre_hooks.items()):
                if hook is _check_forward:
                    del part._forward_pre_hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)
    model.set_attn_implementation("sdpa")
    return model


def check_choices(
    identity_gain: float | Sequence[float],
    softmax_gain: float | Sequence[float],
    center_gain: float | Sequence[float],
    scale: str | float,
    trainable_gains: bool,
    annealable: bool,
) -> dict:
    """Return the choice as it stands in a config, of what JSON can hold, or raise."""
    check_flag("trainable_gains", trainable_gains)
    check_flag("annealable", annealable)
    if trainable_gains and annealable:
        raise ValueError(
            "annealable must be False with trainable_gains, got True. "
            "Choose one: gains move by training or by a schedule."
        )
    choice = {}
    for name, gain in zip(GAIN_NAMES, (identity_gain, softmax_gain, center_gain), strict=True):
        heads = len(gain) if isinstance(gain, (list, tuple, Tensor)) and len(gain) else 1
        gain = check_head_gain(name, gain, heads)
        choice[name] = list(gain) if isinstance(gain, tuple) else gain
    if isinstance(scale, str):
        check_choice("scale", scale, SCALES)
    else:
        scale = check_number("scale", scale)
    return choice | {
        "scale": scale,
        "trainable_gains": trainable_gains,
        "annealable": annealable,
    }


class ShapedGains(ShapingGains):
    """`ShapingGains` of one attention module of a Hugging Face model, and its scale.

    Args:
        heads: number of query heads.
        choice: as `check_choices` returns it.
        device: of the tensors. Default: torch's default device.
        dtype: of the tensors. Default: torch's default dtype.
    """

    def __init__(
        self,
        heads: int,
        choice: dict,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = "learn" if choice["trainable_gains"] else "fixed"
        super().__init__(
            heads,
            **{name: choice[name] for name in GAIN_NAMES},
            gain_scheme="recover" if choice["annealable"] else scheme,
            device=device,
            dtype=dtype,
        )
        self.scale = choice["scale"]

    def extra_repr(self) -> str:
        """Return the scheme, the start values and the scale."""
        return f"{super().extra_repr()}, scale={self.scale!r}"


# ------------------------------------------------------------------ the two registered functions


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
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip=allow_is_causal_skip and tracing,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and tracing,
        device=device,
        **kwargs,
    )
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
    gains = getattr(module, GAINS, None)
    if gains is None:
        raise ValueError(
            f'attn_implementation="{ATTENTION}" must be chosen with apply_shaped_attention or '
            f"configure_shaped_attention, got a {type(module).__name__} without gains. "
            "Call apply_shaped_attention on the whole model."
        )
    _check_arguments(module, dropout, kwargs)
    if query.shape[1] != gains.heads:
        raise ValueError(
            f"query of {type(module).__name__} must have all {gains.heads} heads, got "
            f"{query.shape[1]}. Tensor parallelism is not supported: use data parallelism or FSDP."
        )
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
        raise TypeError(
            f"attention_mask of {type(module).__name__} must be bool if it has 4 dimensions, got "
            f"{attention_mask.dtype}. "
            "Pass a mask that is True where a query sees a key, or a 2-D mask of padding. An "
            "additive mask, or a model that adds a bias to its logits, cannot be shaped."
        )
    if not is_zero(options["identity_gain"]) and key.shape[2] != queries:
        is_marked = attention_mask is not None and attention_mask.dtype == torch.int8
        if not is_causal and not is_marked:
            raise ValueError(
                "identity_gain must be 0.0 in cross-attention, where a query is no key "
                f"({type(module).__name__} with {queries} queries and {key.shape[2]} keys), got "
                f"{options['identity_gain']}. "
                "Apply with identity_gain=0.0, or to a model without cross-attention."
            )
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
    raise ValueError(
        f'scale must be "standard" for {type(module).__name__}, which scales its queries in its '
        f'own way, got {scale!r}. Apply with scale="standard".'
    )


def _check_cache(
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    is_causal: bool,
) -> None:
    """Check that the keys of these queries fit into a static cache."""
    is_static = isinstance(q_offset, Tensor) or (is_causal and q_offset == 0)
    needed = int(q_offset) - kv_offset + queries
    if is_static and needed > keys:
        raise ValueError(
            f"cache must have room for all tokens, {needed}, got a length of {keys}. "
            "Build the StaticCache with a larger max_cache_len, or use a DynamicCache."
        )


def _check_arguments(module: nn.Module, dropout: float, kwargs: dict) -> None:
    if dropout != 0.0:
        raise ValueError(
            f"dropout of the attention weights must be 0 ({type(module).__name__}), got {dropout}. "
            "Build the model with it set to 0 in the config (attention_dropout, attn_pdrop or "
            "attention_probs_dropout_prob), or call model.eval()."
        )
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                "model must not ask for what shaped attention cannot do, got "
                f"{type(module).__name__}, which {what} ({name}). "
                "Use another model, build it without that, or apply to a part of it that has none."
            )
    if kwargs.get("output_attentions"):
        _fail_output_attentions()


def _fail_output_attentions() -> None:
    raise ValueError(
        "output_attentions must be False: shaped attention has no T x S matrix to return, got "
        "True. Leave it out, or use shaped_attn.nn.ShapedAttention.attention_matrix."
    )


# ------------------------------------------------------------------ models and their configs


def _check_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook: without it a model would be plain, or return no attention weights."""
    if hasattr(model.config, ATTENTION) and model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f'attn_implementation must stay "{ATTENTION}" while {type(model).__name__} has shaped '
            f"attention, got {model.config._attn_implementation!r}. "
            "Set it back with model.set_attn_implementation, or call remove_shaped_attention."
        )
    if kwargs.get("output_attentions"):
        _fail_output_attentions()


def _check_type(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}. "
            "Pass the model itself, not its name, its config or a wrapper of it."
        )


def _attach(model: PreTrainedModel, choice: dict) -> None:
    for _, module in _attention_modules(model):
        tensor = next((p for p in module.parameters() if p.is_floating_point()), None)
        device, dtype = (None, None) if tensor is None else (tensor.device, tensor.dtype)
        gains = ShapedGains(_heads(module, model), choice, device=device, dtype=dtype)
        module.add_module(GAINS, gains)
    for part in model.modules():
        is_hooked = _check_forward in part._forward_pre_hooks.values()
        if isinstance(part, PreTrainedModel) and not is_hooked:
            part.register_forward_pre_hook(_check_forward, with_kwargs=True)


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attention modules that go through transformers.AttentionInterface."""
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) and _dispatches(type(module)):
            yield path, module


@functools.cache
def _dispatches(kind: type) -> bool:
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _codes(kind))


@functools.cache
def _keywords(kind: type) -> frozenset[str]:
    """Names of all keyword arguments in calls that the methods of a class make."""
    return frozenset(
        name
        for code in _codes(kind)
        for constant in code.co_consts
        if isinstance(constant, tuple)
        for name in constant
        if isinstance(name, str)
    )


def _codes(kind: type) -> list:
    found = []
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None:
                found.append(code)
    return found


def _check_model(model: PreTrainedModel, choice: dict) -> None:
    """Check that all attention of a model can be computed, and name what cannot."""
    modules = dict(_attention_modules(model))
    for path, module in model.named_modules():
        if _is_other_attention(module):
            _refuse(model, path, module, "does not use transformers.AttentionInterface")
    if not modules:
        raise ValueError(
            "model must have attention that goes through transformers.AttentionInterface, got "
            f"{type(model).__name__} without any. "
            "Use another model, or build one from shaped_attn.nn."
        )
    for path, module in modules.items():
        heads = _heads(module, model)
        for name in GAIN_NAMES:
            check_head_gain(name, choice[name], heads)
        for name, attributes in REFUSED_ATTRIBUTES.items():
            for attribute in attributes:
                if name in _keywords(type(module)) and getattr(module, attribute, None) is not None:
                    _refuse(model, path, module, f"{REFUSED[name]} ({attribute})")
        if "position_bias" in _keywords(type(module)):
            _refuse(model, path, module, REFUSED["position_bias"])
        is_identity_free = choice["identity_gain"] == 0.0 and not choice["trainable_gains"]
        if not is_identity_free and _is_cross(path, module):
            raise ValueError(
                f"identity_gain must be 0.0 and not trained in {type(model).__name__}, whose "
                f"{path} ({type(module).__name__}) is cross-attention, where a query is no key, "
                f"got {choice['identity_gain']}. "
                "Pass identity_gain=0.0, or shape a model without cross-attention."
            )


def _refuse(model: nn.Module, path: str, module: nn.Module, what: str) -> None:
    raise ValueError(
        "model must have no attention that shaped attention cannot compute, got "
        f"{type(model).__name__}, whose {path} ({type(module).__name__}) {what}. "
        "Use another model, build it without that, or apply to a part of it that has none."
    )


def _is_other_attention(module: nn.Module) -> bool:
    """Whether a module is attention that does not go through transformers.AttentionInterface."""
    if isinstance(module, PreTrainedModel) or not re.search(
        "Attention|Attn", type(module).__name__
    ):
        return False
    if any(_dispatches(type(part)) for part in module.modules()):
        return False
    projections = [x for x in module.modules() if getattr(x, "weight", None) is not None]
    return isinstance(module, nn.MultiheadAttention) or len(projections) > 1


def _is_cross(path: str, module: nn.Module) -> bool:
    marked = getattr(module, "is_cross_attention", None)
    if isinstance(marked, bool):
        return marked
    names = set(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
    is_named = CROSS_NAME.search(f"{path} {type(module).__name__}") is not None
    return is_named or any(cross <= names for cross in CROSS_PARAMETERS)


def _heads(module: nn.Module, model: PreTrainedModel) -> int:
    """Return the number of query heads of an attention module."""
    names = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
    for source in (module, getattr(module, "config", None), model.config):
        for name in names:
            heads = getattr(source, name, None)
            if isinstance(heads, int) and heads > 0:
                return heads
    raise ValueError(
        f"model must have attention modules that tell their number of heads ({', '.join(names)}), "
        f"got {type(model).__name__} with a {type(module).__name__} that does not. "
        "Set num_heads on the attention modules."
    )


def _sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _sub_configs(part)


def _write(config: PreTrainedConfig, choice: dict) -> None:
    """Write the choice to a config.

    ``attn_implementation`` is no attribute that transformers has, but one that it reads from a
    file: with it a process that has not imported this module cannot load the model as another.
    """
    setattr(config, ATTENTION, dict(choice))
    config.attn_implementation = ATTENTION


def _built(post_init: Callable) -> Callable:
    """Wrap `PreTrainedModel.post_init`, with which the constructors of all models end."""

    @functools.wraps(post_init)
    def wrapper(self: PreTrainedModel) -> None:
        choice = getattr(self.config, ATTENTION, None)
        if choice is not None:
            choice = check_choices(**choice)
            _check_model(self, choice)
            _write(self.config, choice)
            _attach(self, choice)
        post_init(self)

    return wrapper


def _chosen(check_and_adjust: Callable) -> Callable:
    """Wrap `PreTrainedModel._check_and_adjust_attn_implementation`, which has the default.

    A composite config passes None on to its parts, whatever their file says.
    """

    @functools.wraps(check_and_adjust)
    def wrapper(
        self: PreTrainedModel,
        attn_implementation: str | None,
        is_init_check: bool = False,
        **kwargs,
    ) -> str:
        if is_init_check and getattr(self.config, ATTENTION, None) is not None:
            if attn_implementation not in (None, ATTENTION):
                raise ValueError(
                    f'attn_implementation must be "{ATTENTION}" for a config with shaped '
                    f"attention, got {attn_implementation!r}. "
                    f"Leave it out, or delete config.{ATTENTION} for a plain model."
                )
            if not self._can_set_attn_implementation():  # it may know no name but its own
                raise ValueError(
                    "model must have attention that goes through transformers.AttentionInterface, "
                    f"got {type(self).__name__}, which does not use it. "
                    "Use another model, or build one from shaped_attn.nn."
                )
            attn_implementation = ATTENTION
        return check_and_adjust(self, attn_implementation, is_init_check, **kwargs)

    return wrapper


def _initialized(initialize_weights: Callable) -> Callable:
    """Wrap `PreTrainedModel._initialize_weights`, which fills what a checkpoint lacks."""

    @functools.wraps(initialize_weights)
    def wrapper(self: PreTrainedModel, module: nn.Module, *args, **kwargs) -> None:
        if not isinstance(module, ShapedGains):
            initialize_weights(self, module, *args, **kwargs)
            return
        for name, law in module.laws().items():
            tensor = getattr(module, name)
            if not getattr(tensor, "_is_hf_initialized", False):
                law(tensor, None)

    return wrapper


def _register() -> None:
    """Register both functions, and hook into the construction of models, which has no registry."""
    AttentionInterface.register(ATTENTION, shaped_attention_forward)
    AttentionMaskInterface.register(ATTENTION, shaped_attention_mask)
    for name, wrap in (
        ("_check_and_adjust_attn_implementation", _chosen),
        ("post_init", _built),
        ("_initialize_weights", _initialized),
    ):
        setattr(PreTrainedModel, name, wrap(getattr(PreTrainedModel, name)))


if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 8):
    raise ImportError(
        f"shaped_attn.integrations.transformers needs transformers 5.8 or later, got "
        f"{transformers.__version__}. Upgrade it with: pip install --upgrade transformers."
    )
_register()
