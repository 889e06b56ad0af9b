"""Shaped attention in modules that call `torch.nn.functional.scaled_dot_product_attention`.

`replace_sdpa` changes what those calls do inside one module, `nn.MultiheadAttention` and
`nn.TransformerEncoderLayer` included. `replacing_sdpa` makes a class of such modules, for libraries
that take an attention layer as a class, as timm does.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from ..arguments import Gain
from ..checks import check_choice, check_choice_or_number, check_number, fail
from ..functional import shaped_attention
from ..validation import IMPLEMENTATIONS

_SCALES = ("width", "standard")
_NO_IDENTITY = "Pass identity_gain=0, or replace the modules with self-attention alone"
_REPLACED = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# What torch runs in place of these where no gradient is needed. Under a mode it takes the other way
# by itself; a call from elsewhere must not pass unnoticed.
_FUSED = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)

# Methods of Tensor in Python, which Dynamo traces as methods and not as functions.
_TENSOR_METHODS = frozenset(
    name for name, method in vars(Tensor).items() if isinstance(method, types.FunctionType)
)


class ReplacedSdpa:
    """A replacement that `replace_sdpa` has made; as a context manager it ends with the block."""

    def __init__(self, module: nn.Module, classes: dict[nn.Module, type[nn.Module]]) -> None:
        self.module = module
        self._replaced = [(part, type(part), made) for part, made in classes.items()]
        for part, _, made in self._replaced:
            part.__class__ = made

    def undo(self) -> None:
        """Make the module what it was; a second time does nothing.

        Raises:
            ValueError: the class of a part was changed since, by something else.
        """
        for part, original, made in self._replaced:
            if type(part) is not made:
                rule = f"must have its {original.__name__} as replace_sdpa left it"
                got = f"one of class {type(part).__name__} in its place"
                fail(ValueError, "module", rule, got, "Undo what was done to it later first.")
        for part, original, _ in self._replaced:
            part.__class__ = original
        self._replaced = []

    def __enter__(self) -> nn.Module:
        return self.module

    def __exit__(self, *_: object) -> None:
        self.undo()


def replace_sdpa(
    module: nn.Module,
    *,
    identity_gain: Gain = 1.0,
    softmax_gain: Gain = 1.0,
    center_gain: Gain = 1.0,
    scale: str | float = "width",
    impl: str = "auto",
) -> ReplacedSdpa:
    r"""Let the attention calls inside ``module`` be shaped, from now on or for a ``with`` block.

    Every call of ``F.scaled_dot_product_attention`` that is made during the forward of ``module``
    or of one of its submodules, by whatever name, gives:

        identity_gain v_i + softmax_gain sum_j P_ij v_j - center_gain sum_j A0_ij v_j

    as in `shaped_attn.shaped_attention`, P being the attention matrix of the call and A0 what it is
    at zero logits. So does ``F.multi_head_attention_forward``, and hence ``nn.MultiheadAttention``
    and the layers of ``nn.Transformer``, whose fast paths are not taken. Nothing else is touched:
    no parameter, no state dict, no other module, and no other thread unless it runs ``module``.

    With ``identity_gain=0, center_gain=0, scale="standard"`` the module is what it was, up to
    rounding.

    Boolean masks, ``is_causal`` and grouped heads go to `shaped_attn.shaped_attention`. With
    ``dropout_p`` above 0, which acts on P alone, or a float mask b, with which A0 is softmax(b), P
    and A0 are each applied by torch's attention.

    The identity term needs a key at the position of each query. Calls with T queries and S other
    than T keys, as in cross-attention or with a key-value cache, are refused unless
    ``identity_gain`` is the number 0; so is an ``nn.MultiheadAttention`` whose query and key are
    not the same tensor. Cross-attention with T = S by ``F.scaled_dot_product_attention`` itself
    cannot be told from self-attention: replace the modules with self-attention alone.

    Only calls in a ``forward`` count, of the module or a submodule. A copy of a replaced module is
    replaced too; to pickle it, undo first. Submodules may be checkpointed, functions are refused.

    Args:
        module: any nn.Module, itself not inside of what is replaced already.
        identity_gain: a finite number, or a floating Tensor of shape () or (H,), which gets a
            gradient; a parameter of the module stays one. Default 1.0.
        softmax_gain, center_gain: the same. Default 1.0.
        scale: "width" (the default) is 1 / (D sqrt(H)) for H heads of D columns, as in
            `shaped_attn.shaped_attention`; "standard" is what the call asks for, 1 / sqrt(D) unless
            it says otherwise; a number is the scale itself.
        impl: as in `shaped_attn.shaped_attention`. Default "auto".

    Returns:
        A `ReplacedSdpa`: ``undo()`` ends the replacement, and so does leaving ``with``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range; the module is
            replaced already, is TorchScript, has nothing that attends, or a layer of timm that
            computes attention by itself. A call in the forward that cannot be shaped raises there:
            ``need_weights=True``, and the cases above.

    Example:
        >>> import torch
        >>> from shaped_attn.integrations.torch import replace_sdpa
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2).eval()
        >>> with replace_sdpa(encoder, scale="standard"):
        ...     out = encoder(torch.randn(2, 10, 64))
    """
    if not isinstance(module, nn.Module):
        fail(TypeError, "module", "must be an nn.Module", type(module).__name__, "Pass a model.")
    mode = _Mode(_Attention(identity_gain, softmax_gain, center_gain, scale, impl))
    made: dict[type[nn.Module], type[nn.Module]] = {}
    classes = {}
    for name, part in module.named_modules():
        _check_part(f"module.{name}" if name else "module", part)
        kind = type(part)
        # All that may attend, not the module alone: what is checkpointed is computed again in the
        # backward, outside of the forward of what is above it.
        if _may_attend(kind):
            if kind not in made:
                made[kind] = _subclass(kind, mode)
            classes[part] = made[kind]
    if not classes:
        got = f"a {type(module).__name__} of torch's other layers alone"
        remedy = "Pass the model that has the attention."
        rule = "must have a part that can call F.scaled_dot_product_attention"
        fail(ValueError, "module", rule, got, remedy)
    return ReplacedSdpa(module, classes)


def replacing_sdpa(
    kind: type[nn.Module],
    *,
    identity_gain: Gain = 1.0,
    softmax_gain: Gain = 1.0,
    center_gain: Gain = 1.0,
    scale: str | float = "width",
    impl: str = "auto",
) -> type[nn.Module]:
    """Return a subclass of a module's class in whose forward attention is shaped.

    Args:
        kind: the class.
        identity_gain, softmax_gain, center_gain, scale, impl: as in `replace_sdpa`. All instances
            share their Tensors.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range; the class is
            a replacement already.

    Example:
        timm takes it for its own layer:

            from timm.layers import Attention
            from timm.models import VisionTransformer

            model = VisionTransformer(attn_layer=replacing_sdpa(Attention))
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        fail(TypeError, "kind", "must be a class of nn.Module", repr(kind), "Pass a class.")
    if issubclass(kind, _Replacing):
        fail(ValueError, "kind", "must not be replaced already", kind, "Pass the original class.")
    attention = _Attention(identity_gain, softmax_gain, center_gain, scale, impl)
    return _subclass(kind, _Mode(attention))


