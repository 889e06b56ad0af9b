"""Relative errors of shaped attention against float64, per dtype, logit scale and implementation.

Beside every error stands that of a composition of torch's own operators in the same dtype: softmax
attention, minus a mean, plus the other terms. At small logits softmax is close to uniform, and the
difference of two rounded outputs is mostly rounding; that column shows what centring costs without
the excess form. `measure` does this for inputs that strain an implementation, `measure_calls` for
calls of all kinds that a family of kernels takes, at real sizes, beside eager torch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import testing
from .checks import check_choice, fail
from .functional import shaped_attention
from .validation import GAIN_NAMES
from .watchdog import Job, in_turn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGIT_STDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
QUICK_LOGIT_STDS = (0.01, 0.1, 1.0, 10.0)
MIN_LENGTH = 16

REGIMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v mean 3": {"value_mean": 3.0},
    "k mean 4": {"key_mean": 4.0},
    "sink key": {"sink": True},
}
"""Inputs: centred, with a large mean of v or k, or with one key that draws all attention."""

CENTRED_BUDGET = {"bf16": 3e-3, "fp16": 5e-4, "fp32": 3e-5}
"""Largest error of the centred term that the Triton kernels may have, in any regime."""

GRADIENT_NAMES = ("q", "k", "v", "residual", *GAIN_NAMES)
CENTRED = "centred term"
OUTPUT = "output"
QUANTITIES = (CENTRED, OUTPUT, *(f"grad {name}" for name in GRADIENT_NAMES))

# Exact in every dtype, so that no implementation is charged for rounding a gain.
_GAINS = {
    "identity_gain": 1.0,
    "softmax_gain": 1.0,
    "center_gain": 1.0,
    "skip_gain": 0.75,
    "branch_gain": 0.5,
}

_Row = tuple[str, float, float | None, float]
"""Quantity, error, composed_error and budget of a `Measurement`."""


@dataclass(frozen=True)
class Measurement:
    """One cell of the table: ||x - x64|| / ||x64|| of one quantity, and what it may be.

    composed_error is None where nothing is composed, family where no kernels ran.
    """

    impl: str
    regime: str
    dtype: str
    length: int
    logit_std: float
    quantity: str
    error: float
    composed_error: float | None
    budget: float
    family: str | None

    @property
    def is_within(self) -> bool:
        """Whether the error is within its budget; NaN is not."""
        return self.error <= self.budget

    @property
    def used(self) -> float:
        """Share of the budget that the error takes up."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.budget if self.budget > 0.0 else math.inf


