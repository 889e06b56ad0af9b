"""E-SPA, U-SPA and dense priors: closed forms, and every implementation against float64."""

import itertools
import math

import pytest
import torch
from attention_calls import DTYPES

from shaped_attn import ESPA, USPA, shaped_attention
from shaped_attn.kernels.configs import TileConfig, override_config
from shaped_attn.priors import prior_matrix
from shaped_attn.testing import (
    Case,
    assert_within_budget,
    assert_within_spread,
    eager_attention,
    forward_backward,
    make_inputs,
    make_options,
    relative_error,
    rounding_spread,
)

pytestmark = pytest.mark.usefixtures("poison")

LARGE_TILES = TileConfig(block_t=128, block_s=64, num_warps=4, num_stages=1, sum_block=64)


def cholesky_factors(prior, tokens):
    kernels = prior.kernel(tokens)[0], prior.kernel(tokens, entering=True)[0]
    return [torch.linalg.cholesky(kernel) for kernel in kernels]


def cholesky_ratio(prior, tokens):
    """chol(S_out) chol(S_in)^{-1}, by linear algebra."""
    leaving, entering = cholesky_factors(prior, tokens)
    return torch.linalg.solve_triangular(entering, leaving, upper=False, left=False)


PAIRS = [
    ESPA(math.inf, 0.005),
    ESPA(0.5, 0.3),
    ESPA(1.0, 0.01),
    ESPA(0.2, 0.2),
    USPA(0.0, 0.8),
    USPA(0.4, 0.401),
    USPA(0.1, 0.9),
    USPA(0.3, 0.3),
    USPA(0.0, 0.0),
]