def _may_attend(kind: type[nn.Module]) -> bool:
    if issubclass(kind, torch._dynamo.OptimizedModule):
        return False  # a wrapper, whose inner module does
    is_plain = kind.__module__.startswith("torch.nn.modules.")
    attends = kind is nn.MultiheadAttention or kind.__module__ == nn.Transformer.__module__
    return attends or not is_plain


class _Replacing:
    """Marks a class that `_subclass` has made."""


def _subclass(kind: type[nn.Module], mode: _Mode) -> type[nn.Module]:
    original = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _check_fused("module", self)
        if isinstance(self, nn.MultiheadAttention):
            mode.attention.check_self_attention(*args, **kwargs)
        # Once is enough; what is compiled does not pay for more.
        if not torch.compiler.is_compiling() and mode in _get_current_function_mode_stack():
            return original(self, *args, **kwargs)
        with mode:
            return original(self, *args, **kwargs)

    # Tools such as the wrapping of FSDP find layers by the names of their classes.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    return types.new_class(kind.__name__, (_Replacing, kind), exec_body=lambda ns: ns.update(names))


def _check_part(name: str, part: nn.Module) -> None:
    kind = type(part).__name__
    if isinstance(part, _Replacing):
        rule = "must not be inside of a replacement already"
        fail(ValueError, name, rule, kind, "Undo that one first.")
    if isinstance(part, torch.jit.ScriptModule):
        rule = "must not be TorchScript, whose calls cannot be replaced"
        fail(ValueError, name, rule, kind, "Replace before scripting, or do not.")
    if "forward" in vars(part) and not isinstance(part, torch._dynamo.OptimizedModule):
        rule = "must have the forward of its class"
        got = "one of its own, such as a hook of accelerate puts there"
        fail(ValueError, name, rule, got, "Replace before that is put there.")
    _check_fused(name, part)