@dataclass(frozen=True)
class FidelityReport:
    """All measurements of one run and how they were made."""

    measurements: tuple[Measurement, ...]
    settings: dict[str, Any]
    seconds: float

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements that exceed their budget."""
        return tuple(m for m in self.measurements if not m.is_within)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        rows = [{**asdict(m), "is_within": m.is_within} for m in self.measurements]
        for row in rows:
            for key, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[key] = str(value)
        return {"settings": self.settings, "seconds": self.seconds, "measurements": rows}


def tables(report: FidelityReport) -> list[list[list[Measurement]]]:
    """Group the measurements of a report for printing, in the order in which they were made.

    A table is of one implementation, dtype and regime, a row in it of one quantity. Its columns are
    standard deviations of the logits.
    """
    groups: dict[tuple[str, str, str], dict[str, list[Measurement]]] = {}
    for m in report.measurements:
        rows = groups.setdefault((m.impl, m.dtype, m.regime), {})
        rows.setdefault(m.quantity, []).append(m)
    return [list(rows.values()) for rows in groups.values()]


def format_error(value: float) -> str:
    """Two digits, short: 0.0024 as 2.4e-3, 0.031 as 0.031, 2.3 as 2.3."""
    if not math.isfinite(value):
        return str(value)
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    if -2 <= int(exponent) <= 2:
        return f"{value:.2g}"
    return f"{mantissa}e{int(exponent)}"


def label(quantity: str) -> str:
    """Name of a quantity as printed: ``grad identity_gain`` without the suffix."""
    return quantity.removesuffix("_gain")


def measure(
    impls: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[str] = tuple(DTYPES),
    logit_stds: Sequence[float] = LOGIT_STDS,
    regimes: Sequence[str] = tuple(REGIMES),
    length: int | None = None,
    heads: int = 2,
    head_dim: int = 64,
    seed: int = 0,
    family: str | None = None,
    attention: Callable[..., Tensor] = shaped_attention,
    run: Callable[[Sequence[Job]], Iterable[Any]] = in_turn,
    on_progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Measure the fidelity of implementations: causal, one batch entry, T = S = ``length``.

    In the regime "plain" every quantity of ``QUANTITIES`` is measured, in the others the centred
    term, which is what they strain.

    Args:
        impls: of "triton", "torch", "reference".
        device: where to run.
        dtypes: keys of ``DTYPES``.
        logit_stds: standard deviations of scale q.k.
        regimes: keys of ``REGIMES``.
        length: T = S, at least 16. Default: 512, or 128 on a CPU, where kernels are interpreted.
        heads: number of heads.
        head_dim: D = Dv.
        seed: of the inputs.
        family: of kernels, for "triton", as in `shaped_attn.kernels.use_family`. Default: the one
            in force.
        attention: the function under test, with the signature of ``shaped_attention``.
        run: makes the measurements, `shaped_attn.watchdog.run` in processes of their own.
        on_progress: called with (done, total) after every set of inputs.

    Raises:
        ValueError: a name is unknown, or the length too short.
        RuntimeError: "triton" is asked for where the kernels cannot run: nothing else is measured
            under that name.
    """
    device = torch.device(device)
    known = {"impls": ("triton", "torch", "reference"), "dtypes": DTYPES, "regimes": REGIMES}
    for name, values in (("impls", impls), ("dtypes", dtypes), ("regimes", regimes)):
        for value in values:
            check_choice(name, value, known[name])
    if length is not None and length < MIN_LENGTH:
        remedy = "With few keys exact results are near zero, and relative errors mean nothing."
        fail(ValueError, "length", f"must be at least {MIN_LENGTH}", length, remedy)
    if "triton" in impls:
        _check_kernels_run()
    options = {"heads": heads, "head_dim": head_dim, "seed": seed, "family": family}
    size = length or (128 if device.type == "cpu" else 512)
    given = options | {"device": device, "attention": attention, "size": size}
    jobs = []
    for impl, dtype, regime, logit_std in itertools.product(impls, dtypes, regimes, logit_stds):
        name = f"{impl} {dtype} {regime}, logit std {logit_std:g}"
        point = {"point": (impl, dtype, regime, logit_std)}
        jobs.append(Job(name, _measure_point, given | point))
    settings = {"device": str(device), "is_causal": True, **options}
    return _report(jobs, settings, run, on_progress)


def _report(
    jobs: Sequence[Job],
    settings: dict[str, Any],
    run: Callable[[Sequence[Job]], Iterable[Any]],
    on_progress: Callable[[int, int], None] | None,
) -> FidelityReport:
    """Make the measurements of all jobs."""
    start = time.perf_counter()
    found: list[Measurement] = []
    for done, measurements in enumerate(run(jobs), 1):
        found.extend(measurements)
        if on_progress is not None:
            on_progress(done, len(jobs))
    return FidelityReport(tuple(found), settings, time.perf_counter() - start)


def _measure_point(
    point: tuple[str, str, str, float],
    *,
    size: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    seed: int,
    family: str | None,
    attention: Callable[..., Tensor],
) -> list[Measurement]:
    """Measure one implementation with one set of inputs."""
    impl, dtype, regime, logit_std = point
    case = testing.Case(
        batch=1,
        heads=heads,
        queries=size,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        is_causal=True,
        residual_dtype=DTYPES[dtype],
    )
    inputs = testing.make_inputs(
        case, logit_std=logit_std, seed=seed, device=device, **REGIMES[regime]
    )
    with _kernels_of(family) if impl == "triton" else nullcontext([]) as families:
        rows = [_centred_error(attention, impl, inputs, case.scale, dtype)]
        if regime == "plain":
            rows.extend(_gradient_errors(attention, impl, inputs, case.scale, seed))
    ran = " and ".join(sorted(families)) or None
    return [Measurement(impl, regime, dtype, size, logit_std, *row, ran) for row in rows]


