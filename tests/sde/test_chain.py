"""The exact Markov chains, against networks whose every weight is drawn here, layer by layer."""

import math

import pytest
import torch
from scipy.stats import ks_2samp

from shaped_attn.sde.chain import (
    ShapedMatrix,
    WidthChain,
    branch_step,
    gaussian_factor,
    lower_factor,
    normal,
    root_of,
    wishart_factor,
)
from shaped_attn.sde.settings import BlockSettings, Detuning

DTYPE = torch.float64
V0 = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.5, 0.1], [0.3, 0.1, 0.7]], dtype=DTYPE)
WIDTH, LAYERS, SAMPLES = 12, 3, 6000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*sizes, source):
    return torch.randn(*sizes, dtype=DTYPE, generator=source)


def networks(settings, head_dim, samples, source):
    """V after three blocks of width 12, written out from covariance-sde.md (1)-(6)."""
    tokens, n = V0.shape[0], WIDTH
    rows, mass = settings.zero_logit_attention(tokens, V0)
    softmax_gain = settings.head_gains("softmax_gain", V0)
    center_gain = settings.head_gains("center_gain", V0) - settings.detuning.softmax / n
    identity_gain = settings.identity_gain + settings.detuning.identity / n
    skip_gain = math.sqrt(settings.skip_gain**2 + settings.detuning.variance / n)
    frame = torch.linalg.qr(draw(samples, n, tokens, source=source)).Q.mT
    x = math.sqrt(n) * torch.linalg.cholesky(V0) @ frame
    for _ in range(LAYERS):
        if settings.attention:
            heads = []
            for head in range(settings.heads):
                q = x @ draw(samples, n, head_dim, source=source) / math.sqrt(n)
                k = x @ draw(samples, n, head_dim, source=source) / math.sqrt(n)
                logits = q @ k.mT / (settings.tau0 * math.sqrt(n * head_dim)) + rows.log()
                softmax = torch.where(mass[:, None] > 0, logits.softmax(-1), 0)
                centred = softmax_gain[head] * softmax - center_gain[head] * rows
                matrix = identity_gain * torch.eye(tokens, dtype=DTYPE) + mass[:, None] * centred
                values = x @ draw(samples, n, n // settings.heads, source=source) / math.sqrt(n)
                heads.append(matrix @ values)
            branch = torch.cat(heads, dim=-1)
            if settings.out_proj != "none":
                weight = draw(samples, n, n, source=source)
                if settings.out_proj == "orthogonal":
                    q, r = torch.linalg.qr(weight)
                    weight = math.sqrt(n) * q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
                branch = branch @ weight / math.sqrt(n)
            x = skip_gain * x + settings.branch_gain * branch
        if settings.mlp:
            hidden = round(settings.mlp_ratio * n)
            h = x @ draw(samples, n, hidden, source=source) / math.sqrt(n)
            up, down = (1 + c / math.sqrt(n) for c in (settings.c_plus, settings.c_minus))
            h = up * h.clamp(min=0) + down * h.clamp(max=0)
            h = h @ draw(samples, hidden, n, source=source) / math.sqrt(hidden)
            x = skip_gain * x + settings.branch_gain * math.sqrt(2 / (up**2 + down**2)) * h
    return x @ x.mT / n


def make_chain(settings, head_dim, source, width=WIDTH):
    return WidthChain(
        settings,
        V0,
        width=width,
        head_dim=head_dim,
        scale=1 / (settings.tau0 * math.sqrt(width * head_dim)),
        skip_gain=math.sqrt(settings.skip_gain**2 + settings.detuning.variance / width),
        generator=source,
    )


def statistics(v):
    size = v.diagonal(dim1=-2, dim2=-1)
    rho = v / (size[:, :, None] * size[:, None, :]).sqrt()
    return [size[:, 0], size[:, 1], size[:, 2], rho[:, 0, 1], rho[:, 0, 2], rho[:, 1, 2]]


PRIOR = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.9, 0.0], [0.1, 0.4, 0.6]], dtype=DTYPE)
CASES = {
    "one head": ({"mlp": False}, 12),
    "a head smaller than m": ({"mlp": False, "is_causal": True}, 2),
    "slices of heads": ({"mlp": False, "heads": 2, "is_causal": True}, 4),
    "Gaussian W_O": ({"mlp": False, "heads": 2, "out_proj": "gaussian"}, 4),
    "slices smaller than m": ({"mlp": False, "heads": 6, "out_proj": "gaussian"}, 4),
    "orthogonal W_O": ({"mlp": False, "heads": 2, "out_proj": "orthogonal"}, 4),
    "one head, Gaussian W_O": ({"mlp": False, "out_proj": "gaussian"}, 4),
    "MLP": ({"attention": False, "c_plus": 0.5}, 1),
    "block": ({"heads": 2, "mlp_ratio": 2.0, "c_plus": 0.5, "is_causal": True}, 4),
    "gains": (
        {
            "mlp": False,
            "heads": 2,
            "softmax_gain": (1.5, 0.5),
            "center_gain": (1.0, 0.8),
            "detuning": Detuning(2.0, 3.0, -1.0),
        },
        4,
    ),
    "prior": ({"mlp": False, "prior": PRIOR}, 4),
    "padding": ({"mlp": False, "key_start": 1, "is_causal": True}, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_chain_has_the_law_of_networks(name):
    changes, head_dim = CASES[name]
    settings = BlockSettings(branch_gain=0.7, tau0=0.3, **changes)
    source = generator(list(CASES).index(name))
    expected = networks(settings, head_dim, SAMPLES, source)
    chain = make_chain(settings, head_dim, source)
    state = chain.start(SAMPLES)
    for index in range(LAYERS):
        state = chain.step(state, index)
    # 1 % for all cases and statistics together.
    alpha = 0.01 / (6 * len(CASES))
    critical = math.sqrt(-math.log(alpha / 2) / SAMPLES)
    pairs = zip(statistics(expected), statistics(chain.covariance(state)), strict=True)
    distances = [ks_2samp(a.numpy(), b.numpy()).statistic for a, b in pairs]
    assert max(distances) < critical


@pytest.mark.parametrize(
    "changes", [{"heads": 1}, {"heads": 2}, {"heads": 2, "out_proj": "gaussian"}]
)
def test_start_has_exactly_the_covariance_v0(changes):
    chain = make_chain(BlockSettings(mlp=False, **changes), 4, generator())
    found = chain.covariance(chain.start(50))
    torch.testing.assert_close(found, V0.expand_as(found), rtol=1e-12, atol=1e-12)


def test_slices_of_the_input_differ():
    """What a head writes to is a random part of the input, not a copy of the whole."""
    state = make_chain(BlockSettings(mlp=False, heads=2), 4, generator()).start(20000)
    slices = state @ state.mT
    torch.testing.assert_close(slices.mean(0), V0.expand(2, 3, 3), rtol=0, atol=0.03)
    # A Haar frame: the trace of a slice has the variance of a Dirichlet weight.
    share = torch.linalg.solve(V0, slices[:, 0]).diagonal(dim1=1, dim2=2).sum(1)
    tokens, n = 3, WIDTH
    expected = 2 * tokens * (n - tokens) / ((n - 1) * (n + 2))
    assert share.var().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("degrees", [5, 12, 7.5])
def test_wishart_moments(degrees):
    factor = wishart_factor((40000, 3, 3), degrees, V0, generator())
    assert torch.equal(factor, factor.tril())
    sample = factor @ factor.mT
    mean = sample.mean(0)
    deviation = math.sqrt(2 * degrees / 40000)
    assert (mean - degrees * torch.eye(3, dtype=DTYPE)).abs().max() < 5 * deviation
    variance = sample.var(0)
    expected = degrees * (1 + torch.eye(3, dtype=DTYPE))
    assert ((variance / expected - 1).abs() < 0.06).all()


def test_wishart_factor_after_columns():
    wide = wishart_factor((40000, 3, 3), 7, V0, generator(), columns=2)
    assert torch.equal(wide[..., 2:], wide[..., 2:].tril())
    for part, degrees in ((wide[..., :2], 2), (wide, 9)):
        variance = (part @ part.mT).var(0)
        assert ((variance / (degrees * (1 + torch.eye(3, dtype=DTYPE))) - 1).abs() < 0.08).all()
    assert wishart_factor((5, 1, 1), 4, V0, generator()).shape == (5, 1, 1)


def test_narrow_gaussian_factor_is_the_gaussian_itself():
    assert gaussian_factor((5, 3, 3), 2, V0, generator()).shape == (5, 3, 2)
    assert gaussian_factor((5, 3, 3), 3, V0, generator()).shape == (5, 3, 3)


def test_normal_draws():
    """Its float64 draws are our own transform of uniform numbers."""
    x = normal((1001, 999), torch.empty(0, dtype=DTYPE), generator())
    assert x.shape == (1001, 999) and x.dtype == DTYPE
    count = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (x**power).mean().item() - moment
        assert abs(error) < 4.5 * math.sqrt(variance / count)
    assert ks_2samp(x.flatten()[:200000].numpy(), torch.randn(200000).numpy()).pvalue > 1e-3
    pairs = x.flatten()[: count // 2] * x.flatten()[count // 2 + 1 :]  # of one radius
    assert abs(pairs.mean().item()) < 4.5 / math.sqrt(count // 2)
    assert normal((3,), torch.empty(0, dtype=torch.float32), generator()).dtype == torch.float32


@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0, 9.0])
def test_lower_factor(spread):
    """Also where the Gram matrix has lost the smaller directions, or all of them."""
    scale = torch.logspace(0, -spread, 4, dtype=DTYPE)[:, None]
    first, second = (scale * draw(50, 4, r, source=generator(r)) for r in (4, 3))
    wide = torch.cat((first, second), dim=-1)
    factor = lower_factor(wide)
    assert torch.equal(factor, factor.tril())
    # Orthonormal rows of L^-1 F show that no direction was lost.
    rows = torch.linalg.solve_triangular(factor, wide, upper=False)
    identity = torch.eye(4, dtype=DTYPE).expand(50, 4, 4)
    torch.testing.assert_close(rows @ rows.mT, identity, rtol=0, atol=1e-6)


def test_lower_factor_of_what_is_not_finite_is_nan_there_alone():
    wide = draw(4, 3, 3, source=generator())
    wide[1, 0, 0], wide[2, 1, 1] = torch.nan, torch.inf
    factor = lower_factor(wide)
    assert factor[[0, 3]].isfinite().all()
    assert factor[[1, 2]].isnan().flatten(1).any(1).all()


def test_root_of_a_singular_covariance():
    v = torch.ones(2, 3, 3, dtype=DTYPE)
    v[1] = V0
    root = root_of(v)
    torch.testing.assert_close(root @ root.mT, v, rtol=1e-12, atol=1e-12)


def test_shaped_matrix_is_the_identity_at_zero_logits():
    settings = BlockSettings(is_causal=True, key_start=1, heads=2)
    zero_logit = settings.zero_logit_attention(3, V0)
    gain = torch.tensor([1.0, 1.5], dtype=DTYPE)
    matrix = ShapedMatrix(zero_logit, 1.0, gain, gain)(torch.zeros(4, 2, 3, 3, dtype=DTYPE))
    identity = torch.eye(3, dtype=DTYPE).expand_as(matrix)
    torch.testing.assert_close(matrix, identity, rtol=0, atol=1e-15)


def test_shaped_matrix_takes_huge_logits():
    zero_logit = BlockSettings().zero_logit_attention(3, V0)
    one = torch.ones(1, dtype=DTYPE)
    logits = 1e6 * draw(7, 1, 3, 3, source=generator())
    matrix = ShapedMatrix(zero_logit, 1.0, one, one)(logits)
    hardmax = torch.nn.functional.one_hot(logits.argmax(-1), 3).to(DTYPE)
    torch.testing.assert_close(matrix, torch.eye(3, dtype=DTYPE) + hardmax - 1 / 3)


@pytest.mark.parametrize("is_rotation", [False, True])
def test_branch_step_moments(is_rotation):
    """E[V'] and the variance of its trace part, from covariance-sde.md (42)."""
    samples, n = 40000, 12
    skip = root_of(V0).expand(samples, 3, 3)
    root = torch.tril(torch.ones(3, 3, dtype=DTYPE)).expand(samples, 3, 3)
    factor = branch_step(skip, root, 0.8, 0.6, n, generator(), is_rotation=is_rotation)
    found = factor @ factor.mT
    kernel = root[0] @ root[0].mT
    expected = 0.64 * V0 + 0.36 * kernel
    error = found.std(0) / math.sqrt(samples)
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    # With a rotation the branch has the covariance R R^T itself, without its fluctuation.
    cross = 4 * 0.64 * 0.36 * V0[0, 0] * kernel[0, 0] / n
    own = 0 if is_rotation else 2 * 0.36**2 * kernel[0, 0] ** 2 / n
    assert found[:, 0, 0].var().item() == pytest.approx(float(cross + own), rel=0.05)
