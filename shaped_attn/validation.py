"""Argument checks of :func:`shaped_attn.shaped_attention`.

Every message names the argument, the rule, the value given and the remedy. Nothing here reads the
values of a Tensor, so the checks neither wait for a device nor break a ``torch.compile`` graph.
TypeError is for a wrong Python type or dtype, ValueError for everything else.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .arguments import Gain, Gains
from .checks import check_choice, check_flag, describe
from .kernels.configs import MAX_HEAD_DIM
from .visibility import Visibility

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_types(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, gains: Gains, visibility: Visibility
) -> Gains:
    """Check the Python types, which is all that the schema of the operator cannot hold.

    Returns the gains, numbers among them as floats.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("residual", residual)):
        if not isinstance(x, Tensor) and not (x is None and name == "residual"):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(x).__name__}. Pass a tensor."
            )
    check_flag("is_causal", visibility.is_causal)
    q_offset = visibility.q_offset
    if q_offset is not None and (
        isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt))
    ):
        raise TypeError(
            f"q_offset must be an int or None, got {describe(q_offset)}. "
            "Pass the key position of the first query as a Python int; None means S - T."
        )
    for name in ("key_start", "key_end"):
        bound = getattr(visibility, name)
        if bound is not None and not isinstance(bound, Tensor):
            raise TypeError(
                f"{name} must be a Tensor of shape (B,) or None, got {describe(bound)}. "
                "Pass torch.tensor([...], device=q.device) with one key index per batch entry."
            )
    attn_mask = visibility.attn_mask
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"attn_mask must be a bool Tensor or None, got {type(attn_mask).__name__}. "
            "Pass a tensor that is True where a query sees a key."
        )
    return Gains(
        *(
            gain
            if isinstance(gain, (Tensor, float)) or (gain is None and name == "scale")
            else _as_float(name, gain)
            for name, gain in zip(GAIN_NAMES, gains, strict=True)
        )
    )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None) -> None:
    """Check that the main arguments are dense, of rank 4 and of a floating dtype."""
    for name, x in (("q", q), ("k", k), ("v", v), ("residual", residual)):
        if x is None:
            continue
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(
                f"{name} must be a dense (strided) tensor, got "
                f"{'a nested tensor' if x.is_nested else x.layout}. "
                "Pad it to a dense tensor and give key_start and key_end."
            )
        if x.dtype not in INPUT_DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}. "
                f"Convert it, for example with {name}.to(torch.float32)."
            )
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have the 4 dimensions {_LAYOUT[name]}, got shape {tuple(x.shape)}. "
                "Add or merge dimensions; a single sequence of one head is (1, 1, T, D)."
            )


GAIN_NAMES = ("identity_gain", "softmax_gain", "center_gain", "skip_gain", "branch_gain", "scale")
"""Names of the fields of `Gains` in the public interface."""


def check_call(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, gains: Gains, visibility: Visibility
) -> tuple[Gains, Visibility]:
    """Check values, and the arguments against each other, after `check_types`; then `complete`."""
    check_tensors(q, k, v, residual)
    check_shapes(q, k, v, residual)
    for name, gain in zip(GAIN_NAMES, gains, strict=True):
        if gain is not None:
            check_gain(name, gain, q)
    check_residual_gain(gains.skip, residual)
    check_key_range("key_start", visibility.key_start, q)
    check_key_range("key_end", visibility.key_end, q)
    check_attn_mask(visibility.attn_mask, q, k)
    gains, visibility = complete(q, k, gains, visibility)
    check_identity(gains.identity, q, k, visibility.q_offset)
    return gains, visibility