def _centred_error(
    attention: Callable[..., Tensor], impl: str, inputs: testing.Inputs, scale: float, dtype: str
) -> _Row:
    """Error of softmax minus mean alone, which is then what the operator returns."""
    q, k, v, _ = inputs
    options = {"scale": scale, "identity_gain": 0.0, "is_causal": True}
    exact_q, exact_k, exact_v = (x.double() for x in (q, k, v))
    exact = shaped_attention(exact_q, exact_k, exact_v, impl="reference", **options)
    actual = attention(q, k, v, impl=impl, **options)
    composed = _softmax(q, k, v, scale) - _prefix_mean(v)
    if impl == "triton":
        budget = CENTRED_BUDGET[dtype]
    else:
        # Two terms of the size of the mean are subtracted, so their rounding counts relative to
        # what is left. And a logit of size L is off by L roundings, which changes its weight by as
        # much: relative to deviations of the weights that are themselves of the size of the logits'
        # standard deviation, or 1 where that is larger.
        logits = scale * exact_q @ exact_k.mT
        cancellation = (_prefix_mean(exact_v).norm() / exact.norm()).item()
        deviation = min(1.0, logits.std(-1).mean().item())
        condition = 1 + cancellation + _root_mean_square(logits) / deviation
        budget = testing.rounding_error(q.dtype)
        budget += 8 * testing.rounding_error(torch.float32) * condition
    errors = (testing.relative_error(x, exact) for x in (actual, composed))
    return CENTRED, *errors, budget


def _gradient_errors(
    attention: Callable[..., Tensor], impl: str, inputs: testing.Inputs, scale: float, seed: int
) -> Iterator[_Row]:
    """Errors of the output with all terms, and of each gradient."""
    dtype, device, heads = inputs.q.dtype, inputs.q.device, inputs.q.shape[1]
    # Gains are parameters: float32 also beside inputs of 16 bits.
    tensors = inputs._asdict() | {
        name: torch.full((heads,), value, device=device)
        for name, value in {**_GAINS, "scale": scale}.items()
    }
    generator = torch.Generator().manual_seed(seed + 1)
    d_out = torch.randn(inputs.residual.shape, generator=generator).to(device, dtype)

    def differentiate(function: Callable, tensors: dict[str, Tensor], **options: Any) -> dict:
        return testing.forward_backward(function, tensors, d_out, **options)

    exact = {name: x.double() for name, x in tensors.items()}
    golden, spread = testing.rounding_spread(
        lambda: differentiate(shaped_attention, exact, impl="reference", is_causal=True), dtype
    )
    actual = differentiate(attention, tensors, impl=impl, is_causal=True)
    composed = differentiate(_composed, tensors)
    # Eager torch in one dtype throughout: the yardstick of the budgets.
    narrow = {name: x.to(dtype) for name, x in tensors.items()} | {"scale": tensors["scale"]}
    eager = differentiate(testing.eager_attention, narrow, is_causal=True)
    # The rounding of the result, and some of float32 on the way: a logit of size L is off by L
    # roundings, and its weight with it.
    logit_size = _root_mean_square(scale * exact["q"] @ exact["k"].mT)
    rounding = testing.rounding_error(dtype)
    rounding += 8 * testing.rounding_error(torch.float32) * max(1.0, logit_size)
    for name, right in golden.items():
        budget = _budget(name, right, spread, eager, rounding)
        yield _named(name), *(_error(x[name], right) for x in (actual, composed)), budget


def _named(name: str) -> str:
    """Name of a quantity from that of a result."""
    return OUTPUT if name == "out" else name


def _budget(
    name: str, golden: Tensor, spread: dict[str, Tensor], eager: dict[str, Tensor], rounding: float
) -> float:
    """Relative error that a result may have: of a few numbers by spread, else by eager torch's."""
    if name.removeprefix("grad ") in GAIN_NAMES:
        return testing.SPREADS * (spread[name].norm() / golden.norm()).item()
    return 2 * _error(eager[name], golden) + rounding


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextmanager
def _kernels_of(family: str | None) -> Iterator[set[str]]:
    """Let a family, or the one in force, run the kernels; yields the names of those that do."""
    from .kernels import use_family

    chosen = nullcontext() if family is None else use_family(family)
    with chosen, testing.record_families() as families:
        yield families


@dataclass(frozen=True)
class KernelCall:
    """A call that a family of kernels takes.

    terms: "learned", all terms with a gain of either sign for each head; "plain", softmax attention
    alone; "centred", softmax minus mean, the output then being the centred term.
    """

    case: testing.Case
    terms: str = "learned"
    deterministic: bool = True

    @property
    def id(self) -> str:
        """Name of the call."""
        order = "" if self.deterministic else ", sums in any order"
        return f"{self.terms} {self.case.id}{order}"


