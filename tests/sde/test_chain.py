"""The exact Markov chains, against networks whose every weight is drawn here, layer by layer."""

import itertools
import math

import pytest
import torch
from covariances import NORMAL, generic, mean_z, second_moment_z, seeded, z_bound
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
from shaped_attn.sde.network import FiniteNetwork
from shaped_attn.sde.settings import BlockSettings, Detuning

DTYPE = torch.float64
V0 = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.5, 0.1], [0.3, 0.1, 0.7]], dtype=DTYPE)
EYE = torch.eye(3, dtype=DTYPE)
WIDTH, LAYERS, SAMPLES = 12, 3, 6000


def draw(*sizes, source):
    return torch.randn(*sizes, dtype=DTYPE, generator=source)


def networks(settings, samples, source):
    """V after three blocks of width 12, written out from covariance-sde.md (1)-(6)."""
    tokens, n, head_dim = V0.shape[0], WIDTH, settings.head_dim
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


def describe(head_dim=4, **settings):
    return FiniteNetwork(width=WIDTH, depth=LAYERS, head_dim=head_dim, **settings)


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
    settings = describe(head_dim, branch_gain=0.7, tau0=0.3, **changes)
    source = seeded(list(CASES).index(name))
    expected = networks(settings, SAMPLES, source)
    chain = WidthChain(settings, V0, source)
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
    chain = WidthChain(describe(mlp=False, **changes), V0, seeded())
    found = chain.covariance(chain.start(50))
    torch.testing.assert_close(found, V0.expand_as(found), rtol=1e-12, atol=1e-12)


def test_slices_of_the_input_differ():
    """What a head writes to is a random part of the input, not a copy of the whole."""
    state = WidthChain(describe(mlp=False, heads=2), V0, seeded()).start(20000)
    slices = state @ state.mT
    torch.testing.assert_close(slices.mean(0), V0.expand(2, 3, 3), rtol=0, atol=0.03)
    # A Haar frame: the trace of a slice has the variance of a Dirichlet weight.
    share = torch.linalg.solve(V0, slices[:, 0]).diagonal(dim1=1, dim2=2).sum(1)
    tokens, n = 3, WIDTH
    expected = 2 * tokens * (n - tokens) / ((n - 1) * (n + 2))
    assert share.var().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("degrees", "columns"), [(3, 0), (4.5, 0), (40, 0), (7, 2)], ids=["least", "", "many", "behind"]
)
def test_wishart_factor(degrees, columns):
    """E[W] = nu I, cov(W_ij, W_pq) = nu (I_ip I_jq + I_iq I_jp); with columns [G | T] of both."""
    wide = wishart_factor((200_000, 3, 3), degrees, V0, seeded(), columns=columns)
    assert not wide[..., columns:].triu(1).any()
    for part, freedom in ((wide, degrees + columns), (wide[..., :columns], columns)):
        w, mean = part @ part.mT, freedom * EYE
        if freedom:
            assert mean_z(w, mean)[0] < z_bound(6)
            assert second_moment_z(w - mean, freedom * linear_pairs(EYE, EYE)) < z_bound(21)
    assert wishart_factor((5, 1, 1), 4, V0, seeded()).shape == (5, 1, 1)


def linear_pairs(a, b):
    """a_ip b_jq + a_iq b_jp."""
    return torch.einsum("ip,jq->ijpq", a, b) + torch.einsum("iq,jp->ijpq", a, b)


def test_narrow_gaussian_factor_is_the_gaussian_itself():
    assert gaussian_factor((5, 3, 3), 2, V0, seeded()).shape == (5, 3, 2)
    assert gaussian_factor((5, 3, 3), 3, V0, seeded()).shape == (5, 3, 3)


@pytest.mark.parametrize("is_rotation", [False, True])
@pytest.mark.parametrize("width", [4, 5.5, 64])
def test_branch_step(width, is_rotation):
    """(42): mean lam^2 V + gam^2 K, and its covariance, exactly at n >= 2m."""
    skip, gam, count = 0.8, 0.9, 200_000
    v, k = generic(2), 0.5 * generic(2, seed=3)
    factors = [torch.linalg.cholesky(x).expand(count, 2, 2) for x in (v, k)]
    # Another root of K: only R R^T matters.
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=DTYPE)
    root = factors[1] @ turn
    moved = branch_step(factors[0], root, skip, gam, width, seeded(), is_rotation=is_rotation)
    found, mean = moved @ moved.mT, skip**2 * v + gam**2 * k
    assert mean_z(found, mean)[0] < z_bound(3)
    sigma = skip**2 * gam**2 * (linear_pairs(k, v) + linear_pairs(v, k))
    if not is_rotation:  # with one the branch has the covariance K itself
        sigma = sigma + gam**4 * linear_pairs(k, k)
    assert second_moment_z(found - mean, sigma / width) < z_bound(6)


