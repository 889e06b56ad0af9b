"""Inputs, error budgets and memory poisoning for tests, benchmarks and fidelity reports.

The oracle is ``impl="reference"`` on float64 copies of the inputs. What error is allowed beside it
follows from the error that eager torch makes in the input dtype (`eager_attention`) plus the
rounding of the result, never from a constant that happened to pass. One draw of that error says
nothing about a gradient of few elements, such as a gain's: that one has to lie within the spread
that rounding gives it (`rounding_spread`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .arguments import Gains, accumulation_dtype
from .checks import check_choice
from .priors import ESPA, USPA, resolve_prior
from .validation import complete
from .visibility import Visibility

_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and visibility of one call of `shaped_attention`.

    Attributes:
        batch, heads, queries, head_dim: B, H, T and D.
        kv_heads, keys, value_dim: Hkv, S and Dv. Default None: Hkv = H, S = T, Dv = D.
        dtype: of q, k and v.
        is_causal, q_offset: as in `shaped_attention`.
        padding: "left", "right" or "both": key_start and key_end that differ between batch entries,
            the first of which has no padding.
        mask: "random" (B, H, T, S), "keys" (B, 1, 1, S), or "rows" (T, S), where row 0 sees no key.
        residual_dtype: of the residual; None for no residual.
    """

    batch: int = 2
    heads: int = 4
    kv_heads: int | None = None
    queries: int = 64
    keys: int | None = None
    head_dim: int = 32
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    q_offset: int | None = None
    padding: str | None = None
    mask: str | None = None
    residual_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Fill in the sizes that are tied to others."""
        for name, tied in (("kv_heads", "heads"), ("keys", "queries"), ("value_dim", "head_dim")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, tied))
        check_choice("padding", self.padding, (None, "left", "right", "both"))
        check_choice("mask", self.mask, (None, "random", "keys", "rows"))

    @property
    def id(self) -> str:
        """A name for the case, such as ``B2-T111-S130-H4-HKV2-D64-DV32-bf16-causal``."""
        parts = {
            f"B{self.batch}-T{self.queries}": True,
            f"S{self.keys}": self.keys != self.queries,
            f"H{self.heads}": True,
            f"HKV{self.kv_heads}": self.kv_heads != self.heads,
            f"D{self.head_dim}": True,
            f"DV{self.value_dim}": self.value_dim != self.head_dim,
            _DTYPE_NAMES[self.dtype]: True,
            "causal": self.is_causal,
            f"offset{self.q_offset}": self.q_offset is not None,
            f"pad_{self.padding}": self.padding,
            f"mask_{self.mask}": self.mask,
            f"res_{_DTYPE_NAMES.get(self.residual_dtype)}": self.residual_dtype,
        }
        return "-".join(part for part, is_shown in parts.items() if is_shown)

    @property
    def scale(self) -> float:
        """The default scale of `shaped_attention` for these sizes."""
        return 1.0 / (self.head_dim * math.sqrt(self.heads))

    @property
    def has_own_keys(self) -> bool:
        """Whether every query has a key at its own position, as the identity term needs."""
        offset = self.keys - self.queries if self.q_offset is None else self.q_offset
        return self.queries == 0 or (offset >= 0 and offset + self.queries <= self.keys)


class Inputs(NamedTuple):
    """The floating tensors of one call; ``residual`` is None if the case has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor | None