def _check_fused(name: str, part: nn.Module) -> None:
    # timm's flag: without it a layer multiplies the matrices itself.
    if getattr(part, "fused_attn", None) is False:
        got = f"a {type(part).__name__} with fused_attn=False"
        remedy = "Set fused_attn=True on it, or call timm.layers.set_fused_attn() before making it."
        fail(ValueError, name, "must call F.scaled_dot_product_attention", got, remedy)


def _check_recomputation() -> None:
    """Refuse a call that a checkpoint would repeat without the forward that replaces it."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if frame.f_globals is globals() and code.co_name == "forward":
            return
        if code.co_filename == checkpoint.__code__.co_filename:
            rule = "must be given a module, where attention is replaced"
            got = "a function that calls F.scaled_dot_product_attention"
            remedy = "Checkpoint the module around it, or switch checkpointing off."
            fail(ValueError, "torch.utils.checkpoint", rule, got, remedy)
        frame = frame.f_back


class _Mode(TorchFunctionMode):
    """Changes attention functions where it is active, which is in one thread."""

    def __init__(self, attention: _Attention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REPLACED:
            if not torch.compiler.is_compiling():
                _check_recomputation()
            # Not what calls itself in turn: the same mode may be there once more.
            with torch._C.DisableTorchFunction():
                if func is F.scaled_dot_product_attention:
                    return self.attention(*args, **kwargs)
                return self.attention.multi_head(*args, **kwargs)
        if func in _FUSED:
            rule = "must not call torch's fused layers, which cannot be shaped"
            remedy = "Use nn.MultiheadAttention or F.scaled_dot_product_attention."
            fail(ValueError, "module", rule, func.__name__, remedy)
        name = getattr(func, "__name__", "")
        if name in _TENSOR_METHODS and func is getattr(Tensor, name):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Attention:
    """What takes the place of ``F.scaled_dot_product_attention``."""

    identity_gain: Gain = 1.0
    softmax_gain: Gain = 1.0
    center_gain: Gain = 1.0
    scale: str | float = "width"
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("identity_gain", "softmax_gain", "center_gain"):
            gain = getattr(self, name)
            if not isinstance(gain, Tensor):
                object.__setattr__(self, name, check_number(name, gain))
        object.__setattr__(self, "scale", check_choice_or_number("scale", self.scale, _SCALES))
        check_choice("impl", self.impl, IMPLEMENTATIONS)
        # Here, as Dynamo makes no functions.
        object.__setattr__(self, "multi_head_function", _multi_head_attention(self))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal and attn_mask is not None:
            rule = "must be None for is_causal=True"
            fail(ValueError, "attn_mask", rule, "both", "Leave one out.")
        self._check_heads(query)
        self._check_identity(query, key)
        if not enable_gqa:
            query, key, value = _broadcast(query, key, value)
        scale = self._scale(query, scale)
        is_float = attn_mask is not None and attn_mask.dtype != torch.bool
        if dropout_p > 0.0 or is_float:
            options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return self._by_torch(query, key, value, attn_mask, dropout_p, options)
        lead, sizes = query.shape[:-3], query.shape[-2:-1] + value.shape[-1:]
        if len(lead) > 1 and attn_mask is not None and attn_mask.ndim > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
        heads = query.shape[-3:-2]
        out = shaped_attention(
            *(_four_dimensions(x) for x in (query, key, value)),
            identity_gain=self.identity_gain,
            softmax_gain=self.softmax_gain,
            center_gain=self.center_gain,
            scale=scale,
            is_causal=is_causal,
            q_offset=0,  # query i sees keys up to i, whatever their number
            attn_mask=attn_mask,
            impl=self.impl,
        )
        return out.reshape(*lead, *heads, *sizes)

    def multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of ``F.multi_head_attention_forward``."""
        given = dict(zip(_MULTI_HEAD_NAMES, args, strict=False)) | kwargs
        if given.get("need_weights", True):
            rule = "must be False: the weights of shaped attention are not computed"
            remedy = "Call the attention with need_weights=False."
            fail(ValueError, "need_weights", rule, True, remedy)
        return self.multi_head_function(*args, **kwargs)

    def check_self_attention(
        self, query: Tensor, key: Tensor, *args: object, **kwargs: object
    ) -> None:
        """Check what only the arguments of an ``nn.MultiheadAttention`` tell."""
        if self._has_identity() and query is not key:
            rule = "must be 0 for cross-attention, which has no key at the position of a query"
            got = f"{self.identity_gain} and a query that is not the key"
            fail(ValueError, "identity_gain", rule, got, f"{_NO_IDENTITY}.")

    def _has_identity(self) -> bool:
        return isinstance(self.identity_gain, Tensor) or self.identity_gain != 0.0

    def _check_heads(self, query: Tensor) -> None:
        gains = (self.identity_gain, self.softmax_gain, self.center_gain)
        if query.ndim >= 4:
            return
        if self.scale == "width" or any(isinstance(x, Tensor) and x.ndim > 0 for x in gains):
            rule = 'must have shape (..., H, T, D) for scale="width" and gains per head'
            remedy = 'Pass scale="standard" or a number, and gains that all heads share.'
            fail(ValueError, "query", rule, f"shape {tuple(query.shape)}", remedy)

    def _check_identity(self, query: Tensor, key: Tensor) -> None:
        if self._has_identity() and query.shape[-2] != key.shape[-2]:
            rule = "must be 0 where queries and keys are not the same tokens"
            sizes = f"with {query.shape[-2]} queries and {key.shape[-2]} keys"
            remedy = f"{_NO_IDENTITY}; call a model with a key-value cache without it."
            fail(ValueError, "identity_gain", rule, f"{self.identity_gain}, {sizes}", remedy)

    def _scale(self, query: Tensor, asked: float | None) -> float:
        if self.scale == "width":
            return 1.0 / (query.shape[-1] * math.sqrt(query.shape[-3]))
        if self.scale != "standard":
            return self.scale
        return 1.0 / math.sqrt(query.shape[-1]) if asked is None else asked

    def _by_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Compute the terms one by one, where one pass has no way to drop or to add to logits."""
        sdpa = F.scaled_dot_product_attention
        out = sdpa(query, key, value, attn_mask, dropout_p, **options)
        dtype, wide = out.dtype, torch.promote_types(out.dtype, torch.float32)
        out = _per_head(self.softmax_gain) * out.to(wide)
        if isinstance(self.center_gain, Tensor) or self.center_gain != 0.0:
            center = sdpa(torch.zeros_like(query), key, value, attn_mask, **options)
            out = out - _per_head(self.center_gain) * center.to(wide)
        if self._has_identity():
            own = value.to(dtype).to(wide)
            groups = query.shape[-3] // value.shape[-3] if value.ndim > 2 else 1
            own = own if groups == 1 else own.repeat_interleave(groups, dim=-3)
            out = out + _per_head(self.identity_gain) * own
        return out.to(dtype)


_MULTI_HEAD_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _multi_head_attention(attention: _Attention) -> Callable:
    """Return torch's function with another attention in it.

    It calls nothing but what its globals name, and under a mode it would call itself without end.
    """
    original = F.multi_head_attention_forward
    names = dict(vars(F))
    # Dynamo would look the names up in the module that this one names.
    del names["__name__"]
    names["scaled_dot_product_attention"] = attention
    names["has_torch_function"] = lambda _: False
    names["_check_key_padding_mask"] = lambda *_: None  # torch 2.11 cannot compile it here
    made = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give all the same leading dimensions, as torch does without ``enable_gqa``."""
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
    return tuple(x.expand(*lead, *x.shape[-2:]) for x in tensors)


def _four_dimensions(x: Tensor) -> Tensor:
    """(..., H, T, D) to (B, H, T, D)."""
    return x[(None,) * (4 - x.ndim)] if x.ndim <= 4 else x.flatten(0, -4)


def _per_head(gain: Gain) -> Gain:
    return gain[:, None, None] if isinstance(gain, Tensor) and gain.ndim == 1 else gain
