"""The attention modules of a Hugging Face model, and whether shaped attention can replace them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from ...checks import check_head_gain, fail
from ...nn.gains import GAIN_NAMES
from .attention import REFUSED, refuse

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


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def check_model(model: PreTrainedModel, choice: dict[str, Any]) -> None:
    """Check that all attention of a model can be computed, and name what cannot."""
    for path, module in model.named_modules():
        if _is_other_attention(module):
            where = f"{type(model).__name__}, whose {path} ({type(module).__name__})"
            refuse(f"{where} does not use transformers.AttentionInterface")
    modules = dict(attention_modules(model))
    if not modules:
        refuse_without_interface(model)
    for path, module in modules.items():
        where = f"{type(model).__name__}, whose {path} ({type(module).__name__})"
        keywords, heads = _keywords(type(module)), query_heads(module, model)
        for name in GAIN_NAMES:
            check_head_gain(name, choice[name], heads)
        for name, attributes in REFUSED_ATTRIBUTES.items():
            for attribute in attributes:
                if name in keywords and getattr(module, attribute, None) is not None:
                    refuse(f"{where} {REFUSED[name]} ({attribute})")
        if "position_bias" in keywords:
            refuse(f"{where} {REFUSED['position_bias']}")
        is_identity_free = choice["identity_gain"] == 0.0 and not choice["trainable_gains"]
        if not is_identity_free and _is_cross(path, module):
            rule = (
                f"must be 0.0 and not trained in {where} is cross-attention, where a query is no "
                "key"
            )
            remedy = "Pass identity_gain=0.0, or shape a model without cross-attention."
            fail(ValueError, "identity_gain", rule, choice["identity_gain"], remedy)


def refuse_without_interface(model: PreTrainedModel) -> NoReturn:
    """Raise for a model of which no attention can be replaced."""
    rule = "must have attention that goes through transformers.AttentionInterface"
    got = f"{type(model).__name__}, which does not use it"
    remedy = "Use another model, or build one from shaped_attn.nn."
    fail(ValueError, "model", rule, got, remedy)


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


def query_heads(module: nn.Module, model: PreTrainedModel) -> int:
    """Return the number of query heads of an attention module."""
    names = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
    for source in (module, getattr(module, "config", None), model.config):
        for name in names:
            heads = getattr(source, name, None)
            if isinstance(heads, int) and heads > 0:
                return heads
    listed = ", ".join(names)
    rule = f"must have attention modules that tell their number of heads ({listed})"
    got = f"{type(model).__name__} with a {type(module).__name__} that does not"
    fail(ValueError, "model", rule, got, "Set num_heads on the attention modules.")
