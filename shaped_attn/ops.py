"""`torch.ops.shaped_attn`: schemas, implementations, fakes, autograd and flop formulas.

The operator runs the Triton kernels on a GPU, and on a CPU under `TRITON_INTERPRET=1`. On a CPU
without the interpreter it runs `composite`, recomputing it in the backward. Triton is imported at
the first call, not here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import composite, validation
from .arguments import Gain, Gains, accumulation_dtype, output_dtype
from .priors import PriorTable, check_learnable, check_table

NAMESPACE = "shaped_attn"

_INPUTS = 14
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? residual=None"
_GAINS = ", ".join(f"Tensor? {name}=None" for name in validation.GAIN_NAMES)
_VISIBILITY = "Tensor? attn_mask=None, Tensor? key_start=None, Tensor? key_end=None"
_PRIOR = "Tensor? prior=None"
_FIXED = ", ".join(f"float fixed_{name}=1.0" for name in validation.GAIN_NAMES[:5])
_OPTIONS = (
    f"{_FIXED}, float? fixed_scale=None, bool is_causal=False, SymInt? q_offset=None,"
    ' str prior_form="dense"'
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    f"attention({_TENSORS}, {_GAINS}, {_VISIBILITY}, {_PRIOR}, *, {_OPTIONS},"
    " bool save_for_backward=True)"
    " -> (Tensor out, Tensor lse, Tensor excess, Tensor center, Tensor row_stats)"
)
_library.define(
    f"attention_backward(Tensor? d_out, Tensor? d_lse, {_TENSORS}, {_GAINS}, {_VISIBILITY},"
    f" {_PRIOR}, Tensor? excess=None, Tensor? center=None, Tensor? row_stats=None, *, {_OPTIONS},"
    " bool needs_residual=False, bool needs_gains=False, bool needs_scale=False,"
    " bool needs_prior=False) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_residual,"
    " Tensor d_gains, Tensor d_scale, Tensor d_prior)"
)


def _uses_kernels(q: Tensor) -> bool:
    return q.device.type != "cpu" or validation.is_interpreted()


def _merge(gains: tuple[Tensor | None, ...], fixed: tuple[float | None, ...]) -> Gains:
    """Take the fixed value of each gain that is not a Tensor."""
    return Gains(*(f if t is None else t for t, f in zip(gains, fixed, strict=True)))


def _saved_shapes(q: Tensor, v: Tensor, is_weighed: bool, is_centered: bool, saves: bool):
    """Shapes of excess, center and row_stats, which only the kernels keep."""
    if not (saves and _uses_kernels(q)):
        return (0,), (0,), (0,)
    from .kernels.configs import padded_width

    rows = tuple(q.shape[:3])
    value_rows = (*rows, padded_width(v.shape[3]))
    return value_rows, value_rows if is_weighed and is_centered else (0,), (3, *rows)


def _prior_options(table: PriorTable | None, q: Tensor, k: Tensor, q_offset: int) -> dict:
    """Arguments of the kernels for a prior."""
    if table is None:
        return {}
    from .kernels.priors import PRIORS, prior_parameters

    sizes = (q.shape[1], q.shape[2], k.shape[2], q_offset)
    return {
        "prior": PRIORS[table.form],
        "prior_parameters": prior_parameters(table.form, table.values, *sizes),
    }


def _attention(
    q,
    k,
    v,
    residual=None,
    identity_gain=None,
    softmax_gain=None,
    center_gain=None,
    skip_gain=None,
    branch_gain=None,
    scale=None,
    attn_mask=None,
    key_start=None,
    key_end=None,
    prior=None,
    *,
    fixed_identity_gain=1.0,
    fixed_softmax_gain=1.0,
    fixed_center_gain=1.0,
    fixed_skip_gain=1.0,
    fixed_branch_gain=1.0,
    fixed_scale=None,
    is_causal=False,
    q_offset=None,
    prior_form="dense",
    save_for_backward=True,
):
    validation.check_tensors(q, k, v, residual)
    gains, q_offset, attn_mask = validation.check_call(
        q,
        k,
        v,
        residual,
        _merge(
            (identity_gain, softmax_gain, center_gain, skip_gain, branch_gain, scale),
            (
                fixed_identity_gain,
                fixed_softmax_gain,
                fixed_center_gain,
                fixed_skip_gain,
                fixed_branch_gain,
                fixed_scale,
            ),
        ),
        q_offset=q_offset,
        key_start=key_start,
        key_end=key_end,
        attn_mask=attn_mask,
    )
    options = {
        "is_causal": is_causal,
        "q_offset": q_offset,
        "key_start": key_start,
        "key_end": key_end,
        "attn_mask": attn_mask,
    }
    table = None if prior is None else check_table(PriorTable(prior_form, prior), q, k)
    if _uses_kernels(q):
        validation.resolve_impl("triton", q, v, residual)
        from .kernels.attention_fwd import attention_fwd

        options |= _prior_options(table, q, k, q_offset)
        return tuple(
            attention_fwd(
                q, k, v, residual, tuple(gains), **options, save_for_backward=save_for_backward
            )
        )
    with torch.no_grad():
        out, lse = composite.attention(
            q, k, v, residual, gains, **options, prior=table, return_lse=True
        )
    float32 = torch.float32
    return (
        out.contiguous(),
        lse.contiguous(),
        q.new_empty(0),
        q.new_empty(0, dtype=float32),
        q.new_empty(0, dtype=float32),
    )


def _attention_fake(
    q, k, v, residual=None, *tensors, fixed_center_gain=1.0, save_for_backward=True, **options
):
    center_gain = _argument(tensors, 2)
    attn_mask = _argument(tensors, 6)
    excess, center, row_stats = _saved_shapes(
        q,
        v,
        attn_mask is not None or _argument(tensors, 9) is not None,
        center_gain is not None or fixed_center_gain != 0.0,
        save_for_backward,
    )
    rows = q.shape[:3]
    return (
        q.new_empty((*rows, v.shape[3]), dtype=output_dtype(q, residual)),
        q.new_empty(rows, dtype=accumulation_dtype(q.dtype)),
        q.new_empty(excess),
        q.new_empty(center, dtype=torch.float32),
        q.new_empty(row_stats, dtype=torch.float32),
    )


def _argument(tensors: tuple, position: int):
    """Optional argument after `residual`, None where the dispatcher dropped a trailing default."""
    return tensors[position] if position < len(tensors) else None


def _attention_backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    residual=None,
    identity_gain=None,
    softmax_gain=None,
    center_gain=None,
    skip_gain=None,
    branch_gain=None,
    scale=None,
    attn_mask=None,
    key_start=None,
    key_end=None,
    prior=None,
    excess=None,
    center=None,
    row_stats=None,
    *,
    fixed_identity_gain=1.0,
    fixed_softmax_gain=1.0,
    fixed_center_gain=1.0,
    fixed_skip_gain=1.0,
    fixed_branch_gain=1.0,
    fixed_scale=None,
    is_causal=False,
    q_offset=None,
    prior_form="dense",
    needs_residual=False,
    needs_gains=False,
    needs_scale=False,
    needs_prior=False,
):
    gains, q_offset, attn_mask = validation.check_call(
        q,
        k,
        v,
        residual,
        _merge(
            (identity_gain, softmax_gain, center_gain, skip_gain, branch_gain, scale),
            (
                fixed_identity_gain,
                fixed_softmax_gain,
                fixed_center_gain,
                fixed_skip_gain,
                fixed_branch_gain,
                fixed_scale,
            ),
        ),
        q_offset=q_offset,
        key_start=key_start,
        key_end=key_end,
        attn_mask=attn_mask,
    )
    options = {
        "is_causal": is_causal,
        "q_offset": q_offset,
        "key_start": key_start,
        "key_end": key_end,
        "attn_mask": attn_mask,
    }
    if d_out is None:
        shape = (*q.shape[:3], v.shape[3])
        d_out = q.new_zeros((), dtype=output_dtype(q, residual)).expand(shape)
    needs = {
        "needs_residual": needs_residual,
        "needs_gains": needs_gains,
        "needs_scale": needs_scale,
        "needs_prior": needs_prior,
    }
    table = None if prior is None else PriorTable(prior_form, prior)
    if _uses_kernels(q):
        from .kernels.attention_bwd import attention_bwd
        from .kernels.attention_fwd import ForwardResult

        if needs_prior:
            check_learnable(table)
        options |= _prior_options(table, q, k, q_offset)
        saved = ForwardResult(q, q, excess, center, row_stats)
        grads = attention_bwd(
            d_out, d_lse, q, k, v, residual, tuple(gains), saved, **options, **needs
        )
    else:
        grads = _composite_backward(d_out, d_lse, q, k, v, residual, gains, table, options, **needs)
    if needs_prior:
        d_prior = grads[6]
        # A table that the heads share; a gradient of the composite has its shape already.
        d_prior = d_prior if d_prior.shape == prior.shape else d_prior.sum(0, keepdim=True)
        grads = (*grads[:6], d_prior.to(prior.dtype).contiguous())
    absent = (q.new_empty(0), *(q.new_empty(0, dtype=torch.float32) for _ in range(3)))
    return (
        *grads[:3],
        *(a if g is None else g for g, a in zip(grads[3:], absent, strict=True)),
    )


def _composite_backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    residual,
    gains,
    table,
    options,
    *,
    needs_residual,
    needs_gains,
    needs_scale,
    needs_prior,
):
    """Gradients of the composite on a CPU, from a second forward."""
    heads = q.shape[1]
    dtype = accumulation_dtype(q.dtype)
    with torch.enable_grad():
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        skip_input = residual
        if residual is not None:
            skip_input = residual.detach().requires_grad_(needs_residual)
        needed = [needs_gains] * 5 + [needs_scale]
        weights = [
            torch.as_tensor(gain, dtype=dtype).detach().expand(heads).clone().requires_grad_()
            if is_needed
            else gain
            for gain, is_needed in zip(gains, needed, strict=True)
        ]
        if needs_prior:
            table = PriorTable(table.form, table.values.detach().requires_grad_())
        out, lse = composite.attention(
            *tensors,
            skip_input,
            Gains(*weights),
            **options,
            prior=table,
            return_lse=d_lse is not None,
        )
        inputs = [*tensors]
        inputs += [skip_input] if needs_residual else []
        inputs += [w for w, is_needed in zip(weights, needed, strict=True) if is_needed]
        inputs += [table.values] if needs_prior else []
        outputs, cotangents = [out], [d_out]
        if d_lse is not None:
            outputs, cotangents = [out, lse], [d_out, d_lse]
        found = torch.autograd.grad(
            outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
        )
    found = [x.contiguous() for x in found]
    d_prior = found.pop() if needs_prior else None
    d_scale = found.pop().float() if needs_scale else None
    d_gains = torch.stack(found[-5:]).float() if needs_gains else None
    d_residual = found[3] if needs_residual else None
    return (*found[:3], d_residual, d_gains, d_scale, d_prior)


def _attention_backward_fake(
    d_out,
    d_lse,
    q,
    k,
    v,
    residual=None,
    *tensors,
    needs_residual=False,
    needs_gains=False,
    needs_scale=False,
    needs_prior=False,
    **options,
):
    heads = q.shape[1]
    prior = _argument(tensors, 9)
    out_shape = (*q.shape[:3], v.shape[3])
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(out_shape, dtype=output_dtype(q, residual))
        if needs_residual
        else q.new_empty(0),
        q.new_empty((5, heads) if needs_gains else 0, dtype=torch.float32),
        q.new_empty(heads if needs_scale else 0, dtype=torch.float32),
        prior.new_empty(prior.shape) if needs_prior else q.new_empty(0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    _, _, excess, center, row_stats = output
    ctx.mark_non_differentiable(excess, center, row_stats)
    ctx.set_materialize_grads(False)
    # The dispatcher drops trailing arguments that equal their default.
    absent = (None,) * (_INPUTS - len(inputs))
    ctx.save_for_backward(*inputs, *absent, excess, center, row_stats)
    ctx.options = dict(keyword_only_inputs)


def _autograd(ctx, d_out, d_lse, *_):
    options = dict(ctx.options)
    given = len(ctx.needs_input_grad)
    needs = (*ctx.needs_input_grad, *(False,) * (_INPUTS - given))
    if d_out is None and d_lse is None:
        return (None,) * given
    if not options.pop("save_for_backward"):
        raise RuntimeError(
            "save_for_backward must be True to differentiate shaped_attn.attention, got False. "
            "Leave it at its default, or call the operator under torch.no_grad()."
        )
    *inputs, excess, center, row_stats = ctx.saved_tensors
    with torch.no_grad():
        d_q, d_k, d_v, d_residual, d_gains, d_scale, d_prior = _backward_op(
            d_out,
            d_lse,
            *inputs,
            excess,
            center,
            row_stats,
            **options,
            needs_residual=needs[3],
            needs_gains=any(needs[4:9]),
            needs_scale=needs[9],
            needs_prior=needs[13],
        )
        gains = [
            _reduce_gain(d_gains[i] if i < 5 else d_scale, inputs[4 + i]) if needs[4 + i] else None
            for i in range(6)
        ]
    d_residual = d_residual if needs[3] else None
    d_prior = d_prior if needs[13] else None
    found = (d_q, d_k, d_v, d_residual, *gains, None, None, None, d_prior)
    if torch.is_grad_enabled():
        found = _RefuseSecondDerivative.apply(d_out, d_lse, *inputs, *found)
    return found[:given]


class _RefuseSecondDerivative(torch.autograd.Function):
    """Pass first derivatives through; differentiating them is an error, not a wrong number."""

    @staticmethod
    def forward(ctx, *arguments):
        return arguments[-_INPUTS:]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "torch.ops.shaped_attn.attention can be differentiated once, got a request for a "
            'second derivative. Use impl="reference", which autograd differentiates repeatedly.'
        )


def _reduce_gain(gradient: Tensor, gain: Tensor) -> Tensor:
    """Bring a gradient per head to the shape and dtype of its gain."""
    return (gradient.sum() if gain.ndim == 0 else gradient).to(gain.dtype)


for _name, _function, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

torch.library.register_autograd(
    f"{NAMESPACE}::attention", _autograd, setup_context=_setup_context, lib=_library
)


@register_flop_formula(torch.ops.shaped_attn.attention)
def _attention_flops(q_shape, k_shape, v_shape, *args, is_causal=False, out_shape=None, **kwargs):
    """Two products per visible pair: 2 B H T S (D + Dv), half of it if causal."""
    pairs = q_shape[0] * q_shape[1] * q_shape[2] * k_shape[2]
    flops = 2 * pairs * (q_shape[3] + v_shape[3])
    return flops // 2 if is_causal else flops


@register_flop_formula(torch.ops.shaped_attn.attention_backward)
def _attention_backward_flops(
    d_out_shape, d_lse_shape, q_shape, k_shape, v_shape, *args, is_causal=False, **kwargs
):
    """2.5 times the forward: the convention that published figures use."""
    return 5 * _attention_flops(q_shape, k_shape, v_shape, is_causal=is_causal) // 2


_attention_op = torch.ops.shaped_attn.attention.default
_backward_op = torch.ops.shaped_attn.attention_backward.default


def attention_from_gains(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gains: Gains,
    *,
    is_causal: bool,
    q_offset: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    attn_mask: Tensor | None,
    prior: PriorTable | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the operator with gains that are numbers or tensors; return `out` and `lse`."""
    fixed = {
        f"fixed_{name}": float(gain)
        for name, gain in zip(validation.GAIN_NAMES, gains, strict=True)
        if not isinstance(gain, Tensor)
    }
    tensors = [gain if isinstance(gain, Tensor) else None for gain in gains]
    values = None if prior is None else prior.values
    if values is not None:
        fixed["prior_form"] = prior.form
        if values.requires_grad and _uses_kernels(q):
            check_learnable(prior)
    needs_grad = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, residual, *gains, values)
    )
    out, lse, *_ = _attention_op(
        q,
        k,
        v,
        residual,
        *tensors,
        attn_mask,
        key_start,
        key_end,
        values,
        **fixed,
        is_causal=is_causal,
        q_offset=q_offset,
        save_for_backward=needs_grad,
    )
    return out, lse


__all__ = ["Gain", "attention_from_gains"]