class TestClosedForms:
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 300])
    @pytest.mark.parametrize("prior", PAIRS, ids=str)
    def test_is_the_ratio_of_cholesky_factors(self, prior, tokens):
        found = prior_matrix(prior, tokens)[0]
        torch.testing.assert_close(found, cholesky_ratio(prior, tokens), rtol=0, atol=1e-12)
        assert (found >= 0).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("layers", [36, 72])
    @pytest.mark.parametrize("prior", [ESPA, USPA])
    def test_of_long_sequences(self, prior, layers):
        schedule = prior.schedule(layers)
        for layer in (0, 1, layers // 2, layers - 1):
            leaving, entering = cholesky_factors(schedule[layer], 2000)
            # Solving for A0 would lose more to rounding than the closed form.
            found = prior_matrix(schedule[layer], 2000)[0] @ entering
            torch.testing.assert_close(found, leaving, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("tokens", [1, 2, 50])
    @pytest.mark.parametrize("prior", PAIRS, ids=str)
    def test_without_a_mask_is_the_ratio_of_roots(self, prior, tokens):
        found = prior_matrix(prior, tokens, is_causal=False)[0]
        moved = found @ prior.kernel(tokens, entering=True)[0] @ found.mT
        torch.testing.assert_close(moved, prior.kernel(tokens)[0], rtol=0, atol=1e-13)
        assert (found >= 0).all()
        if isinstance(prior, USPA):
            torch.testing.assert_close(found, found.mT, rtol=0, atol=0)

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("layers", [1, 36, 72])
    @pytest.mark.parametrize("prior", [ESPA, USPA])
    def test_schedule_reaches_its_target(self, prior, layers, is_causal):
        """Sigma_L of layers without skips, and equal entries far down the diagonal."""
        schedule = prior.schedule(layers)
        kernel = torch.eye(128, dtype=torch.float64)
        diagonals = []
        for one in schedule:
            a0 = prior_matrix(one, 128, is_causal=is_causal)[0]
            kernel = a0 @ kernel @ a0.mT
            diagonals.append(a0[-1, -1])
        target = prior(decay_out=0.005) if prior is ESPA else prior(rho_out=0.8)
        torch.testing.assert_close(kernel, target.kernel(128)[0], rtol=0, atol=1e-12)
        for first, second in itertools.pairwise(schedule):
            assert torch.equal(first.kernel(9), second.kernel(9, entering=True))
        if is_causal and prior is ESPA:
            expected = math.sqrt(-math.expm1(-0.01)) ** (1 / layers)
            torch.testing.assert_close(
                torch.stack(diagonals), torch.full((layers,), expected, dtype=torch.float64)
            )

    @pytest.mark.parametrize("prior", PAIRS[:3] + PAIRS[4:7], ids=str)
    def test_float32_tables(self, prior):
        """What the kernels read: within 2e-5 of every entry above 1e-30, at 2,000 tokens."""
        exact = prior.table(2000)
        rounded = type(exact)(exact.form, exact.values.float())
        arguments = {"q_offset": 0, "key_start": None}
        found = rounded.log_rows(0, 2000, 2000, **arguments)[0, 0].exp().tril()
        entries = prior_matrix(prior, 2000)[0]
        is_large = entries > 1e-30
        ratio = found.double()[is_large] / entries[is_large]
        assert (ratio - 1).abs().max() < 2e-5

    def test_entries_that_underflow_have_logs(self):
        logs = ESPA(1.0, 0.5).table(2000).log_rows(0, 2000, 2000, q_offset=0, key_start=None)
        assert (prior_matrix(ESPA(1.0, 0.5), 2000)[0, -1] == 0).any()
        falls = logs[0, 0, -1, 1:-1].diff()
        torch.testing.assert_close(falls, torch.full_like(falls, 0.5), rtol=0, atol=1e-12)

    def test_rates_per_head(self):
        rates = torch.tensor([0.1, 0.3])
        found = prior_matrix(ESPA(1.0, rates), 20)
        for head, rate in enumerate(rates.double().tolist()):
            torch.testing.assert_close(found[head], prior_matrix(ESPA(1.0, rate), 20)[0])


def espa(**_):
    rates = torch.tensor([0.5, 1.0, 2.0, 0.3]), torch.tensor([0.1, 0.3, 0.02, 0.29])
    return {"decay_in": rates[0], "decay_out": rates[1]}, lambda p: ESPA(**p)


def espa_of_all_heads(**_):
    return {"decay_out": torch.tensor(0.05)}, lambda p: ESPA(**p)


def uspa(**_):
    return {}, lambda p: USPA(0.2, torch.tensor([0.3, 0.5, 0.9, 0.2]))


def dense(*, queries, keys, device):
    logs = torch.randn(4, queries, keys, generator=torch.Generator().manual_seed(3))
    logs[:, 1, 2] = -torch.inf
    return {}, lambda p: logs.to(device)


def dense_of_keys(*, keys, device, **_):
    logs = torch.linspace(-2, 0, keys)
    return {}, lambda p: logs.to(device)


CASES = {
    "espa": (espa, Case(1, 4, queries=40, head_dim=16, is_causal=True)),
    "espa_cache_grouped": (espa, Case(2, 4, 2, 20, 50, 16, 24, is_causal=True)),
    "espa_padding": (espa, Case(2, 4, queries=45, head_dim=16, is_causal=True, padding="both")),
    "espa_mask": (espa, Case(1, 4, queries=35, head_dim=16, is_causal=True, mask="random")),
    "espa_shared": (espa_of_all_heads, Case(1, 4, queries=33, head_dim=16, is_causal=True)),
    "espa_full": (lambda **_: ({}, lambda p: ESPA(1.0, 0.1)), Case(1, 4, queries=40, head_dim=16)),
    "uspa": (uspa, Case(1, 4, queries=40, head_dim=16, is_causal=True)),
    "uspa_cache_padding": (uspa, Case(2, 4, 1, 20, 50, 16, is_causal=True, padding="left")),
    "uspa_full": (uspa, Case(1, 4, queries=30, keys=40, head_dim=16, mask="rows")),
    "dense": (dense, Case(1, 4, queries=35, keys=40, head_dim=16)),
    "dense_causal_padding": (dense, Case(2, 4, queries=40, head_dim=16, is_causal=True,
                                         padding="both")),
    "dense_of_keys": (dense_of_keys, Case(1, 4, queries=20, keys=40, head_dim=16)),
}  # fmt: skip


def with_prior(function, build, **fixed):
    """Make the parameters of a prior arguments that forward_backward differentiates."""

    def call(*, decay_in=None, decay_out=None, **arguments):
        parameters = {"decay_in": decay_in, "decay_out": decay_out}
        given = {name: x for name, x in parameters.items() if x is not None}
        return function(**arguments, **fixed, prior=build(given))

    return call


def compare(device, make, case, impl, center_gain=0.8):
    parameters, build = make(queries=case.queries, keys=case.keys, device=device)
    inputs = make_inputs(case, scale=0.25, value_mean=1.0, device=device)
    tensors = {name: x for name, x in inputs._asdict().items() if x is not None}
    wide = torch.promote_types(case.dtype, torch.float32)
    gains = {"softmax_gain": torch.tensor([1.1, 0.9, 1.2, 0.7], device=device, dtype=wide)}
    gains["center_gain"] = torch.tensor(center_gain, device=device, dtype=wide)
    parameters = {name: x.to(device, wide) for name, x in parameters.items()}
    options = make_options(case, device=device) | {"scale": 0.25, "return_lse": True}
    options["identity_gain"] = 0.5
    rows = (case.batch, case.heads, case.queries)
    d_out = torch.randn(*rows, case.value_dim).to(case.dtype).to(device)
    d_lse = torch.randn(rows).to(device)

    def run(function, convert):
        arguments = {name: convert(x) for name, x in {**tensors, **gains, **parameters}.items()}
        return forward_backward(function, arguments, d_out, d_lse, **options)

    actual = run(with_prior(shaped_attention, build, impl=impl), lambda x: x)
    golden, spread = rounding_spread(
        lambda: run(with_prior(shaped_attention, build, impl="reference"), lambda x: x.double()),
        case.dtype,
    )
    eager = run(with_prior(eager_attention, build), lambda x: x)
    eps = torch.finfo(case.dtype).eps
    scalars = gains | parameters
    for name, value in actual.items():
        if case.dtype == torch.float64 or name.removeprefix("grad ") in scalars:
            # Eager torch in float64 is the reference itself, and one sum is no yardstick.
            finite = golden[name].isfinite()
            assert torch.equal(value.isfinite(), finite), name
            assert_within_spread(
                value[finite], golden[name][finite], spread[name][finite], name=name
            )
            continue
        rounding = None
        if name.startswith("grad"):
            rounding = eps + 8 * torch.finfo(torch.float32).eps
        elif name == "lse":
            # In the excess form off by up to (eps / 2) sum_j |eps_ij| / l_i, which is below eps.
            size = golden[name][golden[name].isfinite()].abs().max().item()
            rounding = eps / size + 8 * torch.finfo(torch.float32).eps
        assert_within_budget(
            value, golden[name], eager[name], factor=2, name=name, rounding=rounding
        )


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(x, marks=pytest.mark.slow) if x == torch.float16 else x for x in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_triton_with_a_prior(name, dtype, device):
    make, case = CASES[name]
    compare(device, make, replace(case, dtype), "triton")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_torch_with_a_prior(name, dtype, device):
    make, case = CASES[name]
    compare(device, make, replace(case, dtype), "torch")


def replace(case, dtype):
    return Case(**{**vars(case), "dtype": dtype})


def test_torch_over_many_chunks(monkeypatch, device):
    monkeypatch.setattr("shaped_attn.composite.CHUNK_ROWS", 7)
    for name in ("espa_padding", "uspa_cache_padding", "dense_causal_padding", "espa_full"):
        make, case = CASES[name]
        compare(device, make, replace(case, torch.float64), "torch")


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
class TestAnyImplementation:
    @staticmethod
    def draw(device, tokens, *, batch=1, dim=16, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, batch, 2, tokens, dim, generator=generator)
        return [x.to(device, dtype) for x in (q, k, v)]

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("prior", [ESPA(0.5, 0.1), USPA(0.1, 0.6)], ids=str)
    def test_zero_logits_give_the_prior(self, impl, prior, is_causal, device):
        q, k, v = self.draw(device, 40)
        options = {"identity_gain": 0.0, "center_gain": 0.0, "is_causal": is_causal}
        out = shaped_attention(torch.zeros_like(q), k, v, prior=prior, **options, impl=impl)
        expected = prior_matrix(prior, 40, is_causal=is_causal).to(device) @ v.double()
        assert relative_error(out, expected) < 5e-7
        # Softmax minus centre is then nothing, and the identity is left.
        out = shaped_attention(
            torch.zeros_like(q), k, v, prior=prior, is_causal=is_causal, impl=impl
        )
        torch.testing.assert_close(out, v, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("prior", [ESPA(0.2, 0.2), USPA(0.3, 0.3)], ids=str)
    def test_equal_kernels_are_the_identity(self, impl, prior, device):
        q, k, v = self.draw(device, 40)
        options = {"identity_gain": 0.0, "center_gain": 0.0, "is_causal": True}
        out = shaped_attention(q, k, v, prior=prior, **options, impl=impl)
        torch.testing.assert_close(out, v, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("prior", [ESPA(0.5, 0.1), USPA(0.1, 0.6)], ids=str)
    def test_padding_and_a_cache(self, impl, prior, device):
        """Padding in front is as no such keys; one query over a cache gives the last row."""
        q, k, v = self.draw(device, 40)
        options = {"prior": prior, "is_causal": True, "scale": 0.25, "impl": impl}
        expected = shaped_attention(*(x[:, :, 9:] for x in (q, k, v)), **options)
        start = torch.tensor([9], device=device)
        out = shaped_attention(q, k, v, key_start=start, **options)[:, :, 9:]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        whole = shaped_attention(q, k, v, **options)
        out = shaped_attention(q[:, :, -1:], k, v, **options)
        torch.testing.assert_close(out, whole[:, :, -1:], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("prior", [ESPA(3.0, 1.0), ESPA(40.0, 30.0)], ids=str)
    def test_first_tile_far_from_the_diagonal(self, impl, prior, device):
        """A0 of the first keys is 0 there in float32: u of (4) was once infinite."""
        q, k, v = self.draw(device, 300)
        options = {"prior": prior, "is_causal": True, "scale": 0.25, "return_lse": True}
        with override_config(LARGE_TILES):
            out, lse = shaped_attention(q, k, v, **options, impl=impl)
        wide = [x.double() for x in (q, k, v)]
        golden = shaped_attention(*wide, **options, impl="reference")
        assert relative_error(out, golden[0]) < 1e-6
        assert relative_error(lse, golden[1]) < 1e-6

    def test_all_visible_entries_underflow(self, impl, device):
        """Keys near the diagonal are masked: D is 0 in float32, the lse is not -inf."""
        q, k, v = self.draw(device, 64)
        index = torch.arange(64, device=device)
        mask = (index[:, None] - index) >= 50
        options = {"prior": ESPA(6.0, 4.0), "is_causal": True, "attn_mask": mask, "scale": 0.25}
        out, lse = shaped_attention(q, k, v, **options, return_lse=True, impl=impl)
        wide = [x.double() for x in (q, k, v)]
        golden = shaped_attention(*wide, **options, return_lse=True, impl="reference")
        assert relative_error(out, golden[0]) < 1e-6
        seen = golden[1].isfinite()
        assert seen.any() and torch.equal(lse.isfinite(), seen)
        assert relative_error(lse[seen], golden[1][seen]) < 1e-6

    def test_no_query_and_no_key(self, impl, device):
        for prior in (ESPA(0.5, 0.1), USPA(0.1, 0.6)):
            q, k, v = (x[:, :, :0] for x in self.draw(device, 4))
            out = shaped_attention(q, k, v, prior=prior, is_causal=True, impl=impl)
            assert out.shape == (1, 2, 0, 16)


@pytest.mark.parametrize("prior", PAIRS[:3] + PAIRS[4:7], ids=str)
def test_entries_of_the_kernel(prior, device):
    """With q = 0 and v = I the output is A0: every entry above 1e-30 to 2e-5."""
    tokens = 256
    q = torch.zeros(1, 1, tokens, 16, device=device)
    v = torch.eye(tokens, device=device)[None, None]
    options = {"identity_gain": 0.0, "center_gain": 0.0, "is_causal": True}
    with override_config(LARGE_TILES):
        out = shaped_attention(q, q, v, prior=prior, **options, impl="triton")
    entries = prior_matrix(prior, tokens)[0].to(device)
    is_large = entries > 1e-30
    assert ((out[0, 0].double() / entries)[is_large] - 1).abs().max() < 2e-5
    assert not out[0, 0].triu(1).any()


def test_row_sums_beyond_float16(device):
    """D is about 20 here; with the weights lifted as for D = 1 they were once infinite."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x.to(device) for x in torch.randn(3, 1, 1, 512, 16, generator=generator).half())
    options = {"prior": ESPA(), "is_causal": True, "identity_gain": 0.0, "center_gain": 0.0}
    options |= {"scale": 8.0}
    d_out = torch.randn(1, 1, 512, 16, generator=generator).half().to(device)
    arguments = dict(zip("qkv", (q, k, v), strict=True))

    def run(function, convert, **more):
        tensors = {name: convert(x) for name, x in arguments.items()}
        return forward_backward(function, tensors, d_out, **options, **more)

    with override_config(LARGE_TILES):
        actual = run(shaped_attention, lambda x: x, impl="triton")
    golden = run(shaped_attention, lambda x: x.double(), impl="reference")
    eager = run(eager_attention, lambda x: x)
    for name, value in actual.items():
        assert value.isfinite().all(), name
        assert_within_budget(value, golden[name], eager[name], factor=2, name=name)


def test_roots_are_computed_once(monkeypatch, device):
    """Of fixed rates, also if the first call was for inference; learnable ones get gradients."""
    calls = []
    log_roots = ESPA._log_roots

    def counted(self, *arguments):
        calls.append(self)
        return log_roots(self, *arguments)

    monkeypatch.setattr(ESPA, "_log_roots", counted)
    q, k, v = torch.randn(3, 1, 2, 23, 16).to(device)
    q.requires_grad_()
    options = {"prior": ESPA(0.731, 0.213), "impl": "torch"}
    with torch.inference_mode():
        first = shaped_attention(q, k, v, **options)
    second = shaped_attention(q, k, v, **options)
    assert len(calls) == 1 and torch.equal(first, second)
    second.sum().backward()
    decay = torch.tensor(0.213, device=device, requires_grad=True)
    learned = shaped_attention(q, k, v, prior=ESPA(0.731, decay), impl="torch")
    (found,) = torch.autograd.grad(learned.square().sum(), decay)
    assert len(calls) == 2 and found.isfinite() and found != 0


def test_a_dense_prior_is_learned_by_torch_alone(device):
    q, k, v = torch.randn(3, 1, 2, 6, 16).to(device)
    logs = torch.randn(6, 6).to(device).requires_grad_()
    out = shaped_attention(q, k, v, prior=logs, impl="torch")
    (found,) = torch.autograd.grad(out.square().sum(), logs)
    out = shaped_attention(q, k, v, prior=logs, impl="reference")
    (expected,) = torch.autograd.grad(out.square().sum(), logs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be learned with impl='triton'"):
        shaped_attention(q, k, v, prior=logs, impl="triton")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ESPA(0.1, 0.2), ValueError, "decay_in must be at least decay_out = 0.2"),
        (lambda: ESPA(1.0, 0.0), ValueError, "decay_out must be above 0 and finite, got 0"),
        (lambda: ESPA(-1.0), ValueError, "decay_in must be above 0, got -1"),
        (lambda: ESPA(decay_out=math.nan), TypeError, "decay_out of ESPA must be a number"),
        (lambda: ESPA("1"), TypeError, "decay_in of ESPA must be a number or a Tensor"),
        (lambda: ESPA(torch.ones(2, 2)), TypeError, "decay_in of ESPA as a Tensor must be"),
        (lambda: USPA(0.5, 0.4), ValueError, "rho_out must be at least rho_in = 0.5"),
        (lambda: USPA(0.0, 1.0), ValueError, "rho_out must be at least 0 and below 1"),
        (lambda: USPA(torch.zeros(2, requires_grad=True)), ValueError, "rho_in cannot be learned"),
        (lambda: ESPA.schedule(0), ValueError, "layers must be at least 1"),
        (lambda: ESPA.schedule(2, -1.0), ValueError, "decay must be above 0"),
        (lambda: USPA.schedule(2, 1.0), ValueError, "rho must be between 0 and 1"),
    ],
)
def test_bad_priors(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_offset": 3}, "prior needs a key at the position of every query"),
        ({"q_offset": -1}, "prior needs a key at the position of every query"),
        (
            {"is_causal": False, "key_start": torch.tensor([1])},
            "prior without a causal mask depends on the number of tokens",
        ),
        ({"prior": ESPA(1.0, torch.ones(3))}, "prior.decay_out as a Tensor must have shape"),
    ],
)
def test_priors_that_do_not_fit(options, message, impl, device):
    q, k, v = torch.randn(3, 1, 2, 6, 16).to(device)
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    arguments = {"prior": USPA(), "is_causal": True, "identity_gain": 0.0} | options
    with pytest.raises(ValueError, match=message):
        shaped_attention(q, k, v, **arguments, impl=impl)
