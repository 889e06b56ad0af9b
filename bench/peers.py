"""The operator, by family of kernels too, its peers, and the composition that does as much.

A candidate takes the tensors of a `Problem` by name and returns the output. "plain" candidates
compute softmax attention alone, which is less work; "whole" ones the whole formula.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import FORMS, AttentionCase
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from shaped_attn import ESPA, USPA, shaped_attention
from shaped_attn.fidelity import check_family
from shaped_attn.testing import assert_within_budget, eager_attention, forward_backward

GAINS = ("identity_gain", "softmax_gain", "center_gain", "skip_gain", "branch_gain")
PLAIN_GAINS = {"identity_gain": 0.0, "center_gain": 0.0}
PRIORS = {"e_spa": ESPA(decay_in=0.5, decay_out=0.1), "u_spa": USPA(rho_in=0.2, rho_out=0.5)}

# What eager attention may have in the T x S matrices of all heads, and what the float64 reference
# does for the few heads that are checked.
EAGER_ELEMENTS = {"cuda": 2**29, "cpu": 2**25}
REFERENCE_LENGTH = 2048

Function = Callable[[Mapping[str, Tensor]], Tensor]


class Problem(NamedTuple):
    """Inputs of one case: tensors to differentiate, other arguments, and the gradient of out."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    d_out: Tensor


class Candidate(NamedTuple):
    """A function to time, and whether it computes the whole formula of the case or plain softmax.

    is_composition: whether it is torch's attention plus a compiled epilogue. family: of our
    kernels, chosen for the function and its derivative; None for the choice in force, and of peers.
    """

    function: Function
    is_whole: bool
    is_composition: bool = False
    family: str | None = None

    def chosen(self) -> AbstractContextManager[None]:
        """Choose its family of kernels."""
        if self.family is None:
            return nullcontext()
        from shaped_attn.kernels import use_family

        return use_family(self.family)

    def names(self, problem: Problem) -> list[str]:
        """Tensors that it takes, all differentiated."""
        return [name for name in problem.tensors if self.is_whole or name in ("q", "k", "v")]


class NotHere(Exception):
    """A peer that this machine or this case rules out; the message says why."""


def draw(case: AttentionCase, device: torch.device) -> Problem:
    """Draw normal inputs on the device, where a large case takes no time."""
    sizes = case.sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    rows, keys = (
        (sizes.batch, sizes.heads, sizes.queries),
        (sizes.batch, sizes.kv_heads, sizes.keys),
    )
    tensors = {
        "q": normal(*rows, sizes.head_dim),
        "k": normal(*keys, sizes.head_dim),
        "v": normal(*keys, sizes.value_dim),
    }
    if sizes.residual_dtype is not None:
        tensors["residual"] = normal(*rows, sizes.value_dim, dtype=sizes.residual_dtype)
    if case.form == "learnable":
        for name in GAINS:
            tensors[name] = 1 + 0.1 * normal(sizes.heads, dtype=torch.float32)
    is_shaped = sizes.residual_dtype is not None
    options = {
        **FORMS[case.form],
        "is_causal": sizes.is_causal,
        "scale": sizes.scale if is_shaped else sizes.head_dim**-0.5,
    }
    if case.form in PRIORS:
        options["prior"] = PRIORS[case.form]
    return Problem(tensors, options, normal(*rows, sizes.value_dim))


def ours(problem: Problem, impl: str = "auto") -> Candidate:
    """The operator."""
    return Candidate(
        lambda tensors: shaped_attention(**tensors, **problem.options, impl=impl), is_whole=True
    )


# Beside the operator with the family that "auto" picks, where the Hopper kernels run: the family,
# and whether sums have a fixed order, which is the backward's alone.
FAMILIES = {
    "ours-hopper": ("hopper", True),
    "ours-hopper-any-order": ("hopper", False),
    "ours-portable": ("portable", True),
}


def ours_of(problem: Problem, name: str) -> Candidate:
    """The operator with an entry of `FAMILIES`.

    Raises:
        NotHere: this is no Hopper GPU, or Triton none that its kernels are for.
    """
    family, deterministic = FAMILIES[name]
    try:
        check_family("hopper", problem.d_out.device)
    except (ValueError, ImportError) as error:  # or there is no Triton
        raise NotHere(str(error)) from error
    options = {**problem.options, "deterministic": deterministic, "impl": "triton"}
    return Candidate(
        lambda tensors: shaped_attention(**tensors, **options), is_whole=True, family=family
    )