def complete(
    q: Tensor, k: Tensor, gains: Gains, visibility: Visibility
) -> tuple[Gains, Visibility]:
    """Fill in the default scale and q_offset; expand the mask to (B, H, T, S) without a copy."""
    if gains.scale is None:
        gains = gains._replace(scale=1.0 / (q.shape[3] * math.sqrt(q.shape[1])))
    is_causal, q_offset, key_start, key_end, attn_mask = visibility
    if q_offset is None:
        q_offset = k.shape[2] - q.shape[2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return gains, Visibility(is_causal, q_offset, key_start, key_end, attn_mask)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None) -> None:
    """Check sizes, dtypes and devices of the main arguments against each other."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    for name, x, axis, what in (
        ("q", q, 1, "head"),
        ("k", k, 1, "head"),
        ("q", q, 3, "channel (D)"),
        ("v", v, 3, "channel (Dv)"),
    ):
        if x.shape[axis] < 1:
            raise ValueError(
                f"{name} must have at least one {what}, got shape {tuple(x.shape)}. "
                "Only the batch size, T and S may be 0."
            )
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(
            f"k and v must have the batch size of q, {batch}, got shapes {tuple(k.shape)} and "
            f"{tuple(v.shape)}. Expand them to it; the batch dimension does not broadcast."
        )
    if v.shape[1] != kv_heads or v.shape[2] != keys:
        raise ValueError(
            f"v must have the heads and keys of k, (B, {kv_heads}, {keys}, Dv), got shape "
            f"{tuple(v.shape)}. Give each key exactly one value per head."
        )
    if k.shape[3] != head_dim:
        raise ValueError(
            f"k must have the head dimension of q, {head_dim}, got shape {tuple(k.shape)}. "
            "Project q and k to the same head dimension."
        )
    if heads % kv_heads != 0:
        raise ValueError(
            f"k must have a number of heads that divides that of q, {heads}, got {kv_heads} heads. "
            "Use as many key-value heads as query heads, or a divisor of it (grouped-query heads)."
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}. "
                f"Convert it with {name}.to(q.dtype), or run under torch.autocast."
            )
        _check_device(name, x, q)
    if residual is None:
        return
    if tuple(residual.shape) != (batch, heads, queries, value_dim):
        raise ValueError(
            f"residual must have the shape of the output, ({batch}, {heads}, {queries}, "
            f"{value_dim}), got shape {tuple(residual.shape)}. "
            "Reshape or expand it to (B, H, T, Dv)."
        )
    if torch.promote_types(q.dtype, residual.dtype) != residual.dtype:
        raise TypeError(
            f"residual must have the dtype of q, {q.dtype}, or one that holds all its values, got "
            f"{residual.dtype}. Convert it with residual.to(q.dtype) or residual.float()."
        )
    _check_device("residual", residual, q)


def check_gain(name: str, gain: Gain, q: Tensor) -> None:
    """Check one gain, or the scale: a finite number, or a Tensor of shape () or (H,)."""
    if not isinstance(gain, Tensor):
        # Not math.isfinite, which torch.compile cannot trace for a float that varies between calls.
        if not -math.inf < gain < math.inf:
            raise ValueError(f"{name} must be finite, got {gain}. Pass a finite number.")
        return
    heads = q.shape[1]
    if not gain.is_floating_point():
        raise TypeError(
            f"{name} as a Tensor must have a floating dtype, got {gain.dtype}. "
            f"Convert it with {name}.float()."
        )
    if gain.ndim > 1 or (gain.ndim == 1 and gain.shape[0] != heads):
        raise ValueError(
            f"{name} as a Tensor must have shape () or (H,) = ({heads},), got shape "
            f"{tuple(gain.shape)}. Give one value, or one value per query head."
        )
    _check_device(name, gain, q)


def _as_float(name: str, gain: object) -> float:
    # bool is an int to Python; here it is a mistake, such as an argument in the wrong place.
    if isinstance(gain, bool) or not isinstance(gain, (float, int, Real)):
        raise TypeError(
            f"{name} must be a number or a Tensor of shape () or (H,), got {describe(gain)}. "
            "Pass a float, or a Tensor to learn it."
        )
    return float(gain)


def check_residual_gain(skip_gain: Gain, residual: Tensor | None) -> None:
    """Check that a skip gain has a residual to act on."""
    if residual is None and (isinstance(skip_gain, Tensor) or skip_gain != 1.0):
        raise ValueError(
            "skip_gain acts on residual, which is None, so it must keep its default 1.0, got "
            f"{describe(skip_gain)}. Pass residual, or leave skip_gain out."
        )


def check_identity(identity_gain: Gain, q: Tensor, k: Tensor, q_offset: int) -> None:
    """Check that every query has a key at its own position if the identity term is in use."""
    if not isinstance(identity_gain, Tensor) and identity_gain == 0.0:
        return
    queries, keys = q.shape[2], k.shape[2]
    if queries == 0:
        return
    if q_offset < 0 or q_offset + queries > keys:
        raise ValueError(
            "identity_gain other than 0.0 needs a key at the position of every query, 0 <= "
            f"q_offset + i < S = {keys} for i < T = {queries}, got {describe(identity_gain)} with "
            f"queries at {q_offset} to {q_offset + queries - 1}. "
            "Set identity_gain=0.0, or choose q_offset between 0 and S - T."
        )


def check_key_range(name: str, bound: Tensor | None, q: Tensor) -> None:
    """Check ``key_start`` or ``key_end``."""
    if bound is None:
        return
    if bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool:
        raise TypeError(
            f"{name} must have an integer dtype, got {bound.dtype}. "
            f"Convert it with {name}.to(torch.int32); a bool mask of keys goes to attn_mask."
        )
    if bound.ndim != 1 or bound.shape[0] != q.shape[0]:
        raise ValueError(
            f"{name} must have shape (B,) = ({q.shape[0]},), got shape {tuple(bound.shape)}. "
            "Give one key index per batch entry."
        )
    _check_device(name, bound, q)


def check_attn_mask(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Check the mask, which broadcasts to (B, H, T, S)."""
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            "attn_mask must have dtype torch.bool, True where a query sees a key, got "
            f"{attn_mask.dtype}. "
            "Convert a mask of 0 and 1 with attn_mask.bool(), and one that holds nothing but 0 and "
            "-inf with attn_mask == 0. An additive bias b is no mask but the log of a prior: pass "
            "prior=b - b.logsumexp(-1, keepdim=True), with b -inf at the keys that a query does "
            "not see and broadcastable to (H, T, S). The softmax is then that of the logits plus "
            "b, and the centre has the weights softmax(b) in place of a mean."
        )
    batch, heads, queries, _ = q.shape
    target = (batch, heads, queries, k.shape[2])
    shape = tuple(attn_mask.shape)
    fits = len(shape) <= 4 and all(
        size == 1 or size == wanted
        for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to (B, H, T, S) = {target}, got shape "
            f"{tuple(attn_mask.shape)}. "
            "Add dimensions of size 1; a mask of keys per batch entry is mask[:, None, None, :]."
        )
    _check_device("attn_mask", attn_mask, q)