@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0, 9.0])
def test_lower_factor_of_rows_of_different_size(spread):
    """Also where the Gram matrix has lost the smaller directions, or all of them."""
    scale = torch.logspace(0, -spread, 4, dtype=DTYPE)[:, None]
    wide = scale * draw(50, 4, 7, source=seeded())
    factor = lower_factor(wide)
    # Orthonormal rows of L^-1 F show that no direction was lost.
    rows = torch.linalg.solve_triangular(factor, wide, upper=False)
    identity = torch.eye(4, dtype=DTYPE).expand(50, 4, 4)
    torch.testing.assert_close(rows @ rows.mT, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lower_factor(dtype):
    """Also of matrices whose Gram matrix has lost its small eigenvalues, or is broken."""
    wide = torch.randn(7, 3, 6, dtype=dtype)
    wide[1, 2] = wide[1, 1] + 1e-4 * wide[1, 2]
    wide[2, 2] = wide[2, 1]
    wide[3] *= 1e-12
    wide[5, 1, 2], wide[6, 0, 0] = math.nan, math.inf
    factor = lower_factor(wide)
    assert factor.shape == (7, 3, 3) and not factor[:5].triu(1).any()
    assert factor[5:].isnan().flatten(1).any(1).all()
    eps = torch.finfo(dtype).eps
    for k in range(5):
        expected = (wide[k].double() @ wide[k].double().mT).to(dtype)
        bound = 32 * eps * float(expected.abs().max())
        torch.testing.assert_close(factor[k] @ factor[k].mT, expected, rtol=0, atol=bound)
    # The smallest pivot of a nearly singular one is good to eps / 1e-4, not to its square.
    exact = torch.linalg.qr(wide[1].double().mT).R[2, 2].abs()
    assert abs(factor[1, 2, 2].abs().double() - exact) < 32 * eps * wide[1].norm()


def test_root_of_singular():
    v = torch.stack((generic(3), torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)))
    v[3, 0, 1] = v[3, 1, 0] = math.nan
    root = root_of(v)
    torch.testing.assert_close((root @ root.mT)[:3], v[:3], rtol=0, atol=1e-14)
    assert root[3].isnan().any()


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4, 1e300])
def test_shaped_matrix(size):
    """(5) by loops; logits of any size, hidden keys and a row that sees none."""
    prior = torch.tensor([[0.5, 0.0, 0.0], [0.2, 1.2, 0.0], [0.3, 0.9, 0.8]], dtype=DTYPE)
    zero_logit = BlockSettings(prior=prior, heads=2, key_start=1).zero_logit_attention(3, V0)
    logits = size * torch.randn(4, 2, 3, 3, dtype=DTYPE)
    gains = torch.tensor([1.5, 0.5]).double(), torch.tensor([1.2, 0.7]).double()
    before = logits.clone()
    found = ShapedMatrix(zero_logit, 0.9, *gains)(logits)
    assert torch.equal(logits, before)
    for b, h, i in itertools.product(range(4), range(2), range(3)):
        keys = [j for j in range(3) if prior[i, j] > 0 and j >= 1]
        mass = sum(float(prior[i, j]) for j in keys)
        row = [0.9 * (i == j) for j in range(3)]
        top = max((float(logits[b, h, i, j]) for j in keys), default=0)
        weights = {j: prior[i, j] * math.exp(logits[b, h, i, j] - top) for j in keys}
        for j in keys:
            softmax = mass * weights[j] / sum(weights.values())
            row[j] += float(gains[0][h] * softmax - gains[1][h] * prior[i, j])
        torch.testing.assert_close(
            found[b, h, i], torch.tensor(row, dtype=DTYPE), rtol=0, atol=1e-14
        )


def test_normal():
    """On a CPU it is not torch's own draw."""
    for sizes, dtype in (((3, 33_333, 3), torch.float64), ((99_999,), torch.float32)):
        like = torch.zeros((), dtype=dtype)
        x = normal(sizes, like, seeded())
        assert x.shape == sizes and x.dtype == dtype
        x = x.flatten().double()
        points = torch.linspace(-3, 3, 25).tolist()
        for point in points:
            p = NORMAL.cdf(point)
            error = math.sqrt(p * (1 - p) / len(x))
            assert abs((x < point).double().mean() - p) < z_bound(25) * error
        # Neighbours and pairs half the tensor apart, in squares too.
        for shift, power in itertools.product((1, len(x) // 2, len(x) // 2 + 1), (1, 2)):
            y = x**power
            rho = torch.corrcoef(torch.stack((y[shift:], y[:-shift])))[0, 1]
            assert abs(rho) * math.sqrt(len(x) - shift) < z_bound(6)
    assert normal((0, 3, 3), torch.zeros(()).double(), seeded()).shape == (0, 3, 3)
