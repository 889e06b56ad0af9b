"""`torch.ops.shaped_attn`: schemas, implementations, fakes, autograd and flop formulas.

The operator runs the Triton kernels on a GPU, and on a CPU under `TRITON_INTERPRET=1`. On a CPU
without the interpreter it runs `composite`, recomputing it in the backward. Triton is imported at
the first call, not here.

`torch.ops.shaped_attn.attention` takes the tensors of `Inputs`, then by keyword:

    fixed_identity_gain, fixed_softmax_gain, fixed_center_gain, fixed_skip_gain,
    fixed_branch_gain = 1.0,  fixed_scale = None    gains that are numbers: used without a tensor
    is_causal = False, q_offset = None, deterministic = True    as in `shaped_attention`
    prior_form = "dense"             how to read the prior: the form of its `PriorTable`
    save_for_backward = True         whether to return what `attention_backward` needs

and returns out, lse and three tensors for the backward. `shaped_attention` calls it, after checks
of what the schema cannot hold, and is the function to call.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import composite, validation
from .arguments import Gains, accumulation_dtype, is_zero, output_dtype
from .kernels.configs import padded_width
from .priors import PriorTable, check_learnable, check_table
from .visibility import Visibility

NAMESPACE = "shaped_attn"


class Inputs(NamedTuple):
    """The tensors of the operator, in the order of its schema.

    The dispatcher drops trailing ones that are None: ``Inputs(*tensors)`` puts them back.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor | None = None
    identity_gain: Tensor | None = None
    softmax_gain: Tensor | None = None
    center_gain: Tensor | None = None
    skip_gain: Tensor | None = None
    branch_gain: Tensor | None = None
    scale: Tensor | None = None
    attn_mask: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    prior: Tensor | None = None