def composition(case: AttentionCase, problem: Problem, base: Candidate) -> Candidate:
    """A plain peer and, after it, the rest of the formula in one compiled function.

    The function is compiled for the sizes of the case alone, and as a whole: `fullgraph` refuses
    graph breaks, and the eager code that Dynamo turns to at eight sets of shapes.
    """
    sizes, options = case.sizes, problem.options
    groups = sizes.heads // sizes.kv_heads

    def epilogue(softmax: Tensor, v: Tensor, residual: Tensor, gains: tuple) -> Tensor:
        identity, softmax_gain, center, skip, branch = (
            gain[:, None, None] if isinstance(gain, Tensor) else gain for gain in gains
        )
        if sizes.is_causal:
            count = torch.arange(1, v.shape[2] + 1, device=v.device, dtype=torch.float32)
            mean = v.cumsum(2, dtype=torch.float32) / count[:, None]
        else:
            mean = v.mean(2, keepdim=True, dtype=torch.float32)
        own = v
        if groups > 1:
            own, mean = (x.repeat_interleave(groups, dim=1) for x in (v, mean))
        out = identity * own + softmax_gain * softmax - center * mean
        return (skip * residual + branch * out).to(residual.dtype)

    compiled = torch.compile(epilogue, fullgraph=True, dynamic=False)

    def function(tensors: Mapping[str, Tensor]) -> Tensor:
        gains = tuple(tensors.get(name, options.get(name, 1.0)) for name in GAINS)
        return compiled(base.function(tensors), tensors["v"], tensors["residual"], gains)

    return Candidate(function, is_whole=True, is_composition=True)


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled, and thrown away or not."""
    return counters["stats"]["unique_graphs"]


class Expected(NamedTuple):
    """Out and gradients for the heads of the first key head of one entry, in float64 and eager."""

    golden: dict[str, Tensor]
    eager: dict[str, Tensor]


def expected(case: AttentionCase, problem: Problem, is_whole: bool) -> Expected:
    """Compute what `check` compares with, for the whole formula or for plain attention."""
    options = problem.options if is_whole else _plain_options(problem)
    names = [name for name in problem.tensors if is_whole or name in "qkv"]
    few = {name: _part(case, name, problem.tensors[name]) for name in names}
    d_out = _part(case, "out", problem.d_out)
    impl = "reference" if case.sizes.keys <= REFERENCE_LENGTH else "torch"
    exact = {name: x.double() for name, x in few.items()}
    return Expected(
        forward_backward(shaped_attention, exact, d_out.double(), **options, impl=impl),
        forward_backward(eager_attention, few, d_out, **options),
    )


def check(case: AttentionCase, problem: Problem, candidate: Candidate, right: Expected) -> None:
    """Compare a candidate with float64.

    The budget is that of the tests of the operator: twice the error of eager torch in the dtype of
    the case, and the roundings of a result.

    Raises:
        AssertionError: an error is over budget.
    """
    tensors = {name: problem.tensors[name] for name in candidate.names(problem)}
    found = forward_backward(lambda **tensors: candidate.function(tensors), tensors, problem.d_out)
    for name, value in found.items():
        argument = name.removeprefix("grad ")
        if argument in GAINS:
            continue  # sums over all batch entries
        rounding = None
        if name.startswith("grad"):
            # Two roundings: of one factor of the product, and of its result.
            rounding = torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps
        assert_within_budget(
            _part(case, argument, value),
            right.golden[name],
            right.eager[name],
            factor=2,
            name=name,
            rounding=rounding,
        )


def _part(case: AttentionCase, name: str, x: Tensor) -> Tensor:
    groups = case.sizes.heads // case.sizes.kv_heads
    if name in GAINS:
        return x[:groups]
    return x[:1, : 1 if name in ("k", "v") else groups]


def _plain_options(problem: Problem) -> dict[str, Any]:
    options = {name: problem.options[name] for name in ("is_causal", "scale")}
    return {**options, **PLAIN_GAINS}


def _sdpa(backend: SDPBackend | None) -> Callable[[AttentionCase, Problem], Candidate]:
    def build(case: AttentionCase, problem: Problem) -> Candidate:
        if backend is not None and not torch.cuda.is_available():
            raise NotHere("needs a GPU")
        options = {name: problem.options[name] for name in ("is_causal", "scale")}
        options["enable_gqa"] = case.sizes.kv_heads != case.sizes.heads

        def attend(tensors: Mapping[str, Tensor]) -> Tensor:
            q, k, v = (tensors[name] for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, **options)

        def forced(tensors: Mapping[str, Tensor]) -> Tensor:
            # As the only one allowed, so that it cannot fall back to another.
            with sdpa_kernel(backend):
                return attend(tensors)

        return Candidate(attend if backend is None else forced, is_whole=False)

    return build


def _flex(case: AttentionCase, problem: Problem) -> Candidate:
    sizes = case.sizes
    device = problem.d_out.device
    block_mask = None
    if sizes.is_causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: j <= i, None, None, sizes.queries, sizes.keys, device=device
        )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def function(tensors: Mapping[str, Tensor]) -> Tensor:
        return compiled(
            *(tensors[name] for name in "qkv"),
            block_mask=block_mask,
            scale=problem.options["scale"],
            enable_gqa=sizes.kv_heads != sizes.heads,
        )

    return Candidate(function, is_whole=False)


def _flash_attention_4(case: AttentionCase, problem: Problem) -> Candidate:
    if importlib.util.find_spec("flash_attn") is None:
        raise NotHere("flash-attn-4 is not installed")
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise NotHere(f"flash_attn.cute cannot be imported: {error}") from error

    def function(tensors: Mapping[str, Tensor]) -> Tensor:
        out = flash_attn_func(
            *(tensors[name].transpose(1, 2) for name in "qkv"),
            softmax_scale=problem.options["scale"],
            causal=problem.options["is_causal"],
        )
        out = out[0] if isinstance(out, tuple) else out  # some versions return lse too
        return out.transpose(1, 2)

    return Candidate(function, is_whole=False)


def _eager(case: AttentionCase, problem: Problem) -> Candidate:
    sizes = case.sizes
    elements = sizes.batch * sizes.heads * sizes.queries * sizes.keys
    if elements > EAGER_ELEMENTS[problem.d_out.device.type]:
        raise NotHere(f"its matrices would have {elements:.2g} elements")
    return Candidate(lambda tensors: eager_attention(**tensors, **problem.options), is_whole=True)


# Each builds its candidate, or raises `NotHere`.
PEERS = {
    "sdpa": _sdpa(None),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flash_attention_4": _flash_attention_4,
    "flex": _flex,
    "eager": _eager,
}
