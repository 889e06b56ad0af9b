"""The Hopper backward against float64: on a Hopper GPU, or in the emulator of Gluon kernels."""

import dataclasses
import math

import pytest
import torch

from shaped_attn.kernels.attention import (
    AttentionGradients,
    Call,
    Needs,
    attention_bwd,
    attention_fwd,
)
from shaped_attn.kernels.families import use_family
from shaped_attn.kernels.hopper import tiles
from shaped_attn.kernels.hopper.attention_bwd import BackwardPlan
from shaped_attn.kernels.hopper.bwd_dkdv import attention_bwd_dkdv_kernel
from shaped_attn.kernels.hopper.bwd_dq import attention_bwd_dq_kernel
from shaped_attn.kernels.launch import assume_architecture
from shaped_attn.testing import rounding_error
from shaped_attn.visibility import Visibility

pytestmark = pytest.mark.usefixtures("poison")

IDENTITY, SOFTMAX, CENTER, SKIP, BRANCH, SCALE = range(6)


# Triton 3.9 has tiles of the fused kernel for one width: take those of 3.6 everywhere.
fused = pytest.mark.usefixtures("all_fused_tiles")


@pytest.fixture
def all_fused_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "_FUSED_3_9", tiles._FUSED)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a backward is run for; gains in their order, one number for all heads or one each."""

    queries: int = 100
    keys: int = 150
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = True
    q_offset: int | None = None
    key_start: tuple[int, ...] | None = None
    key_end: tuple[int, ...] | None = None
    gains: tuple = (0.7, 1.1, 0.8, 1.0, 0.9, 0.2)
    d_out_dtype: torch.dtype | None = None


CASES = {
    "causal": Case(),
    "full": Case(is_causal=False, queries=140),
    "wide": Case(head_dim=128, value_dim=128),
    "wide and full": Case(head_dim=128, value_dim=128, is_causal=False, keys=130),
    "one query, one key": Case(1, 1),
    "exact tiles": Case(192, 192),
    "clipped": Case(head_dim=40, value_dim=96),
    "narrow": Case(heads=2, key_heads=2, head_dim=8, value_dim=24, is_causal=False),
    "offset before the keys": Case(140, 90, q_offset=-40, gains=(0.0, 1.1, 0.8, 1.0, 0.9, 0.2)),
    "offset past the keys": Case(70, 90, q_offset=80, gains=(0.0, 1.1, 0.8, 1.0, 0.9, 0.2)),
    "keys that nobody sees": Case(40, 400, q_offset=20),
    "padded": Case(key_start=(0, 37, 150), key_end=(100, 149, 150)),
    "padded and full": Case(is_causal=False, key_start=(65, 0), key_end=(140, 0)),
    "group of two": Case(
        heads=4,
        key_heads=2,
        gains=(
            (0.5, -0.6, 0.0, 1.0),
            (1.1, -0.7, 0.0, 0.4),
            (0.8, 0.0, -0.5, 1.0),
            1.0,
            (0.9, 1.0, -1.2, 0.7),
            (-0.2, 0.1, 0.0, 0.3),
        ),
    ),
    "group of three, half": Case(
        heads=3,
        dtype=torch.float16,
        key_start=(3,),
        gains=(0.7, (1.1, 0.3, -0.5), 0.8, 1.0, 0.9, (0.2, -0.1, 0.05)),
    ),
    "group of three, wide and full": Case(
        heads=3, head_dim=128, value_dim=128, is_causal=False, keys=70
    ),
    "group without scales": Case(heads=2, gains=(0.7, 1.1, 0.8, 1.0, 0.9, 0.0)),
    "negative": Case(gains=(0.7, -1.1, 0.8, 1.0, 0.9, -0.2)),
    "no softmax": Case(gains=(0.7, 0.0, 0.8, 1.0, 0.9, 0.2)),
    "plain": Case(gains=(0.0, 1.0, 0.0, 1.0, 1.0, 0.2)),
    "plain and negative": Case(gains=(0.0, 1.0, 0.0, 1.0, -0.5, 0.2)),
    "plain group": Case(heads=2, gains=(0.0, (1.0, -1.0), 0.0, 1.0, 1.0, 0.2)),
    "plain and half": Case(dtype=torch.float16, gains=(0.0, 1.0, 0.0, 1.0, -0.5, 0.2)),
    "half, many keys": Case(20, 700, dtype=torch.float16, is_causal=False),
    "gradient in float32": Case(d_out_dtype=torch.float32, heads=2, key_heads=2),
    "widest": Case(heads=2, head_dim=256, value_dim=256, key_start=(3,)),
    "widest and full": Case(70, 130, head_dim=192, value_dim=192, is_causal=False),
    "widest, plain and negative": Case(
        head_dim=136, value_dim=256, gains=(0.0, 1.0, 0.0, 1.0, -0.5, 0.2)
    ),
    "widest group of two, half": Case(
        heads=2,
        head_dim=256,
        value_dim=160,
        dtype=torch.float16,
        gains=((0.5, -0.6), (1.1, 0.0), 0.8, 1.0, 0.9, (-0.2, 0.1)),
    ),
}


def drawn(case: Case) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """The call, d_out and d_lse of a case."""
    batch = len(case.key_start or case.key_end or (0,))
    dims = {
        "q": (batch, case.heads, case.queries, case.head_dim),
        "k": (batch, case.key_heads, case.keys, case.head_dim),
        "v": (batch, case.key_heads, case.keys, case.value_dim),
        "d_out": (batch, case.heads, case.queries, case.value_dim),
    }
    # A layout (B, T, H, D), as a projection leaves it.
    tensors = {
        name: torch.randn(B, T, H, D).to(case.dtype).transpose(1, 2)
        for name, (B, H, T, D) in dims.items()
    }
    if case.d_out_dtype is not None:
        tensors["d_out"] = torch.randn(dims["d_out"], dtype=case.d_out_dtype)
    offset = case.keys - case.queries if case.q_offset is None else case.q_offset
    ranges = (
        None if ends is None else torch.tensor(ends, dtype=torch.int32)
        for ends in (case.key_start, case.key_end)
    )
    gains = tuple(
        gain if isinstance(gain, float) else torch.tensor(gain, dtype=torch.float32)
        for gain in case.gains
    )
    visibility = Visibility(case.is_causal, offset, *ranges)
    call = Call(tensors["q"], tensors["k"], tensors["v"], None, gains, visibility)
    return call, tensors["d_out"], torch.randn(dims["d_out"][:3])


def exact(call: Call, d_out: torch.Tensor, d_lse: torch.Tensor):
    """Row terms (17), and of each gradient its float64 value and what bounds its error.

    The bounds follow from one rounding of each W and dS to the dtype of v, and from float32
    arithmetic everywhere else; they are sums of sizes, with no cancellation.
    """
    q, k, v, _, gains, visibility, _, _ = call
    B, H, T, D = q.shape
    S, DV, group = k.shape[2], v.shape[3], H // k.shape[1]
    unit, float32 = rounding_error(v.dtype), rounding_error(torch.float32)
    # Half of the smallest number, which float16 reaches.
    tiny = torch.finfo(v.dtype).smallest_normal * unit
    identity, softmax, center, _, branch, scale = (
        torch.as_tensor(gain).double().expand(H).view(1, H, 1, 1) for gain in gains
    )
    rounded = d_out.to(v.dtype).double()
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))

    rows, columns = torch.arange(T)[:, None], torch.arange(S)[None]
    seen = torch.ones(B, 1, T, S, dtype=torch.bool)
    if visibility.is_causal:
        seen &= columns <= rows + visibility.q_offset
    if visibility.key_start is not None:
        seen &= columns >= visibility.key_start.view(B, 1, 1, 1)
    if visibility.key_end is not None:
        seen &= columns < visibility.key_end.view(B, 1, 1, 1)
    n = seen.sum(-1, keepdim=True)
    scores = (scale * q @ k.mT).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    P = torch.where(seen, (scores - lse).exp(), 0.0)
    b, c = branch * softmax, branch * center
    sign, size = b.sign(), torch.where(b == 0.0, 1.0, b.abs())
    r = size * P
    t = torch.where(n > 0, lse / math.log(2) - size.log2(), math.inf)
    c_n = torch.where(n > 0, c / n.clamp(min=1), 0.0)
    dP = rounded @ v.mT
    delta = sign * (rounded * (P @ v)).sum(-1, keepdim=True) - d_lse.double()[..., None] / size
    W = torch.where(seen, sign * r - c_n, 0.0)
    dS = r * (sign * dP - delta)

    # Relative error of r, then errors of W and dS as they are multiplied.
    exponent = (2 * D * (scale * q).abs() @ k.mT.abs() + t.abs() + 8) * 2 * float32
    e = torch.where(seen, exponent, 0.0)
    W_error = unit * W.abs() + 2 * (e * r + 4 * float32 * c_n.abs()) * seen + tiny
    dP_error = 2 * DV * float32 * rounded.abs() @ v.mT.abs()
    parts = dP.abs() + delta.abs()
    dS_error = unit * dS.abs() + 2 * r * (e * parts + dP_error + 4 * float32 * parts) + tiny * seen

    def of_group(x):
        return x.unflatten(1, (-1, group)).sum(2)

    def bound(product, errors, sizes, summands):
        """Bound the errors of a sum of products whose factors have `errors`."""
        error = errors + 2 * (summands + 8) * float32 * sizes
        return error + unit * (product.abs() + error) + tiny

    largest = scale.abs().unflatten(1, (-1, group)).amax(2)
    own = torch.zeros_like(v)
    positions = torch.arange(T) + visibility.q_offset
    inside = (positions >= 0) & (positions < S)
    own[:, :, positions[inside]] = (branch * identity * d_out.double())[:, :, inside]
    dv, dk = of_group(W.mT @ rounded + own), of_group(scale * (dS.mT @ q))
    dS_k = dS @ k
    dq = scale * dS_k
    dv_error = of_group(W_error.mT @ rounded.abs())
    dk_error = of_group(scale.abs() * (dS_error.mT @ q.abs()))
    dk_error += largest * of_group(tiny * q.abs().sum(2, keepdim=True))
    dS_k_error = dS_error @ k.abs()
    terms = torch.zeros(3, B, H, -(-T // 128) * 128)
    terms[0] = math.inf
    terms[:, :, :, :T] = torch.stack([x.expand(B, H, T, 1)[..., 0] for x in (t, delta, c_n)])
    sums = dS.abs() @ k.abs()
    d_scale = (q * dS_k).sum((0, 2, 3))
    d_scale_error = (q.abs() * (dS_k_error + 2 * (S + D * T) * float32 * sums)).sum((0, 2, 3))
    return terms, {
        "q": (dq, bound(dq, scale.abs() * dS_k_error, scale.abs() * sums, S)),
        "k": (
            dk,
            bound(dk, dk_error, of_group(scale.abs() * dS.abs().mT @ q.abs()), group * T),
        ),
        "v": (
            dv,
            bound(dv, dv_error, of_group(W.abs().mT @ rounded.abs() + own.abs()), group * T),
        ),
        "scale": (d_scale, d_scale_error),
    }


def moved(x, device):
    """Tensors and tuples of them on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        parts = [moved(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


@pytest.fixture
def launched(hopper, device):
    """Gradients of the Hopper kernels from exact row terms, `without` some of the launches."""

    def launch(call, d_out, terms, seed=0, without=(), is_deterministic=True):
        call, d_out, terms = moved((call, d_out, terms), device)
        plan = BackwardPlan(call, d_out, Needs(scale=True), is_deterministic)
        plan.preprocess = lambda *_: (terms, None, None)
        for name in without:
            setattr(plan, name, lambda *_: None)
        gradients = AttentionGradients(
            *(torch.empty(x.shape, dtype=x.dtype, device=device) for x in (call.q, call.k, call.v)),
            None,
        )
        with hopper(seed=seed, interleave=2):
            return moved(plan(call, None, d_out, None, gradients), "cpu")

    return launch


def too_far(actual: AttentionGradients, expected: dict) -> dict[str, float]:
    """The largest error of each gradient that is out of bounds, in units of its bound."""
    errors = {
        name: (getattr(actual, name).double() - golden).abs() / bound.clamp(min=1e-300)
        for name, (golden, bound) in expected.items()
    }
    return {name: error.max().item() for name, error in errors.items() if not (error <= 1).all()}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, launched):
    call, d_out, d_lse = drawn(CASES[name])
    terms, expected = exact(call, d_out, d_lse)
    assert not too_far(launched(call, d_out, terms), expected)


@fused
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_fused_kernel(name, launched):
    call, d_out, d_lse = drawn(CASES[name])
    terms, expected = exact(call, d_out, d_lse)
    assert not too_far(launched(call, d_out, terms, is_deterministic=False), expected)


@fused
def test_fused_where_the_scales_of_a_group_allow():
    needs = Needs()
    for name, is_fused in {
        "causal": True,
        "group without scales": True,
        "group of two": False,
    }.items():
        call, d_out, _ = drawn(CASES[name])
        assert BackwardPlan(call, d_out, needs, is_deterministic=False).is_fused == is_fused
        assert not BackwardPlan(call, d_out, needs).is_fused


def test_equal_bits_under_every_schedule(launched):
    call, d_out, d_lse = drawn(CASES["group of two"])
    terms, _ = exact(call, d_out, d_lse)
    first, *others = (launched(call, d_out, terms, seed) for seed in range(4))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a is None or torch.equal(a, b)


# In the emulator, and there only, `warp_specialize` and a wait for products order what other
# warps of a partition have done.
UNSEEN = ("_kernel: barrier() left out #1", "_meet: barrier() left out #1")
# What only the fused kernel comes to.
FUSED_ALONE = ("_meet", "_start_dq", "_add_dq", "dq, dv", "_effect")
# What only launches of dk or of dv come to, and only those of both.
ONE_ALONE = ("_mma_wait(0, deps=[dv, ", "D_OUT_EMPTY, step, C), count=1) left out #2")
BOTH_ALONE = ("_mma_wait(1, deps=[dv, ", "D_OUT_EMPTY, step, C), count=1) ahead of if")


@fused
@pytest.mark.parametrize(
    "name, width",
    [(name, width) for name in ("dkdv", "dq") for width in (64, 128, 256)]
    + [("fused", 64), ("fused", 128)],
)
@pytest.mark.interpreter
def test_every_synchronisation_counts(name, width, launched):
    from gluon_mutants import mutants
    from gluon_schedule import EmulationError

    kernel, without, case, gradients = {
        "dkdv": (attention_bwd_dkdv_kernel, ("dq",), Case(400, 200, q_offset=0), "kv"),
        "dq": (attention_bwd_dq_kernel, ("dkdv",), Case(200, 450), ("q", "scale")),
        "fused": (attention_bwd_dkdv_kernel, (), Case(400, 200, q_offset=0), "qkv"),
    }[name]
    call, d_out, d_lse = drawn(dataclasses.replace(case, head_dim=width, value_dim=width))
    terms, expected = exact(call, d_out, d_lse)
    expected = {gradient: expected[gradient] for gradient in gradients}
    options = {"without": without, "is_deterministic": name != "fused"}

    def is_right():
        try:
            return not too_far(launched(call, d_out, terms, **options), expected)
        except EmulationError:
            return False

    assert is_right()
    missed = set()
    for mutant in mutants(kernel):
        # These stand in a branch that is not taken.
        is_unseen = mutant.name.endswith(UNSEEN) or "warp_specialize" in mutant.name
        is_unseen |= name == "dq" and mutant.name == "_consumer: barrier() left out #1"
        is_unseen |= name == "dkdv" and any(part in mutant.name for part in FUSED_ALONE)
        alone = ONE_ALONE if width < 256 else BOTH_ALONE
        is_unseen |= any(part in mutant.name for part in alone)
        is_unseen |= name == "fused" and "_mma_wait(1, deps=[dv, " in mutant.name
        with mutant.active():
            if not is_unseen and is_right():
                missed.add(mutant.name)
    assert not missed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_backward(dtype, hopper, device):
    """Behind the portable forward and first launch: every gradient as the portable family's."""
    gains = (0.5, (1.1, -0.7), 0.8, 1.0, (0.9, 1.2), (-0.2, 0.1))
    call, d_out, d_lse = drawn(
        Case(40, 70, heads=2, dtype=dtype, gains=gains, d_out_dtype=torch.float32)
    )
    call = call._replace(residual=torch.randn(d_out.shape))
    _, expected = exact(call, d_out, d_lse)
    call, d_out, d_lse = moved((call, d_out, d_lse), device)
    q, k, v, residual, gains, visibility, _, _ = call
    needs = Needs(residual=True, gains=True, scale=True)
    with use_family("portable"):
        saved = attention_fwd(q, k, v, residual, gains, visibility, save_for_backward=True)
    with use_family("portable"), assume_architecture(90):
        portable = attention_bwd(
            d_out, d_lse, q, k, v, residual, gains, visibility, *saved[2:], needs=needs
        )
    gradients = AttentionGradients(*map(torch.empty_like, (q, k, v)), torch.empty_like(d_out))
    with hopper():
        actual = BackwardPlan(call, d_out, needs)(
            call, saved._replace(center=None), d_out, d_lse, gradients
        )
    # The sums of the first launch are the same.
    assert torch.equal(actual.residual, portable.residual)
    assert torch.equal(actual.gains, portable.gains)
    expected = {
        name: (getattr(portable, name).double(), 2 * bound.to(device))
        for name, (_, bound) in expected.items()
    }
    assert not too_far(actual, expected)