_COUNT = len(Inputs._fields)
_GAINS = slice(Inputs._fields.index("identity_gain"), Inputs._fields.index("scale") + 1)
_FIXED_GAINS = tuple(f"fixed_{name}" for name in validation.GAIN_NAMES)
_NEEDS = ("needs_residual", "needs_gains", "needs_scale", "needs_prior")
_TENSORS = ", ".join(
    f"Tensor? {name}=None" if name in Inputs._field_defaults else f"Tensor {name}"
    for name in Inputs._fields
)
# What the forward keeps for the backward beside its inputs; all empty but with the kernels.
_SAVED = "Tensor? excess=None, Tensor? center=None, Tensor? row_stats=None"
_FIXED = ", ".join(f"float {name}=1.0" for name in _FIXED_GAINS[:5])
_OPTIONS = (
    f"{_FIXED}, float? fixed_scale=None, bool is_causal=False, SymInt? q_offset=None,"
    ' str prior_form="dense", bool deterministic=True'
)
_NEEDED = ", ".join(f"bool {name}=False" for name in _NEEDS)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    f"attention({_TENSORS}, *, {_OPTIONS}, bool save_for_backward=True)"
    " -> (Tensor out, Tensor lse, Tensor excess, Tensor center, Tensor row_stats)"
)
_library.define(
    f"attention_backward(Tensor? d_out, Tensor? d_lse, {_TENSORS}, {_SAVED}, *, {_OPTIONS},"
    f" {_NEEDED}) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_residual,"
    " Tensor d_gains, Tensor d_scale, Tensor d_prior)"
)
_attention_op = torch.ops.shaped_attn.attention.default
_backward_op = torch.ops.shaped_attn.attention_backward.default


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels, and Triton with them; an import statement costs a microsecond a call."""
    from .kernels import attention

    return attention


def _uses_kernels(q: Tensor) -> bool:
    return q.device.type != "cpu" or validation.is_interpreted()


def _bind(inputs: Inputs, options: dict) -> tuple[Gains, Visibility, PriorTable | None]:
    """Put the arguments of the operator together: gains that are tensors or numbers, and so on.

    The dispatcher leaves out options that have their default.
    """
    *fixed, scale = (options.get(name) for name in _FIXED_GAINS)
    fixed = (*(1.0 if gain is None else gain for gain in fixed), scale)
    gains = Gains(*(f if t is None else t for t, f in zip(inputs[_GAINS], fixed, strict=True)))
    is_causal, q_offset = options.get("is_causal", False), options.get("q_offset")
    visibility = Visibility(is_causal, q_offset, inputs.key_start, inputs.key_end, inputs.attn_mask)
    prior_form = options.get("prior_form", "dense")
    table = None if inputs.prior is None else PriorTable(prior_form, inputs.prior)
    return gains, visibility, table


def _checked(inputs: Inputs, options: dict) -> tuple[Gains, Visibility, PriorTable | None]:
    """The only check of a call, whether it comes from `shaped_attention` or from elsewhere."""
    q, k, v, residual = inputs[:4]
    gains, visibility, table = _bind(inputs, options)
    gains, visibility = validation.check_call(q, k, v, residual, gains, visibility)
    return gains, visibility, None if table is None else check_table(table, q, k)


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


def _attention(*tensors: Tensor | None, save_for_backward: bool = True, **options):
    inputs = Inputs(*tensors)
    q, k, v, residual = inputs[:4]
    gains, visibility, table = _checked(inputs, options)
    arguments = (q, k, v, residual, gains, visibility)
    if _uses_kernels(q):
        validation.check_kernel_limits(q, v, residual)
        options = _prior_options(table, q, k, visibility.q_offset)
        return _kernels().attention_fwd(*arguments, save_for_backward=save_for_backward, **options)
    with torch.no_grad():
        out, lse = composite.attention(*arguments, prior=table, return_lse=True)
    empty = q.new_empty(0, dtype=torch.float32)
    return out.contiguous(), lse.contiguous(), q.new_empty(0), empty, empty.clone()


def _attention_fake(*tensors: Tensor | None, save_for_backward: bool = True, **options):
    inputs = Inputs(*tensors)
    q, _, v, residual = inputs[:4]
    gains, visibility, table = _checked(inputs, options)
    rows = tuple(q.shape[:3])
    excess = center = row_stats = (0,)
    excess_dtype = q.dtype
    if save_for_backward and _uses_kernels(q):
        is_weighed = visibility.attn_mask is not None or table is not None
        excess = (*rows, padded_width(v.shape[3]))
        center = excess if is_weighed and not is_zero(gains.center) else (0,)
        if table is not None and is_zero(gains.center):
            excess_dtype = torch.float32
        row_stats = (2, *rows)
    return (
        q.new_empty((*rows, v.shape[3]), dtype=output_dtype(q, residual)),
        q.new_empty(rows, dtype=accumulation_dtype(q.dtype)),
        q.new_empty(excess, dtype=excess_dtype),
        q.new_empty(center, dtype=torch.float32),
        q.new_empty(row_stats, dtype=torch.float32),
    )


def _attention_backward(
    d_out: Tensor | None, d_lse: Tensor | None, *tensors: Tensor | None, **options
):
    inputs, saved = Inputs(*tensors[:_COUNT]), tensors[_COUNT:]
    q, k, v, residual = inputs[:4]
    needs = [options.get(name, False) for name in _NEEDS]
    needs_prior = needs[3]
    gains, visibility, table = _bind(inputs, options)
    gains, visibility = validation.complete(q, k, gains, visibility)
    if d_out is None:
        shape = (*q.shape[:3], v.shape[3])
        d_out = q.new_zeros((), dtype=output_dtype(q, residual)).expand(shape)
    arguments = (d_out, d_lse, q, k, v, residual, gains, visibility)
    if _uses_kernels(q):
        kernels = _kernels()
        if needs_prior:
            check_learnable(table)
        prior = _prior_options(table, q, k, visibility.q_offset)
        is_deterministic = options.get("deterministic", True)
        is_deterministic = is_deterministic or torch.are_deterministic_algorithms_enabled()
        needed = {"needs": kernels.Needs(*needs), "is_deterministic": is_deterministic}
        grads = kernels.attention_bwd(*arguments, *saved, **needed, **prior)
    else:
        grads = _composite_backward(*arguments, table, needs)
    if needs_prior:
        d_prior, prior = grads[6], inputs.prior
        # A table that the heads share; a gradient of the composite has its shape already.
        d_prior = d_prior if d_prior.shape == prior.shape else d_prior.sum(0, keepdim=True)
        grads = (*grads[:6], d_prior.to(prior.dtype).contiguous())
    absent = (q.new_empty(0), *(q.new_empty(0, dtype=torch.float32) for _ in range(3)))
    return (*grads[:3], *(a if g is None else g for g, a in zip(grads[3:], absent, strict=True)))


def _composite_backward(d_out, d_lse, q, k, v, residual, gains, visibility, table, needs):
    """Gradients of the composite on a CPU, from a second forward."""
    needs_residual, needs_gains, needs_scale, needs_prior = needs
    heads = q.shape[1]
    dtype = accumulation_dtype(q.dtype)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        if residual is not None:
            residual = residual.detach().requires_grad_(needs_residual)
        needed = [needs_gains] * 5 + [needs_scale]
        weights = [
            torch.as_tensor(gain, dtype=dtype).detach().expand(heads).clone().requires_grad_()
            if is_needed
            else gain
            for gain, is_needed in zip(gains, needed, strict=True)
        ]
        if needs_prior:
            table = PriorTable(table.form, table.values.detach().requires_grad_())
        arguments = (*inputs, residual, Gains(*weights), visibility)
        has_lse = d_lse is not None
        results = composite.attention(*arguments, prior=table, return_lse=has_lse)
        inputs += [residual] if needs_residual else []
        inputs += [w for w, is_needed in zip(weights, needed, strict=True) if is_needed]
        inputs += [table.values] if needs_prior else []
        outputs, cotangents = results[: 1 + has_lse], (d_out, d_lse)[: 1 + has_lse]
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
    d_out: Tensor | None, d_lse: Tensor | None, *tensors: Tensor | None, **options
):
    inputs = Inputs(*tensors[:_COUNT])
    q, k, v, residual = inputs[:4]
    needs_residual, needs_gains, needs_scale, needs_prior = (
        options.get(name, False) for name in _NEEDS
    )
    heads, prior = q.shape[1], inputs.prior
    out_shape = (*q.shape[:3], v.shape[3])
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(out_shape if needs_residual else 0, dtype=output_dtype(q, residual)),
        q.new_empty((5, heads) if needs_gains else 0, dtype=torch.float32),
        q.new_empty(heads if needs_scale else 0, dtype=torch.float32),
        prior.new_empty(prior.shape) if needs_prior else q.new_empty(0, dtype=torch.float32),
    )


class _Attention(torch.autograd.Function):
    """The operator and its derivative; `register_autograd` costs the host twice as much."""

    @staticmethod
    def forward(ctx, keyset, options, *tensors):
        output = _below_autograd(keyset, tensors, options)
        saved = output[2:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*Inputs(*tensors), *saved)
        ctx.given = len(tensors)
        ctx.options = dict(options)
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse, *_):
        if d_out is None and d_lse is None:
            return (None,) * (2 + ctx.given)
        options = dict(ctx.options)
        if not options.pop("save_for_backward", True):
            raise RuntimeError(
                "save_for_backward must be True to differentiate shaped_attn.attention, got False. "
                "Leave it at its default, or call the operator under torch.no_grad()."
            )
        saved = ctx.saved_tensors
        inputs, saved = Inputs(*saved[:_COUNT]), saved[_COUNT:]
        needs = Inputs(*ctx.needs_input_grad[2:], *(False,) * (_COUNT - ctx.given))
        needs_gains = needs[_GAINS]
        has_gains = any(needs_gains[:5])
        needed = zip(_NEEDS, (needs.residual, has_gains, needs.scale, needs.prior), strict=True)
        with torch.no_grad():
            d_q, d_k, d_v, d_residual, d_gains, d_scale, d_prior = _backward_op(
                d_out, d_lse, *inputs, *saved, **options, **dict(needed)
            )
            per_head = (*(d_gains if has_gains else (None,) * 5), d_scale)
            gains = {
                name: _reduce_gain(gradient, getattr(inputs, name))
                for name, gradient, is_needed in zip(
                    validation.GAIN_NAMES, per_head, needs_gains, strict=True
                )
                if is_needed
            }
        absent = Inputs(d_q, d_k, d_v, residual=d_residual if needs.residual else None)
        found = absent._replace(**gains, prior=d_prior if needs.prior else None)
        if torch.is_grad_enabled():
            found = _RefuseSecondDerivative.apply(d_out, d_lse, *inputs, *found)
        return None, None, *found[: ctx.given]


class _RefuseSecondDerivative(torch.autograd.Function):
    """Pass first derivatives through; differentiating them is an error, not a wrong number."""

    @staticmethod
    def forward(ctx, *arguments):
        return arguments[-_COUNT:]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "torch.ops.shaped_attn.attention can be differentiated once, got a request for a "
            'second derivative. Use impl="reference", which autograd differentiates repeatedly.'
        )


def _reduce_gain(gradient: Tensor, gain: Tensor) -> Tensor:
    """Bring a gradient per head to the shape and dtype of its gain."""
    return (gradient.sum() if gain.ndim == 0 else gradient).to(gain.dtype)


def _below_autograd(keyset, tensors, options):
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_op.redispatch(
            keyset & torch._C._after_autograd_keyset, *tensors, **options
        )


def _attention_autograd(keyset, *tensors: Tensor | None, **options):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(keyset, options, *tensors)
    return _below_autograd(keyset, tensors, options)


for _name, _function, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
_library.impl("attention", _attention_autograd, "Autograd", with_keyset=True)


def _attention_flops(q_shape, k_shape, v_shape, *args, is_causal=False, out_shape=None, **kwargs):
    """Two products per visible pair: 2 B H T S (D + Dv), half of it if causal."""
    pairs = q_shape[0] * q_shape[1] * q_shape[2] * k_shape[2]
    flops = 2 * pairs * (q_shape[3] + v_shape[3])
    return flops // 2 if is_causal else flops


def _attention_backward_flops(
    d_out_shape, d_lse_shape, q_shape, k_shape, v_shape, *args, is_causal=False, **kwargs
):
    """2.5 times the forward: the convention that published figures use."""
    return 5 * _attention_flops(q_shape, k_shape, v_shape, is_causal=is_causal) // 2


_FLOP_COUNTER = "torch.utils.flop_counter"


def _register_flops(flop_counter: ModuleType) -> None:
    register = flop_counter.register_flop_formula
    register(torch.ops.shaped_attn.attention)(_attention_flops)
    register(torch.ops.shaped_attn.attention_backward)(_attention_backward_flops)


class _FlopFormulas(MetaPathFinder):
    """Gives torch's counter the formulas when somebody imports it: it imports all of Triton."""

    def find_spec(self, name, path=None, target=None):
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register_flops(module)

        spec.loader.exec_module = exec_module
        return spec


if _FLOP_COUNTER in sys.modules:
    _register_flops(sys.modules[_FLOP_COUNTER])
else:
    sys.meta_path.insert(0, _FlopFormulas())


def attention_from_gains(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gains: Gains,
    visibility: Visibility,
    *,
    prior: PriorTable | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Call the operator with gains that are numbers or tensors; return `out` and `lse`."""
    tensors = [gain if isinstance(gain, Tensor) else None for gain in gains]
    options = {
        name: gain
        for name, gain in zip(_FIXED_GAINS, gains, strict=True)
        if not isinstance(gain, Tensor)
    }
    if not deterministic:
        options["deterministic"] = False
    is_causal, q_offset, key_start, key_end, attn_mask = visibility
    values = None
    if prior is not None:
        values = prior.values
        options["prior_form"] = prior.form
        if values.requires_grad and _uses_kernels(q):
            check_learnable(prior)
    # In the order of `Inputs`.
    inputs = (q, k, v, residual, *tensors, attn_mask, key_start, key_end, values)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, lse, *_ = _attention_op(
        *inputs, **options, is_causal=is_causal, q_offset=q_offset, save_for_backward=needs_grad
    )
    return out, lse
