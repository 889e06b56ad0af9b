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

from .arguments import Gain, Gains, is_zero
from .checks import check_choice, check_flag, describe, fail
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
            fail(TypeError, name, "must be a torch.Tensor", type(x).__name__, "Pass a tensor.")
    check_flag("is_causal", visibility.is_causal)
    q_offset = visibility.q_offset
    if q_offset is not None and (
        isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt))
    ):
        remedy = "Pass the key position of the first query as a Python int; None means S - T."
        fail(TypeError, "q_offset", "must be an int or None", describe(q_offset), remedy)
    for name in ("key_start", "key_end"):
        bound = getattr(visibility, name)
        if bound is not None and not isinstance(bound, Tensor):
            rule = "must be a Tensor of shape (B,) or None"
            remedy = "Pass torch.tensor([...], device=q.device) with one key index per batch entry."
            fail(TypeError, name, rule, describe(bound), remedy)
    mask = visibility.attn_mask
    if mask is not None and not isinstance(mask, Tensor):
        remedy = "Pass a tensor that is True where a query sees a key."
        rule = "must be a bool Tensor or None"
        fail(TypeError, "attn_mask", rule, type(mask).__name__, remedy)
    return Gains(*map(_as_float_or_tensor, GAIN_NAMES, gains))


def check_tensors(q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None) -> None:
    """Check that the main arguments are dense, of rank 4 and of a floating dtype."""
    for name, x in (("q", q), ("k", k), ("v", v), ("residual", residual)):
        if x is None:
            continue
        if x.layout != torch.strided or x.is_nested:
            got = "a nested tensor" if x.is_nested else x.layout
            remedy = "Pad it to a dense tensor and give key_start and key_end."
            fail(TypeError, name, "must be a dense (strided) tensor", got, remedy)
        if x.dtype not in INPUT_DTYPES:
            rule = "must be float16, bfloat16, float32 or float64"
            remedy = f"Convert it, for example with {name}.to(torch.float32)."
            fail(TypeError, name, rule, x.dtype, remedy)
        if x.ndim != 4:
            rule = f"must have the 4 dimensions {_LAYOUT[name]}"
            remedy = "Add or merge dimensions; a single sequence of one head is (1, 1, T, D)."
            fail(ValueError, name, rule, f"shape {tuple(x.shape)}", remedy)


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
    if not is_zero(gains.identity):
        name = "identity_gain other than 0.0"
        remedy = "Set identity_gain=0.0, or choose q_offset between 0 and S - T."
        check_own_keys(name, remedy, q, k, visibility.q_offset, gains.identity)
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
            got, remedy = f"shape {tuple(x.shape)}", "Only the batch size, T and S may be 0."
            fail(ValueError, name, f"must have at least one {what}", got, remedy)
    if k.shape[0] != batch or v.shape[0] != batch:
        got = f"shapes {tuple(k.shape)} and {tuple(v.shape)}"
        remedy = "Expand them to it; the batch dimension does not broadcast."
        fail(ValueError, "k and v", f"must have the batch size of q, {batch}", got, remedy)
    if v.shape[1] != kv_heads or v.shape[2] != keys:
        rule = f"must have the heads and keys of k, (B, {kv_heads}, {keys}, Dv)"
        remedy = "Give each key exactly one value per head."
        fail(ValueError, "v", rule, f"shape {tuple(v.shape)}", remedy)
    if k.shape[3] != head_dim:
        rule = f"must have the head dimension of q, {head_dim}"
        remedy = "Project q and k to the same head dimension."
        fail(ValueError, "k", rule, f"shape {tuple(k.shape)}", remedy)
    if heads % kv_heads != 0:
        rule = f"must have a number of heads that divides that of q, {heads}"
        remedy = "Use as many as query heads, or a divisor of their number (grouped-query heads)."
        fail(ValueError, "k", rule, f"{kv_heads} heads", remedy)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            remedy = f"Convert it with {name}.to(q.dtype), or run under torch.autocast."
            fail(TypeError, name, f"must have the dtype of q, {q.dtype}", x.dtype, remedy)
        check_device(name, x, q)
    if residual is None:
        return
    if tuple(residual.shape) != (batch, heads, queries, value_dim):
        rule = f"must have the shape of the output, ({batch}, {heads}, {queries}, {value_dim})"
        remedy = "Reshape or expand it to (B, H, T, Dv)."
        fail(ValueError, "residual", rule, f"shape {tuple(residual.shape)}", remedy)
    if torch.promote_types(q.dtype, residual.dtype) != residual.dtype:
        rule = f"must have the dtype of q, {q.dtype}, or one that holds all its values"
        remedy = "Convert it with residual.to(q.dtype) or residual.float()."
        fail(TypeError, "residual", rule, residual.dtype, remedy)
    check_device("residual", residual, q)


def check_gain(name: str, gain: Gain, q: Tensor) -> None:
    """Check one gain, or the scale: a finite number, or a Tensor of shape () or (H,)."""
    if not isinstance(gain, Tensor):
        # Not math.isfinite, which torch.compile cannot trace for a float that varies between calls.
        if not -math.inf < gain < math.inf:
            fail(ValueError, name, "must be finite", gain, "Pass a finite number.")
        return
    heads = q.shape[1]
    if not gain.is_floating_point():
        rule, remedy = "as a Tensor must have a floating dtype", f"Convert it with {name}.float()."
        fail(TypeError, name, rule, gain.dtype, remedy)
    if gain.ndim > 1 or (gain.ndim == 1 and gain.shape[0] != heads):
        rule = f"as a Tensor must have shape () or (H,) = ({heads},)"
        remedy = "Give one value, or one value per query head."
        fail(ValueError, name, rule, f"shape {tuple(gain.shape)}", remedy)
    check_device(name, gain, q)


