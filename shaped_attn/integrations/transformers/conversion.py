"""Models made shaped and plain again: those that exist, and those that a config describes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...checks import check_choice_or_number, check_flag, check_head_gain, check_kind, fail
from ...nn.gains import GAIN_NAMES, ShapingGains
from .attention import (
    ATTENTION,
    GAINS,
    refuse_output_attentions,
    shaped_attention_forward,
    shaped_attention_mask,
)
from .models import attention_modules, check_model, query_heads, refuse_without_interface

SCALES = ("width", "standard")
_NO_MODEL = "Pass the model itself, not its name, its config or a wrapper of it."


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
    check_kind("model", model, PreTrainedModel, _NO_MODEL)
    choice = _checked(identity_gain, softmax_gain, center_gain, scale, trainable_gains, annealable)
    if trainable_gains and not torch.is_grad_enabled():
        rule = "must be False where autograd is off"
        got = "True under torch.no_grad() or torch.inference_mode()"
        remedy = "Call apply_shaped_attention outside of it."
        fail(ValueError, "trainable_gains", rule, got, remedy)
    for path, module in model.named_modules():
        if isinstance(module, ShapedGains) and module.gain_scheme != "fixed":
            rule = "must not have gains that training or annealing moves"
            remedy = "Start again from the original model: a second call would lose their values."
            fail(ValueError, "model", rule, f"{type(model).__name__} with {path}", remedy)
    check_model(model, choice)
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
    remedy = "For a model that exists, call apply_shaped_attention."
    check_kind("config", config, PreTrainedConfig, remedy)
    choice = _checked(identity_gain, softmax_gain, center_gain, scale, trainable_gains, annealable)
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
    check_kind("model", model, PreTrainedModel, _NO_MODEL)
    found = {
        path: module for path, module in model.named_modules() if isinstance(module, ShapedGains)
    }
    if not found:
        got = f"a {type(model).__name__} without it"
        fail(ValueError, "model", "must have shaped attention", got, "There is nothing to remove.")
    plain = dict(zip(GAIN_NAMES, (0.0, 1.0, 0.0), strict=True))
    for path, gains in found.items():
        is_plain = gains.scale == "standard" and all(
            bool((torch.as_tensor(gain) == plain[name]).all()) for name, gain in gains().items()
        )
        if not is_plain:
            rule = 'must have identity_gain 0, softmax_gain 1, center_gain 0 and scale "standard"'
            remedy = "Train it there first: apply with annealable=True and call anneal_gains."
            fail(ValueError, "model", rule, f"{path}: {gains}", remedy)
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


def _checked(
    identity_gain: float | Sequence[float] = 1.0,
    softmax_gain: float | Sequence[float] = 1.0,
    center_gain: float | Sequence[float] = 1.0,
    scale: str | float = "width",
    trainable_gains: bool = False,
    annealable: bool = False,
) -> dict[str, Any]:
    """Return the choice as it stands in a config, of what JSON can hold, or raise."""
    check_flag("trainable_gains", trainable_gains)
    check_flag("annealable", annealable)
    if trainable_gains and annealable:
        remedy = "Choose one: gains move by training or by a schedule."
        fail(ValueError, "annealable", "must be False with trainable_gains", True, remedy)
    choice = {}
    for name, gain in zip(GAIN_NAMES, (identity_gain, softmax_gain, center_gain), strict=True):
        heads = len(gain) if isinstance(gain, (list, tuple, Tensor)) and len(gain) else 1
        gain = check_head_gain(name, gain, heads)
        choice[name] = list(gain) if isinstance(gain, tuple) else gain
    return choice | {
        "scale": check_choice_or_number("scale", scale, SCALES),
        "trainable_gains": trainable_gains,
        "annealable": annealable,
    }


class ShapedGains(ShapingGains):
    """`ShapingGains` of one attention module of a Hugging Face model, and its scale.

    Args:
        heads: number of query heads.
        choice: what `apply_shaped_attention` was given.
        device: of the tensors. Default: torch's default device.
        dtype: of the tensors. Default: torch's default dtype.
    """

    def __init__(
        self,
        heads: int,
        choice: dict[str, Any],
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


def _check_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook: without it a model would be plain, or return no attention weights."""
    if hasattr(model.config, ATTENTION) and model.config._attn_implementation != ATTENTION:
        rule = f'must stay "{ATTENTION}" while {type(model).__name__} has shaped attention'
        got = repr(model.config._attn_implementation)
        remedy = "Set it back with model.set_attn_implementation, or call remove_shaped_attention."
        fail(ValueError, "attn_implementation", rule, got, remedy)
    refuse_output_attentions(kwargs)


def _attach(model: PreTrainedModel, choice: dict) -> None:
    for _, module in attention_modules(model):
        tensor = next((p for p in module.parameters() if p.is_floating_point()), None)
        device, dtype = (None, None) if tensor is None else (tensor.device, tensor.dtype)
        gains = ShapedGains(query_heads(module, model), choice, device=device, dtype=dtype)
        module.add_module(GAINS, gains)
    for part in model.modules():
        is_hooked = _check_forward in part._forward_pre_hooks.values()
        if isinstance(part, PreTrainedModel) and not is_hooked:
            part.register_forward_pre_hook(_check_forward, with_kwargs=True)


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
            choice = _checked(**choice)
            check_model(self, choice)
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
                rule = f'must be "{ATTENTION}" for a config with shaped attention'
                remedy = f"Leave it out, or delete config.{ATTENTION} for a plain model."
                fail(ValueError, "attn_implementation", rule, repr(attn_implementation), remedy)
            if not self._can_set_attn_implementation():  # it may know no name but its own
                refuse_without_interface(self)
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


def register() -> None:
    """Register both functions, and hook into the construction of models, which has no registry."""
    AttentionInterface.register(ATTENTION, shaped_attention_forward)
    AttentionMaskInterface.register(ATTENTION, shaped_attention_mask)
    for name, wrap in (
        ("_check_and_adjust_attn_implementation", _chosen),
        ("post_init", _built),
        ("_initialize_weights", _initialized),
    ):
        setattr(PreTrainedModel, name, wrap(getattr(PreTrainedModel, name)))