def make_inputs(
    case: Case,
    *,
    logit_std: float = 1.0,
    value_mean: float = 0.0,
    key_mean: float = 0.0,
    sink: bool = False,
    scale: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Draw normal inputs, rounded to the dtypes of the case.

    Args:
        case: sizes and dtypes.
        logit_std: standard deviation of ``scale * q.k`` over the keys of a row.
        value_mean: mean of v; its standard deviation is 1.
        key_mean: mean of k, whose standard deviation is 1. If it is not 0, q has a mean as large as
            its standard deviation, so that all logits share an offset of about
            ``logit_std * key_mean * sqrt(D / 2)``.
        sink: give key 0 a logit of about 8 with every query.
        scale: the scale the logits will be multiplied by; None is the default of
            `shaped_attention`.
        seed: of a generator of its own.
        device: where the inputs are returned. They are drawn on the CPU, the same for all devices.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    scale = case.scale if scale is None else scale
    q_std = logit_std / (abs(scale) * math.sqrt(case.head_dim))
    q = normal(case.batch, case.heads, case.queries, case.head_dim)
    k = normal(case.batch, case.kv_heads, case.keys, case.head_dim)
    v = normal(case.batch, case.kv_heads, case.keys, case.value_dim) + value_mean
    residual = None
    if case.residual_dtype is not None:
        residual = normal(case.batch, case.heads, case.queries, case.value_dim)
        residual = residual.to(case.residual_dtype)
    if key_mean:
        q = (q + 1) / math.sqrt(2)
        k = k + key_mean
    q = q * q_std
    if sink and case.keys > 0:
        # Channel 0 is for the sink alone.
        strength = max(math.sqrt(8 / abs(scale)), 4 * q_std)
        q[..., 0] += strength
        k[..., 0] = 0
        k[:, :, 0, 0] = 8 / (scale * strength)
    q, k, v = (x.to(case.dtype).to(device) for x in (q, k, v))
    return Inputs(q, k, v, None if residual is None else residual.to(device))


def make_options(
    case: Case, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return the keyword arguments of `shaped_attention` that say which keys are visible."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"is_causal": case.is_causal, "q_offset": case.q_offset}
    entry = torch.arange(case.batch)
    third = -(-case.keys // 3)
    if case.padding in ("left", "both"):
        options["key_start"] = (entry * third).clamp(max=case.keys).to(device)
    if case.padding in ("right", "both"):
        options["key_end"] = (case.keys - entry * third).clamp(min=0).to(device)
    shape = {
        "random": (case.batch, case.heads, case.queries, case.keys),
        "keys": (case.batch, 1, 1, case.keys),
        "rows": (case.queries, case.keys),
        None: None,
    }[case.mask]
    if shape is not None:
        mask = torch.rand(shape, generator=generator) < 0.7
        if case.mask == "rows":
            mask[:1] = False
        options["attn_mask"] = mask.to(device)
    return options


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    q_offset: int | None = None,
    is_causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prior: ESPA | USPA | Tensor | None = None,
    return_lse: bool = False,
    **gains: float | Tensor,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `shaped_attention` in eager torch with every intermediate in the dtype of q.

    Its error against float64 is the yardstick of `assert_within_budget`. Gains are given by their
    names in `shaped_attention`; arguments are not checked.
    """
    weights = Gains(scale=scale, **{name.removesuffix("_gain"): x for name, x in gains.items()})
    visibility = Visibility(is_causal, q_offset, key_start, key_end, attn_mask)
    weights, visibility = complete(q, k, weights, visibility)
    table = resolve_prior(prior, q, k, visibility)
    out, lse = reference.attention(
        q, k, v, residual, weights, visibility, prior=table, compute_dtype=q.dtype
    )
    return (out, lse) if return_lse else out


def forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor | None],
    d_out: Tensor,
    d_lse: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Call ``function(**tensors, **options)`` and differentiate it.

    Args:
        function: returns ``out``, or ``(out, lse)``.
        tensors: the floating arguments by name; a gradient is taken for each that is not None.
        d_out: gradient of ``out``.
        d_lse: gradient of ``lse``; None if the function returns ``out`` alone or lse is not
            differentiated. Rows whose lse is infinite get the gradient 0.
        options: further arguments.

    Returns:
        ``out``, ``lse`` if returned, and ``grad NAME`` for every tensor, all detached.
    """
    leaves = {
        name: None if x is None else x.detach().clone().requires_grad_()
        for name, x in tensors.items()
    }
    result = function(**leaves, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    outputs, cotangents = [out], [d_out.to(out)]
    found = {"out": out.detach()}
    if lse is not None:
        found["lse"] = lse.detach()
        if d_lse is not None:
            outputs.append(lse)
            cotangents.append(torch.where(lse.isfinite(), d_lse.to(lse), 0))
    inputs = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    found.update((f"grad {name}", g) for name, g in zip(inputs, gradients, strict=True))
    return found


# Operators of the reference and the models that round; the others move, select or negate.
_PRODUCTS = {"mm", "bmm", "addmm"}
_SUMS = _PRODUCTS | {"sum", "mean"}
_ROUNDED = _SUMS | {
    *("add", "add_", "sub", "rsub", "mul", "div", "pow", "exp", "expm1", "log", "log2"),
    *("sqrt", "rsqrt", "sin", "cos", "cumsum", "logsumexp", "leaky_relu", "leaky_relu_backward"),
    *("_softmax", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward"),
    *("native_layer_norm", "native_layer_norm_backward", "embedding_dense_backward"),
}
_NARROW = _PRODUCTS | {"_softmax", "_softmax_backward_data"}


class _RandomRounding(TorchDispatchMode):
    """Moves every rounded result up or down at random, by the most that rounding can move it."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.unit = rounding_error(dtype)
        self.wide_unit = rounding_error(accumulation_dtype(dtype))
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_softmax_backward_data":
            # (13) of kernels/README.md: the products, their sum delta and the difference all round.
            d_weights, weights, dim, _ = args
            with self:
                products = weights * d_weights
                result = products - weights * products.sum(dim, keepdim=True)
            self._move(result, self.unit * result.abs())
            return result
        result = function(*args, **kwargs)
        if name in _ROUNDED:
            unit = self.unit if name in _NARROW else self.wide_unit
            for x in result if isinstance(result, tuple) else (result,):
                if not x.is_floating_point():
                    continue
                size = unit * x.abs()
                if name in _SUMS:
                    size = torch.hypot(size, self._partial_sums(function, name, args, kwargs, x))
                self._move(x, size)
        return result

    def _partial_sums(
        self, function: Any, name: str, args: tuple, kwargs: dict[str, Any], total: Tensor
    ) -> Tensor:
        """Size of the roundings of all partial sums.

        After k of n terms the square of a sum is about k/n of that of a random walk, plus (k/n)^2
        of that of the mean, which add up to at most n/2 of the two.
        """
        squares = function(*(x**2 if isinstance(x, Tensor) else x for x in args), **kwargs)
        terms = args[0].numel() / max(1, total.numel())
        if name in _PRODUCTS:
            terms = args[-1].shape[-2]
        if name == "mean":
            squares = squares / terms
        return self.wide_unit * (terms / 2 * (squares + total**2)).sqrt()

    def _move(self, x: Tensor, size: Tensor) -> None:
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        generator = self.generators[x.device]
        sign = torch.randint(2, x.shape, generator=generator, device=x.device) * 2 - 1
        x.add_(torch.where(x.isfinite(), size * sign, 0))


def rounding_spread(
    function: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype, *, draws: int = 8
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return float64 results, and how far the roundings of a computation in ``dtype`` move them.

    Monte Carlo arithmetic: the float64 computation is repeated with the result of every operator,
    in the backward pass too, moved up or down at random by the most that one rounding can. A sum of
    n terms, also inside a matrix product, rounds n times, each time what was added up so far. So
    the spread holds the conditioning of a result: where it is what is left of large terms, at its
    end or in any intermediate sum, their roundings are in it. It depends on no maths library.

    All rounds to float32, the inputs being exact; for a 16-bit ``dtype``, the results of matrix
    products and of softmax, and their gradients, to that, as the operands of tensor cores are.

    Args:
        function: returns results by name, of float64 arithmetic only. It is called first as it is,
            so that what it caches stays exact.
        dtype: whose rounding is meant.
        draws: repetitions; the spread is known to within 1 / sqrt(2 draws) of itself.

    Returns:
        The results without rounding, and the root mean square of their changes, of equal shapes.
    """
    golden = function()
    squares = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in golden.items()}
    for seed in range(draws):
        with _RandomRounding(dtype, seed):
            moved = function()
        for name, x in moved.items():
            squares[name] += (x.double() - golden[name].double()) ** 2
    return dict(golden), {name: (x / draws).sqrt() for name, x in squares.items()}


SPREADS = 4
"""How many spreads an error may be.

The spread counts every rounding as the largest possible; one of random size is about half as large,
so that this is about eight standard deviations, known to a quarter.
"""


def assert_within_spread(actual: Tensor, golden: Tensor, spread: Tensor, *, name: str) -> None:
    """Check ``||actual - golden|| <= SPREADS ||spread||`` in the 2-norm.

    Args:
        actual: the result under test.
        golden, spread: of `rounding_spread`.
        name: of the quantity, for the message.

    Raises:
        AssertionError: shapes differ, or the error is over budget or not a number. The message
            gives error and budget.
    """
    if actual.shape != golden.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} is not {tuple(golden.shape)}")
    error = (actual.detach().to(golden) - golden).norm().item()
    budget = SPREADS * spread.norm().item()
    if not error <= budget:  # catches NaN as well
        raise AssertionError(
            f"{name}: error {error:.3g} is over the budget {budget:.3g} = {SPREADS} spreads of "
            f"rounding, for a result of size {golden.norm().item():.3g}"
        )


def relative_error(actual: Tensor, golden: Tensor) -> float:
    """Return ``||actual - golden|| / ||golden||`` in the 2-norm; 0 if equal, even if zero."""
    return _error(actual, golden, order=2)


def largest_error(actual: Tensor, golden: Tensor) -> float:
    """Return ``max |actual - golden| / max |golden|``; 0 if equal, even if zero."""
    return _error(actual, golden, order=math.inf) if actual.numel() else 0.0


def _error(actual: Tensor, golden: Tensor, order: float) -> float:
    golden = golden.detach().double()
    pair = (actual.detach().to(golden) - golden, golden)
    difference, size = (torch.linalg.vector_norm(x, order).item() for x in pair)
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 else math.inf


def rounding_error(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def assert_within_budget(
    actual: Tensor,
    golden: Tensor,
    eager: Tensor,
    *,
    factor: float,
    name: str,
    rounding: float | None = None,
) -> None:
    """Check ``error(actual) <= factor * error(eager) + rounding``.

    It has to hold for the error of the whole (`relative_error`) and of the worst element
    (`largest_error`), both against ``golden``.

    Args:
        actual: the result under test.
        golden: the float64 result for the same inputs.
        eager: the result of `eager_attention` or other eager torch in the input dtype.
        factor: how many times the error of eager torch is allowed; fixed per quantity.
        name: of the quantity, for the message.
        rounding: relative error allowed beside it; None is one rounding to the dtype of ``actual``,
            plus eight to float32 for arithmetic that takes place there. Derive any other value.

    Raises:
        AssertionError: shapes differ, a value is not finite where that of ``golden`` is, or an
            error is over budget. The message gives error and budget.
    """
    if actual.shape != golden.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} is not {tuple(golden.shape)}")
    if rounding is None:
        wide = torch.promote_types(actual.dtype, torch.float32)
        rounding = rounding_error(actual.dtype) + 8 * rounding_error(wide)
    finite = golden.isfinite()
    if not torch.equal(actual[~finite].to(golden), golden[~finite]):
        raise AssertionError(f"{name}: infinite elements differ")
    actual, golden, eager = actual[finite], golden[finite], eager[finite]
    for norm, measure in (("relative", relative_error), ("largest", largest_error)):
        error, baseline = measure(actual, golden), measure(eager, golden)
        budget = factor * baseline + rounding
        if not error <= budget:  # catches NaN as well
            raise AssertionError(
                f"{name}: {norm} error {error:.3g} is over the budget {budget:.3g} = "
                f"{factor:g} x {baseline:.3g} (eager, input dtype) + {rounding:.3g} (rounding)"
            )


@contextmanager
def poison_empty() -> Iterator[None]:
    """Make ``empty`` memory read as NaN until written, integers as a huge number.

    A kernel that reads, or leaves, memory it has not written then shows it. Applies to
    ``torch.empty``, ``torch.empty_like``, ``torch.empty_strided`` and ``Tensor.new_empty``.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            with torch.no_grad():
                if x.is_floating_point():
                    x.fill_(torch.nan)
                elif x.dtype != torch.bool and not x.is_complex():
                    x.fill_(torch.iinfo(x.dtype).max)
            return x

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poisoned(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


@contextmanager
def record_families() -> Iterator[set[str]]:
    """Yield a set that receives the name of the family of kernels that runs each call inside."""
    found: set[str] = set()
    if importlib.util.find_spec("triton") is None:  # nothing is called that has kernels
        yield found
        return
    from .kernels import attention, launch

    pick = attention.pick_family

    def record(*args: Any, **kwargs: Any) -> str:
        name = pick(*args, **kwargs)
        found.add(name)
        return name

    launch.forget_plans()  # which are picked once for all calls of a signature
    with mock.patch.object(attention, "pick_family", record):
        yield found
