"""The oracle itself: against the formula written as loops, finite differences and its limits."""

import itertools
import math

import pytest
import torch

from shaped_attn import shaped_attention
from shaped_attn.testing import Case, eager_attention, make_inputs, make_options

GAINS = {
    "identity_gain": 0.7,
    "softmax_gain": 1.3,
    "center_gain": 0.9,
    "skip_gain": 0.6,
    "branch_gain": 0.4,
    "scale": 0.3,
}


def loops(q, k, v, residual, *, visible, q_offset, log_prior=None, **gains):
    """The formula for Python floats, one query at a time."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out = q.new_zeros(batch, heads, queries, v.shape[3])
    lse = q.new_full((batch, heads, queries), -math.inf)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        keys = [j for j in range(k.shape[2]) if visible(b, h, i, j)]
        branch = q.new_zeros(v.shape[3])
        if gains["identity_gain"] != 0:
            branch += gains["identity_gain"] * v[b, h // group, q_offset + i]
        prior = {
            j: 1 / len(keys) if log_prior is None else math.exp(log_prior[h, i, j]) for j in keys
        }
        total = sum(prior.values())
        if total > 0:
            weights = {
                j: (1 if log_prior is None else prior[j])
                * math.exp(gains["scale"] * (q[b, h, i] @ k[b, h // group, j]).item())
                for j in keys
            }
            norm = sum(weights.values())
            lse[b, h, i] = math.log(norm)
            for j in keys:
                p = total * weights[j] / norm
                mixed = gains["softmax_gain"] * p - gains["center_gain"] * prior[j]
                branch += mixed * v[b, h // group, j]
        out[b, h, i] = gains["branch_gain"] * branch
        if residual is not None:
            out[b, h, i] += gains["skip_gain"] * residual[b, h, i]
    return out, lse


@pytest.mark.parametrize("q_offset", [None, 0, 2, -2])
@pytest.mark.parametrize("padding", [None, "both"])
@pytest.mark.parametrize("mask", [None, "rows"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_reference_is_the_formula(is_causal, mask, padding, q_offset, device):
    case = Case(
        heads=4,
        kv_heads=2,
        queries=5,
        keys=7,
        head_dim=3,
        value_dim=2,
        dtype=torch.float64,
        is_causal=is_causal,
        q_offset=q_offset,
        padding=padding,
        mask=mask,
        residual_dtype=torch.float64,
    )
    q, k, v, residual = make_inputs(case, scale=GAINS["scale"], device=device)
    options = make_options(case, device=device)
    gains = GAINS | {"identity_gain": GAINS["identity_gain"] if case.has_own_keys else 0.0}
    offset = 2 if q_offset is None else q_offset
    start = options.get("key_start", torch.zeros(2, dtype=torch.long)).tolist()
    end = options.get("key_end", torch.full((2,), 7)).tolist()

    def visible(b, h, i, j):
        return (
            start[b] <= j < end[b]
            and (not is_causal or j <= offset + i)
            and (mask is None or bool(options["attn_mask"][i, j]))
        )

    out, lse = shaped_attention(
        q, k, v, residual, **gains, **options, return_lse=True, impl="reference"
    )
    expected, expected_lse = loops(q, k, v, residual, visible=visible, q_offset=offset, **gains)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_reference_prior_is_the_formula(is_causal, device):
    case = Case(queries=5, keys=6, head_dim=3, dtype=torch.float64, residual_dtype=torch.float64)
    q, k, v, residual = make_inputs(case, scale=GAINS["scale"], device=device)
    log_prior = torch.randn(4, 5, 6, dtype=torch.float64).to(device)
    log_prior[:, 1, 2] = -math.inf
    log_prior[0, 3] = -math.inf  # a row whose prior hides all keys
    out, lse = shaped_attention(
        q,
        k,
        v,
        residual,
        **GAINS,
        is_causal=is_causal,
        prior=log_prior,
        return_lse=True,
        impl="reference",
    )
    expected, expected_lse = loops(
        q,
        k,
        v,
        residual,
        visible=lambda b, h, i, j: log_prior[h, i, j] > -math.inf and not (is_causal and j > i + 1),
        q_offset=1,
        log_prior=log_prior,
        **GAINS,
    )
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)


GRADCHECK_CASES = [
    Case(1, 2, 1, 3, 4, 2, 3, torch.float64),
    Case(1, 2, 2, 4, 4, 2, 2, torch.float64, is_causal=True),
    Case(1, 2, 1, 3, 5, 2, 3, torch.float64, is_causal=True, q_offset=1),
    Case(2, 1, 1, 3, 3, 2, 2, torch.float64, is_causal=True, padding="both"),
    Case(2, 2, 1, 3, 4, 2, 2, torch.float64, mask="rows"),
    Case(1, 2, 2, 3, 3, 2, 2, torch.float64, is_causal=True, mask="random"),
]


@pytest.mark.parametrize("prior", [False, True], ids=["uniform", "prior"])
@pytest.mark.parametrize("gain_shape", [(), (2,)], ids=["scalar", "head"])
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.id)
def test_reference_gradcheck(case, gain_shape, prior, device):
    """All inputs, all gains and the log prior; out and lse."""
    case = Case(**{**vars(case), "residual_dtype": torch.float64})
    if gain_shape and case.heads != gain_shape[0]:
        gain_shape = (case.heads,)
    inputs = make_inputs(case, scale=1.0, device=device)
    options = make_options(case, device=device)
    gains = 0.5 + torch.rand(6, *gain_shape, dtype=torch.float64).to(device)
    log_prior = None
    if prior:
        log_prior = torch.randn(case.heads, case.queries, case.keys, dtype=torch.float64)
        log_prior = log_prior.to(device)

    def function(q, k, v, residual, gains, log_prior):
        out, lse = shaped_attention(
            q,
            k,
            v,
            residual,
            **dict(zip(GAINS, gains.unbind(0), strict=True)),
            **options,
            prior=log_prior,
            return_lse=True,
            impl="reference",
        )
        # Finite differences of -inf are NaN. Rows without a key must get no gradient from lse.
        return out, lse.nan_to_num(neginf=0.0)

    arguments = [*inputs, gains, log_prior]
    arguments = [None if x is None else x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(function, arguments)
    if case.batch == 1:
        assert torch.autograd.gradgradcheck(function, arguments)


def test_reference_gradient_of_a_hidden_prior_entry_is_zero(device):
    q, k, v, _ = make_inputs(Case(queries=3, head_dim=2, dtype=torch.float64), device=device)
    log_prior = torch.full((3, 3), -math.inf, dtype=torch.float64, device=device).triu(1)
    log_prior.requires_grad_()
    out = shaped_attention(q, k, v, prior=log_prior, impl="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), log_prior)
    assert gradient.isfinite().all()
    assert (gradient[0, 1:] == 0).all()
    assert gradient[2].abs().min() > 0


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_reference_uniform_prior_as_a_tensor_changes_nothing_but_lse(is_causal, device):
    q, k, v, _ = make_inputs(Case(queries=9, head_dim=4, dtype=torch.float64), device=device)
    count = torch.arange(1, 10, device=device) if is_causal else torch.full((9,), 9, device=device)
    log_prior = -count.double().log()[:, None].expand(9, 9)
    options = {"is_causal": is_causal, "return_lse": True, "impl": "reference"}
    out, lse = shaped_attention(q, k, v, **options)
    with_prior, weighted = shaped_attention(q, k, v, prior=log_prior, **options)
    torch.testing.assert_close(with_prior, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted, lse - count.double().log(), rtol=1e-12, atol=1e-12)


def test_reference_prior_is_the_attention_matrix_at_zero_logits(device):
    """D softmax(log A0) = A0: with q = 0 and equal gains any prior leaves identity * v."""
    q, k, v, _ = make_inputs(Case(queries=6, head_dim=4, dtype=torch.float64), device=device)
    log_prior = torch.randn(4, 6, 6, dtype=torch.float64).to(device)
    out = shaped_attention(0 * q, k, v, prior=log_prior, impl="reference")
    torch.testing.assert_close(out, v, rtol=1e-13, atol=1e-12)
    out = shaped_attention(
        0 * q, k, v, identity_gain=0.0, center_gain=0.0, prior=log_prior, impl="reference"
    )
    torch.testing.assert_close(out, log_prior.exp() @ v, rtol=1e-13, atol=1e-12)


def test_reference_default_scale_is_one_over_sqrt_of_width_and_head_dim(device):
    q, k, v, _ = make_inputs(
        Case(heads=4, queries=5, head_dim=8, dtype=torch.float64), device=device
    )
    width, head_dim = 4 * 8, 8
    out = shaped_attention(q, k, v, impl="reference")
    expected = shaped_attention(q, k, v, scale=1 / math.sqrt(width * head_dim), impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_computes_in_float32_and_eager_in_the_input_dtype(dtype, device):
    case = Case(queries=96, dtype=dtype, is_causal=True)
    q, k, v, _ = make_inputs(case, logit_std=0.1, device=device)
    options = {"identity_gain": 0.0, "is_causal": True}
    golden = shaped_attention(q.double(), k.double(), v.double(), **options, impl="reference")
    out, lse = shaped_attention(q, k, v, **options, return_lse=True, impl="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    error = (out.double() - golden).norm() / golden.norm()
    eager = eager_attention(q, k, v, **options)
    assert eager.dtype == dtype
    # One rounding of the result against rounded softmax and mean, which almost cancel.
    assert error < eps / 2
    assert (eager.double() - golden).norm() / golden.norm() > 3 * eps