def hopper_calls(length: int = 2531) -> tuple[KernelCall, ...]:
    """What the check of the Hopper kernels calls, for about as many queries and keys as `length`.

    Every width, dtype and mask; key ranges, offsets, grouped heads and residuals spread over them.
    """
    bf16, fp16, fp32 = (DTYPES[name] for name in ("bf16", "fp16", "fp32"))
    more, fewer = length + length // 7, length - length // 7

    def call(head_dim, dtype, is_causal, terms="learned", deterministic=True, **changes):
        sizes = {"batch": 1, "heads": 2, "queries": length} | changes
        case = testing.Case(head_dim=head_dim, dtype=dtype, is_causal=is_causal, **sizes)
        return KernelCall(case, terms, deterministic)

    both, grouped = {"batch": 3, "padding": "both"}, {"heads": 4, "kv_heads": 2}
    return (
        call(64, bf16, True, residual_dtype=bf16),
        call(128, bf16, False, "plain", False, batch=2, padding="right"),
        call(128, fp16, True, residual_dtype=fp32, **grouped),
        call(64, fp16, False, "centred", keys=more),
        call(96, bf16, True, "centred", batch=2, padding="left"),
        call(64, bf16, False, residual_dtype=fp32, **both),
        call(128, bf16, True, "learned", False, residual_dtype=bf16),
        call(64, fp16, True, "plain", keys=more, q_offset=length // 7, **grouped),
        call(128, fp16, False, "centred", False, residual_dtype=fp16),
        call(96, fp16, False, residual_dtype=fp16),
        call(64, bf16, True, "plain", False, keys=fewer, q_offset=-length // 7),
        call(128, bf16, True, "centred", value_dim=64, keys=more, **grouped),
        call(256, bf16, True, residual_dtype=bf16),
        call(192, fp16, False, "centred", batch=2, padding="right"),
    )


CALL_LOGIT_STDS = (0.03, 1.0, 8.0, 300.0)
QUICK_CALL_LOGIT_STDS = (1.0, 300.0)
REPEATS = "bits repeated"
_REPETITIONS = 3


def measure_calls(
    calls: Sequence[KernelCall],
    *,
    device: torch.device | str,
    logit_stds: Sequence[float] = CALL_LOGIT_STDS,
    seed: int = 0,
    family: str | None = None,
    attention: Callable[..., Tensor] = shaped_attention,
    run: Callable[[Sequence[Job]], Iterable[Any]] = in_turn,
    on_progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Measure the fidelity of the kernels in calls: output, lse, all gradients, and repetitions.

    The composition beside them is `testing.eager_attention`, in the dtype of the call. Two calls
    alike must give equal bits, unless sums may be in any order.

    Args:
        calls: what to call.
        device, logit_stds, seed, family, attention, run, on_progress: as in `measure`.

    Raises:
        RuntimeError: the kernels cannot run here.
    """
    _check_kernels_run()
    options = {"seed": seed, "family": family}
    given = options | {"device": torch.device(device), "attention": attention}
    jobs = [
        Job(f"{call.id}, logit std {x:g}", _measure_call, given | {"call": call, "logit_std": x})
        # Side by side in processes, calls of different kinds are compiled.
        for x, call in itertools.product(logit_stds, calls)
    ]
    settings = {"device": str(device), **options}
    return _report(jobs, settings, run, on_progress)


def check_family(family: str, device: torch.device | str) -> None:
    """Refuse a family of kernels that cannot run calls on a device.

    Raises:
        ValueError: it cannot.
    """
    from .kernels import families, launch

    if family != "hopper":
        return
    x = torch.empty(0, device=device)
    arch = launch.architecture(x) if x.is_cuda or launch.is_interpreted() else x.device.type
    call = {"head_dim": 64, "value_dim": 64, "rows": 1, "group": 1, "weighed_by": None}
    release = families.triton_release()
    ran = families.pick_family(
        arch, torch.bfloat16, **call, fits_tma=True, release=release, choice=family
    )
    if ran != family:  # a warning has said which releases will do
        raise ValueError("the family of kernels 'hopper' needs another release of Triton")


def _measure_call(
    call: KernelCall,
    logit_std: float,
    *,
    device: torch.device,
    seed: int,
    family: str | None,
    attention: Callable[..., Tensor],
) -> list[Measurement]:
    """Measure one call with one set of inputs."""
    case, dtype = call.case, call.case.dtype
    scale = case.head_dim**-0.5
    inputs = testing.make_inputs(
        case, logit_std=logit_std, scale=scale, seed=seed, device=device
    )._asdict()
    generator = torch.Generator().manual_seed(seed + 1)
    options = {**testing.make_options(case, device=device), "return_lse": True}
    options |= {"identity_gain": 0.0, "scale": scale}
    if call.terms == "learned":
        if case.has_own_keys:
            del options["identity_gain"]
        del options["scale"]
        for name, size in {**_GAINS, "scale": scale}.items():
            if name not in options and (name != "skip_gain" or case.residual_dtype is not None):
                # Of either sign and of about one size.
                sign = torch.randint(2, (case.heads,), generator=generator) * 2 - 1
                gain = size * sign * (1 + 0.2 * torch.rand(case.heads, generator=generator))
                inputs[name] = gain.to(device)
    elif call.terms == "plain":
        options["center_gain"] = 0.0
    rows = (case.batch, case.heads, case.queries)
    d_out = torch.randn(*rows, case.value_dim, generator=generator).to(dtype).to(device)
    d_lse = torch.randn(rows, generator=generator).to(device)

    def differentiate(function: Callable, tensors: dict[str, Tensor], **others: Any) -> dict:
        return testing.forward_backward(function, tensors, d_out, d_lse, **options, **others)

    deterministic = {} if call.deterministic else {"deterministic": False}
    with _kernels_of(family) as families, testing.poison_empty():
        actual, *again = (
            differentiate(attention, inputs, impl="triton", **deterministic)
            for _ in range(_REPETITIONS)
        )
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    golden, spread = testing.rounding_spread(
        lambda: differentiate(shaped_attention, exact, impl="reference"), dtype
    )
    eager = differentiate(testing.eager_attention, inputs)
    dtype_name = next(name for name, x in DTYPES.items() if x == dtype)
    is_centred = call.terms == "centred" and case.residual_dtype is None
    rows: list[_Row] = []
    for name, right in golden.items():
        errors = (_error(x[name], right) for x in (actual, eager))
        if name == "out" and is_centred:
            rows.append((CENTRED, *errors, CENTRED_BUDGET[dtype_name]))
            continue
        # One rounding of the result; a gradient's product has a factor that is rounded too.
        rounding = testing.rounding_error(actual[name].dtype)
        rounding *= 2 if name.startswith("grad") else 1
        rounding += 8 * testing.rounding_error(torch.float32)
        rows.append((_named(name), *errors, _budget(name, right, spread, eager, rounding)))
    varying = () if call.deterministic else ("grad q", "grad scale")
    changed = sum(
        not torch.equal(x, other[name])
        for other in again
        for name, x in actual.items()
        if name not in varying
    )
    rows.append((REPEATS, float(changed), None, 0.0))
    ran = " and ".join(sorted(families))
    return [
        Measurement("triton", call.id, dtype_name, case.queries, logit_std, *row, ran)
        for row in rows
    ]


def _error(actual: Tensor, golden: Tensor) -> float:
    """Relative error of the finite elements; infinite where others differ."""
    finite = golden.isfinite()
    if not torch.equal(actual[~finite].to(golden), golden[~finite]):
        return math.inf
    return testing.relative_error(actual[finite], golden[finite])


def _check_kernels_run() -> None:
    from .environment import kernel_availability

    kernels = kernel_availability()
    if not kernels["available"]:
        raise RuntimeError(f'impl "triton" cannot run here: {kernels["reason"]}')


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _prefix_mean(v: Tensor) -> Tensor:
    """Mean of the values up to each row, summed in at least float32 and rounded once."""
    wide = torch.promote_types(v.dtype, torch.float32)
    count = torch.arange(1, v.shape[-2] + 1, dtype=wide, device=v.device)
    return (v.to(wide).cumsum(-2) / count[:, None]).to(v.dtype)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor, *, scale: Tensor, **gains: Tensor
) -> Tensor:
    """What one writes without a fused operator: torch's attention and a mean, in the dtype of q.

    As favourable as it can be: the mean is summed in float32, and a learnable scale costs no
    rounding.
    """
    constant = scale.detach()
    # A factor of exactly 1 that carries the gradient.
    q = q * (scale / constant).to(q.dtype)[:, None, None]
    weight = {name: gain.to(v.dtype)[:, None, None] for name, gain in gains.items()}
    branch = weight["softmax_gain"] * _softmax(q, k, v, constant[0].item())
    branch = branch - weight["center_gain"] * _prefix_mean(v)
    branch = branch + weight["identity_gain"] * v
    return weight["skip_gain"] * residual + weight["branch_gain"] * branch