def resolve_impl(impl: str, q: Tensor) -> str:
    """Return the implementation to run, "triton", "torch" or "reference", if the device has it."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    device = q.device.type
    if impl == "auto":
        impl = "triton" if device == "cuda" else "torch"
    if impl == "triton" and device != "cuda" and not is_interpreted():
        raise ValueError(
            f"impl 'triton' needs tensors on a GPU, got q on {q.device}. "
            "Move the tensors to a GPU, pass impl='torch', or set TRITON_INTERPRET=1 before the "
            "first import of shaped_attn.kernels to run the kernels in Triton's interpreter."
        )
    return impl


def check_kernel_limits(q: Tensor, v: Tensor, residual: Tensor | None) -> None:
    """Check that the Triton kernels take these dtypes and head dimensions."""
    for name, x in (("q", q), ("residual", residual)):
        if x is not None and x.dtype == torch.float64:
            raise TypeError(
                f"{name} must be float16, bfloat16 or float32 for impl='triton', the default on a "
                f"GPU, got {x.dtype}. Convert it with {name}.float(), or pass impl='torch'."
            )
    for name, x, size in (("q", q, "D"), ("v", v, "Dv")):
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dimension {size} of at most {MAX_HEAD_DIM} for "
                f"impl='triton', the default on a GPU, got {size} = {x.shape[3]}. "
                "Use more heads, or pass impl='torch'."
            )


_LAYOUT = {
    "q": "(B, H, T, D)",
    "k": "(B, Hkv, S, D)",
    "v": "(B, Hkv, S, Dv)",
    "residual": "(B, H, T, Dv)",
}


def is_interpreted() -> bool:
    """Whether the Triton kernels run in Triton's interpreter, so that they take CPU tensors."""
    try:
        from .kernels.launch import is_interpreted
    except ImportError:  # no Triton
        return False
    return is_interpreted()


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(
            f"{name} must be on the device of q, {q.device}, got {x.device}. "
            f"Move it with {name}.to(q.device)."
        )