def _as_float_or_tensor(name: str, gain: object) -> Gain | None:
    if isinstance(gain, (Tensor, float)) or (gain is None and name == "scale"):
        return gain
    # bool is an int to Python; here it is a mistake, such as an argument in the wrong place.
    if isinstance(gain, bool) or not isinstance(gain, Real):
        rule = "must be a number or a Tensor of shape () or (H,)"
        fail(TypeError, name, rule, describe(gain), "Pass a float, or a Tensor to learn it.")
    return float(gain)


def check_residual_gain(skip_gain: Gain, residual: Tensor | None) -> None:
    """Check that a skip gain has a residual to act on."""
    if residual is None and (isinstance(skip_gain, Tensor) or skip_gain != 1.0):
        rule = "acts on residual, which is None, so it must keep its default 1.0"
        remedy = "Pass residual, or leave skip_gain out."
        fail(ValueError, "skip_gain", rule, describe(skip_gain), remedy)


def check_own_keys(
    argument: str, remedy: str, q: Tensor, k: Tensor, q_offset: int, gain: Gain | None = None
) -> None:
    """Check that every query has a key at its own position, as ``argument``, a gain, needs."""
    queries, keys = q.shape[2], k.shape[2]
    if queries > 0 and (q_offset < 0 or q_offset + queries > keys):
        rule = (
            f"needs a key at the position of every query, 0 <= q_offset + i < S = {keys} for i < T "
            f"= {queries}"
        )
        got = f"queries at {q_offset} to {q_offset + queries - 1}"
        got = got if gain is None else f"{describe(gain)} with {got}"
        fail(ValueError, argument, rule, got, remedy)


def check_key_range(name: str, bound: Tensor | None, q: Tensor) -> None:
    """Check ``key_start`` or ``key_end``."""
    if bound is None:
        return
    if bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool:
        remedy = f"Convert it with {name}.to(torch.int32); a bool mask of keys goes to attn_mask."
        fail(TypeError, name, "must have an integer dtype", bound.dtype, remedy)
    if bound.ndim != 1 or bound.shape[0] != q.shape[0]:
        rule, got = f"must have shape (B,) = ({q.shape[0]},)", f"shape {tuple(bound.shape)}"
        fail(ValueError, name, rule, got, "Give one key index per batch entry.")
    check_device(name, bound, q)


def check_attn_mask(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Check the mask, which broadcasts to (B, H, T, S)."""
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool:
        rule = "must have dtype torch.bool, True where a query sees a key"
        remedy = (
            "Convert a mask of 0 and 1 with attn_mask.bool(), and one that holds nothing but 0 and "
            "-inf with attn_mask == 0. An additive bias b is no mask but the log of a prior: pass "
            "prior=b - b.logsumexp(-1, keepdim=True), with b -inf at the keys that a query does "
            "not see and broadcastable to (H, T, S). The softmax is then that of the logits plus "
            "b, and the centre has the weights softmax(b) in place of a mean."
        )
        fail(TypeError, "attn_mask", rule, attn_mask.dtype, remedy)
    target = (*q.shape[:3], k.shape[2])
    shape = tuple(attn_mask.shape)
    if not broadcasts(shape, target):
        rule = f"must broadcast to (B, H, T, S) = {target}"
        remedy = (
            "Add dimensions of size 1; a mask of keys per batch entry is mask[:, None, None, :]."
        )
        fail(ValueError, "attn_mask", rule, f"shape {shape}", remedy)
    check_device("attn_mask", attn_mask, q)


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another, which does not change."""
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(shape[::-1], target[::-1], strict=False)
    )


def resolve_impl(impl: str, q: Tensor) -> str:
    """Return the implementation to run, "triton", "torch" or "reference", if the device has it."""
    check_choice("impl", impl, IMPLEMENTATIONS)
    device = q.device.type
    if impl == "auto":
        impl = "triton" if device == "cuda" else "torch"
    if impl == "triton" and device != "cuda" and not is_interpreted():
        remedy = (
            "Move the tensors to a GPU, pass impl='torch', or set TRITON_INTERPRET=1 before the "
            "first import of shaped_attn.kernels to run the kernels in Triton's interpreter."
        )
        rule = "'triton' needs tensors on a GPU"
        fail(ValueError, "impl", rule, f"q on {q.device}", remedy)
    return impl


def check_kernel_limits(q: Tensor, v: Tensor, residual: Tensor | None) -> None:
    """Check that the Triton kernels take these dtypes and head dimensions."""
    where = "for impl='triton', the default on a GPU"
    for name, x in (("q", q), ("residual", residual)):
        if x is not None and x.dtype == torch.float64:
            rule = f"must be float16, bfloat16 or float32 {where}"
            remedy = f"Convert it with {name}.float(), or pass impl='torch'."
            fail(TypeError, name, rule, x.dtype, remedy)
    for name, x, size in (("q", q, "D"), ("v", v, "Dv")):
        if x.shape[3] > MAX_HEAD_DIM:
            rule = f"must have a head dimension {size} of at most {MAX_HEAD_DIM} {where}"
            got, remedy = f"{size} = {x.shape[3]}", "Use more heads, or pass impl='torch'."
            fail(ValueError, name, rule, got, remedy)


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


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """Check that ``x`` is where ``q`` is."""
    if x.device != q.device:
        rule = f"must be on the device of q, {q.device}"
        fail(ValueError, name, rule, x.device, f"Move it with {name}.to(q.device).")
