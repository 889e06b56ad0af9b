"""Drift and diffusion against loops over tokens, closed forms, symmetries and quadrature.

Equation numbers are those of covariance-sde.md.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from covariances import generic
from hypothesis import given, settings
from hypothesis import strategies as st

from shaped_attn.sde import CovarianceSDE, Detuning, equicorrelated, moments
from shaped_attn.sde.settings import variance_correction

EPS = torch.finfo(torch.float64).eps


def prior_of(tokens, seed=1):
    """A0 with hidden keys, and rows of unequal sums: the row gains 0.5, 1, 1.7, 2.2, ..."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(tokens, tokens, generator=generator, dtype=torch.float64)
    matrix = matrix * (torch.rand(tokens, tokens, generator=generator) < 0.8)
    matrix = matrix + 0.1 * torch.eye(tokens)
    gains = torch.tensor([0.5, 1.0, 1.7, 2.2, 0.8], dtype=torch.float64)[:tokens]
    return gains[:, None] * matrix / matrix.sum(-1, keepdim=True)


def window_of(tokens, size=2):
    position = torch.arange(tokens)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < size)


MASKS = {
    "full": lambda m: {},
    "causal": lambda m: {"is_causal": True},
    "window": lambda m: {"attn_mask": window_of(m)},
    "padding": lambda m: {"key_start": 1, "is_causal": True},
    "hidden_key": lambda m: {"key_end": m - 1},
    "prior": lambda m: {"prior": prior_of(m)},
    "causal_prior": lambda m: {"prior": prior_of(m), "is_causal": True},
}


def visible_of(tokens, mask):
    """Lists of the tokens that each token sees; on its own, beside that of the settings."""
    lists = []
    for i in range(tokens):
        keys = range(tokens)
        if mask == "causal":
            keys = range(i + 1)
        elif mask == "window":
            keys = range(max(0, i - 1), i + 1)
        elif mask == "padding":
            keys = range(1, i + 1)
        elif mask == "hidden_key":
            keys = range(tokens - 1)
        elif mask in ("prior", "causal_prior"):
            keys = [j for j in keys if prior_of(tokens)[i, j] > 0]
            keys = [j for j in keys if mask == "prior" or j <= i]
        lists.append(list(keys))
    return lists


def zero_logit_of(tokens, mask):
    """P0 as nested lists, and the row gains that the prior brings."""
    rows, gains = [], []
    for i, keys in enumerate(visible_of(tokens, mask)):
        weight = prior_of(tokens)[i].tolist() if "prior" in mask else [1.0] * tokens
        total = sum(weight[j] for j in keys)
        rows.append([weight[j] / total if j in keys else 0.0 for j in range(tokens)])
        gains.append(total if "prior" in mask else float(bool(keys)))
    return rows, gains


def loops(v, mask, *, head_gains=(1.0,), gam, tau0, identity_gain=1.0, kappa=0.0, mistake=None):
    """mu of (15) and Sigma of (33), entry by entry from the definitions (8)-(10) and (14).

    ``mistake`` puts in one of the errors that a test must not be blind to.
    """
    m, heads = len(v), len(head_gains)
    v = v.numpy()
    p, row_gains = zero_logit_of(m, "full" if mistake == "centre of no mask" else mask)
    p = np.array(p)
    mu, acal = np.zeros((m, m)), np.zeros((m, m, m, m))
    gam = gam * identity_gain  # a constant a != 1 is absorbed by gam -> a gam, beta -> beta / a
    for head_gain in head_gains:
        jacobian, s = [], []
        for i in range(m):
            beta = head_gain * row_gains[i] / identity_gain
            jacobian.append(beta * (np.diag(p[i]) - np.outer(p[i], p[i])))
            if mistake == "beta on traces":
                jacobian[i] = jacobian[i] * abs(beta) ** -0.5
            r = [v[q, q] - 2 * sum(v[q, u] * p[i, u] for u in range(m)) for q in range(m)]
            r = [x + p[i] @ v @ p[i] for x in r]
            mean = sum(p[i, u] * r[u] for u in range(m))
            if mistake == "s without its mean":
                mean = 0.0
            gain = {"no s": 0.0, "beta^2 on s": beta**2}.get(mistake, beta)
            s.append(np.array([gain * p[i, q] * (r[q] - mean) for q in range(m)]))
        for i, j in itertools.product(range(m), repeat=2):
            first, second = (j, i) if mistake == "V_jj for V_ii" else (i, j)
            mu[i, j] += v[i, j] * np.trace(jacobian[i] @ v @ jacobian[j] @ v)
            mu[i, j] += 0.5 * v[first, first] * (v @ s[i])[j]
            mu[i, j] += 0.5 * v[second, second] * (v @ s[j])[i]
        k = {
            (u, w): v @ jacobian[u] @ v @ jacobian[w] @ v
            for u, w in itertools.product(range(m), repeat=2)
        }
        for i, j, a, b in itertools.product(range(m), repeat=4):
            order = (b, a) if mistake == "K^iq for K^ip" else (a, b)
            acal[i, j, a, b] += v[i, a] * k[i, order[0]][j, b] + v[i, b] * k[i, order[1]][j, a]
            acal[i, j, a, b] += v[j, a] * k[j, order[0]][i, b] + v[j, b] * k[j, order[1]][i, a]
    linear = np.einsum("ip,jq->ijpq", v, v) + np.einsum("iq,jp->ijpq", v, v)
    acal /= heads if mistake == "no 1/H" else heads**2
    mu = mu * gam**2 / tau0**2 / heads
    sigma = kappa * linear + gam**4 / tau0**2 * acal
    return torch.from_numpy(mu), torch.from_numpy(sigma)


def rounding(v, gain, scale):
    """A bound on the rounding of a drift or diffusion of cubic or quartic terms in V.

    No entry is larger than 16 products of entries of V with weights that sum to 1 in each index,
    and each is a chain of at most 4 sums of m terms.
    """
    size = max(1.0, gain) ** 2 * scale * max(1.0, float(v.abs().max())) ** 4
    return 16 * 4 * len(v) * EPS * size


HEAD_GAINS = {"one": {}, "heads": {"heads": 3, "softmax_gain": (0.4, 1.5, -0.7)}}


@pytest.mark.parametrize("gains", HEAD_GAINS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_attention_is_its_definition(m, mask, gains):
    """(15), computed as (17), and (14), (33)."""
    v = generic(m, seed=m)
    gains = HEAD_GAINS[gains]
    sde = CovarianceSDE(
        branch_gain=0.7, tau0=0.5, mlp=False, out_proj="gaussian", **MASKS[mask](m), **gains
    )
    head_gains = gains.get("softmax_gain", (1.0,))
    mu, sigma = loops(v, mask, head_gains=head_gains, gam=0.7, tau0=0.5, kappa=2 * 0.7**2)
    bound = rounding(v, 2.2 * 1.5, 0.7**2 / 0.5**2)
    torch.testing.assert_close(sde.drift(v), mu, rtol=0, atol=bound)
    torch.testing.assert_close(sde.diffusion(v), sigma, rtol=0, atol=bound)


@pytest.mark.parametrize("identity_gain", [0.6, -0.8, 1.3])
def test_identity_gain_is_absorbed(identity_gain):
    """gam -> a gam and beta -> beta / a, with which the reference says what a constant a does."""
    v = generic(4)
    sde = CovarianceSDE(
        branch_gain=0.7, tau0=0.5, identity_gain=identity_gain, mlp=False, prior=prior_of(4)
    )
    square = (0.7 * identity_gain) ** 2
    mu, sigma = loops(
        v,
        "prior",
        gam=0.7,
        tau0=0.5,
        identity_gain=identity_gain,
        kappa=square * (2 - square),
    )
    bound = rounding(v, 4, 2)
    torch.testing.assert_close(sde.drift(v), mu, rtol=0, atol=bound)
    torch.testing.assert_close(sde.diffusion(v), sigma, rtol=0, atol=bound)


def test_no_identity():
    """A = n^{-1/2} A1 + ...: only E[A1 V A1^T] is left, and nothing that fluctuates."""
    v = generic(4)
    sde = CovarianceSDE(branch_gain=0.7, tau0=0.5, identity_gain=0.0, mlp=False, is_causal=True)
    assert sde.skip_gain == 1.0 and sde.kappa == 0.0
    mu, _ = loops(v, "causal", gam=0.7, tau0=0.5, mistake="no s")
    torch.testing.assert_close(sde.drift(v), mu, rtol=0, atol=rounding(v, 1, 2))
    assert not sde.diffusion(v).any()


# The errors of section 12 of the reference, and a case that is not blind to each.
SEEN = {
    "no s": ("full", {}, "mu"),
    "V_jj for V_ii": ("full", {}, "mu"),
    "s without its mean": ("full", {}, "mu"),
    "beta^2 on s": ("causal", {"softmax_gain": 1.5}, "mu"),
    "beta on traces": ("causal", {"softmax_gain": 1.5}, "mu"),
    "centre of no mask": ("causal", {}, "mu"),
    "K^iq for K^ip": ("causal", {}, "sigma"),
    "no 1/H": ("full", {"heads": 3}, "sigma"),
}


@pytest.mark.parametrize("mistake", SEEN)
def test_the_comparison_sees(mistake):
    mask, gains, which = SEEN[mistake]
    v = generic(4)
    sde = CovarianceSDE(branch_gain=0.7, tau0=0.5, mlp=False, **MASKS[mask](4), **gains)
    found = sde.drift(v) if which == "mu" else sde.diffusion(v)
    right, wrong = (
        loops(
            v,
            mask,
            head_gains=(sde.softmax_gain,) * sde.heads,
            gam=0.7,
            tau0=0.5,
            kappa=sde.kappa,
            mistake=x,
        )[which == "sigma"]
        for x in (None, mistake)
    )
    bound = rounding(v, 1.5, 2)
    assert (found - right).abs().max() <= bound
    assert (found - wrong).abs().max() > max(1e6 * bound, 0.01 * float(right.abs().max()))


class TestFullMask:
    """The paper's case: one head, no mask, no gain."""

    sde = CovarianceSDE(branch_gain=0.6, tau0=0.8, mlp=False)

    @pytest.mark.parametrize("m", [2, 3, 4])
    def test_index_form(self, m):
        """(21)-(24): S1 and S2 with bars for means over all tokens."""
        v = generic(m).numpy()
        bar, grand = v.mean(1), v.mean()

        def s1(i, u, j, w):
            return v[i, j] * (v[u, w] - bar[u] - bar[w] + grand)

        def s2(i, q):
            return v[i, i] * (v[q, q] - 2 * bar[q] + 2 * grand - np.trace(v) / m)

        tokens = range(m)
        mu, acal = np.zeros((m, m)), np.zeros((m,) * 4)
        for i, j in itertools.product(tokens, repeat=2):
            for u, w in itertools.product(tokens, repeat=2):
                mu[i, j] += v[u, w] * s1(i, u, j, w) / m**2
            for q in tokens:
                mu[i, j] += (v[j, q] * s2(i, q) + v[i, q] * s2(j, q)) / (2 * m)
        for i, j, p, q, u, w in itertools.product(tokens, repeat=6):
            acal[i, j, p, q] += (
                v[i, u] * v[p, w] * s1(j, u, q, w)
                + v[i, u] * v[q, w] * s1(j, u, p, w)
                + v[j, u] * v[p, w] * s1(i, u, q, w)
                + v[j, u] * v[q, w] * s1(i, u, p, w)
            ) / m**2
        tensor = torch.from_numpy(v)
        drift = self.sde.drift(tensor) * 0.8**2 / 0.6**2
        rest = self.sde.diffusion(tensor) - self.sde.kappa * moments.linear_diffusion(tensor)
        bound = 16 * rounding(tensor, 1, 1)  # divided by gam^4 / tau0^2, and a sum over m^2 pairs
        torch.testing.assert_close(drift, torch.from_numpy(mu), rtol=0, atol=bound)
        torch.testing.assert_close(
            rest * 0.8**2 / 0.6**4, torch.from_numpy(acal), rtol=0, atol=bound
        )

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_two_tokens_have_no_s(self, seed, is_causal):
        """So a test with them alone would be blind to it: beta and -beta give one drift."""
        v = generic(2, seed)
        plus, minus = (
            CovarianceSDE(softmax_gain=gain, mlp=False, is_causal=is_causal).drift(v)
            for gain in (1.5, -1.5)
        )
        torch.testing.assert_close(plus, minus, rtol=0, atol=rounding(v, 1.5, 1))
        three = [
            CovarianceSDE(softmax_gain=gain, mlp=False, is_causal=is_causal).drift(generic(3))
            for gain in (1.5, -1.5)
        ]
        assert (three[0] - three[1]).abs().max() > 0.05

    def test_equicorrelated_has_no_s(self):
        v = equicorrelated(5, 0.3, 1.7)
        plus, minus = (CovarianceSDE(softmax_gain=gain, mlp=False).drift(v) for gain in (1.5, -1.5))
        torch.testing.assert_close(plus, minus, rtol=0, atol=rounding(v, 1.5, 1))

    @pytest.mark.parametrize("heads", [1, 4])
    @pytest.mark.parametrize("beta", [1.0, 1.5])
    def test_antipodal_tokens(self, heads, beta):
        """Section 5: mu_11 = (gam beta / tau0)^2 v^3, Sigma_11,11 as in (37)."""
        gam, tau0, size = 0.6, 0.7, 1.9
        v = size * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        sde = CovarianceSDE(branch_gain=gam, tau0=tau0, mlp=False, heads=heads, softmax_gain=beta)
        drift, sigma = sde.drift(v), sde.diffusion(v)
        expected = gam**2 * beta**2 / tau0**2 * size**3
        torch.testing.assert_close(drift, expected * v / size, rtol=16 * EPS, atol=0)
        spread = 2 * gam**2 * (2 - gam**2) * size**2 + 4 * gam**4 * beta**2 * size**4 / (
            heads * tau0**2
        )
        assert math.isclose(sigma[0, 0, 0, 0], spread, rel_tol=16 * EPS)
        # The family is invariant: dV_11 = dV_22 = -dV_12.
        sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        expected = spread * sign[:, :, None, None] * sign
        torch.testing.assert_close(sigma, expected, rtol=16 * EPS, atol=0)


class TestMLP:
    @pytest.mark.parametrize("width", [4, 9, 64, 10**4])
    @pytest.mark.parametrize("rho", [-0.95, -0.3, 0.0, 0.5, 0.99])
    @pytest.mark.parametrize("slopes", [(0.0, -1.0), (0.5, -1.0), (-0.3, 1.4), (0.7, 0.7)])
    def test_kernel_of_the_branch(self, slopes, rho, width):
        """(27), exact at every width: c_n E[sigma_s(h_i) sigma_s(h_j)] by quadrature over angles.

        For h = r (cos t, cos(t - phi)) with E[r^2] = 2, what is left is smooth between four kinks.
        """
        sizes = (1.3, 0.6)
        phi = math.acos(rho)
        s_plus, s_minus = (1 + c / math.sqrt(width) for c in slopes)

        def sigma(x):
            return s_plus * np.maximum(x, 0) + s_minus * np.minimum(x, 0)

        right = math.pi / 2
        kinks = sorted(x % (2 * math.pi) for x in (right, -right, phi + right, phi - right))
        nodes, weights = np.polynomial.legendre.leggauss(24)
        total = 0.0
        for low, high in zip(kinks, [*kinks[1:], kinks[0] + 2 * math.pi], strict=True):
            t = (low + high) / 2 + (high - low) / 2 * nodes
            total += (high - low) / 2 * (weights * sigma(np.cos(t)) * sigma(np.cos(t - phi))).sum()
        root = math.sqrt(sizes[0] * sizes[1])
        c_n = variance_correction(*slopes, width)
        kernel = c_n * root * total / math.pi
        v = torch.tensor([[sizes[0], rho * root], [rho * root, sizes[1]]], dtype=torch.float64)
        rise = moments.mlp_drift(v, *slopes)
        expected = v[0, 1] + c_n / width * rise[0, 1]
        assert math.isclose(kernel, expected, rel_tol=0, abs_tol=256 * EPS)
        assert rise[0, 0] == rise[1, 1] == 0

    def test_drift_of_the_process(self):
        """(28), with c_n of a target width if there is one."""
        v = generic(3)
        root = v.diagonal().sqrt()
        rho = v / root[:, None] / root
        nu = torch.zeros_like(v)
        for i, j in itertools.product(range(3), repeat=2):
            x = min(1.0, float(rho[i, j]))
            angle = math.sqrt(1 - x * x) - x * math.acos(x)
            nu[i, j] = 1.5**2 / (2 * math.pi) * angle * root[i] * root[j] if i != j else 0
        arguments = {"branch_gain": 0.7, "attention": False, "c_plus": 0.5, "c_minus": -1.0}
        limit = CovarianceSDE(**arguments)
        torch.testing.assert_close(limit.drift(v), 0.49 * nu, rtol=64 * EPS, atol=0)
        finite = CovarianceSDE(**arguments, width=64)
        c_n = 1 / (1 - 0.5 / 8 + 1.25 / 128)
        torch.testing.assert_close(finite.drift(v), 0.49 * c_n * nu, rtol=64 * EPS, atol=0)
        assert limit.mlp_correction == 1.0 and abs(c_n - 1) > 0.05
        # The diffusion is that of the limit.
        assert torch.equal(limit.diffusion(v), limit.kappa * moments.linear_diffusion(v))
        assert torch.equal(limit.diffusion(v), finite.diffusion(v))

    def test_token_that_is_zero(self):
        v = torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 0.0], [0.3, 0.0, 2.0]], dtype=torch.float64)
        drift = moments.mlp_drift(v, 0.0, -1.0)
        assert drift.isfinite().all()
        assert not drift[1].any() and not drift[:, 1].any() and drift[0, 2] > 0


class TestKappa:
    """The table of section 3.7."""

    @pytest.mark.parametrize("gam", [0.3, 0.7, 1.0])
    @pytest.mark.parametrize(
        ("changes", "formula"),
        [
            ({"mlp": False}, lambda g: g**2 * (2 - g**2)),
            ({"mlp": False, "out_proj": "orthogonal"}, lambda g: g**2 * (2 - g**2)),
            ({"mlp": False, "out_proj": "gaussian"}, lambda g: 2 * g**2),
            ({"attention": False}, lambda g: 2 * g**2),
            ({"attention": False, "out_proj": "gaussian"}, lambda g: 2 * g**2),
            (
                {"attention": False, "mlp_ratio": 4.0},
                lambda g: g**2 * (2 - g**2 + g**2 / 4),
            ),
            ({}, lambda g: g**2 * (4 - g**2)),
            (
                {"out_proj": "gaussian", "mlp_ratio": 0.5, "heads": 2},
                lambda g: 2 * g**2 + g**2 * (2 + g**2),
            ),
        ],
    )
    def test_table(self, changes, formula, gam):
        sde = CovarianceSDE(branch_gain=gam, **changes)
        assert math.isclose(sde.kappa, formula(gam), rel_tol=8 * EPS)

    @pytest.mark.parametrize("heads", [1, 4])
    def test_full_block(self, heads):
        """(30), (31): the sums of those of attention and MLP."""
        v = generic(4)
        common = {"branch_gain": 0.7, "tau0": 0.5, "heads": heads, "is_causal": True}
        block = CovarianceSDE(**common)
        parts = CovarianceSDE(**common, mlp=False), CovarianceSDE(**common, attention=False)
        drift = sum(part.drift(v) for part in parts)
        sigma = sum(part.diffusion(v) for part in parts)
        torch.testing.assert_close(block.drift(v), drift, rtol=0, atol=rounding(v, 1, 2))
        torch.testing.assert_close(block.diffusion(v), sigma, rtol=0, atol=rounding(v, 1, 2))


@pytest.mark.parametrize("mask", ["full", "causal", "hidden_key", "causal_prior"])
@pytest.mark.parametrize("identity_gain", [1.0, 0.7])
def test_detuning(mask, identity_gain):
    """(35) against n (lam^2 V + gam^2 A V A^T - V) for A at zero logits and large n.

    The centre has the row sums of the prior as softmax has; they were once left out here.
    """
    m, gam, n = 4, 0.6, 2.0**24
    e1, e2, e3 = 0.8, -1.1, 0.5
    v = generic(m)
    rows, gains = zero_logit_of(m, mask)
    a0 = torch.tensor(gains)[:, None] * torch.tensor(rows, dtype=torch.float64)
    a = (identity_gain + e1 / n) * torch.eye(m, dtype=torch.float64) + e2 / n * a0
    skip = 1 - (gam * identity_gain) ** 2 + e3 / n
    expected = n * (skip * v + gam**2 * a @ v @ a.mT - v)
    common = {"branch_gain": gam, "identity_gain": identity_gain, "mlp": False, **MASKS[mask](m)}
    tuned = CovarianceSDE(**common, detuning=Detuning(e1, e2, e3))
    found = tuned.drift(v) - CovarianceSDE(**common).drift(v)
    # Rounding of V times n, and the square of the detuning.
    bound = (8 * n * EPS + 16 / n) * float(v.abs().max()) * max(gains) ** 2
    torch.testing.assert_close(found, expected, rtol=0, atol=bound + rounding(v, 2.2, 1))
    assert bound < 1e-4 * float(expected.abs().max())
    assert torch.equal(tuned.diffusion(v), CovarianceSDE(**common).diffusion(v))


def test_detuned_variance_acts_in_each_sub_layer():
    v = generic(3)
    e3 = Detuning(variance=0.4)
    for changes, count in (({}, 2), ({"mlp": False}, 1), ({"attention": False}, 1)):
        found = CovarianceSDE(detuning=e3, **changes).drift(v) - CovarianceSDE(**changes).drift(v)
        torch.testing.assert_close(found, count * 0.4 * v, rtol=0, atol=rounding(v, 1, 1))


MANY = {
    "full": {},
    "causal_heads": {"is_causal": True, "heads": 2, "softmax_gain": (0.5, 1.5), "mlp_ratio": 4.0},
    "prior": {"prior": prior_of(4), "out_proj": "gaussian"},
}


@pytest.mark.parametrize("case", MANY)
def test_scaling(case):
    """(36): mu(s V, s tau0) = s mu(V, tau0), Sigma(s V, s tau0) = s^2 Sigma(V, tau0)."""
    for seed, s in enumerate((0.5, 4.0, 2.0**-10)):  # powers of 2 scale every rounding too
        v = generic(4, seed)
        one = CovarianceSDE(tau0=0.75, branch_gain=0.7, **MANY[case])
        other = CovarianceSDE(tau0=0.75 * s, branch_gain=0.7, **MANY[case])
        torch.testing.assert_close(other.drift(s * v), s * one.drift(v), rtol=32 * EPS, atol=0)
        sigma = s**2 * one.diffusion(v)
        torch.testing.assert_close(
            other.diffusion(s * v), sigma, rtol=0, atol=rounding(v, 1.5, 1) * s**2
        )


def test_beta_is_not_a_temperature():
    """Section 3.8: the s terms see beta / tau0^2, all others beta / tau0."""
    v = generic(4)
    gain = CovarianceSDE(softmax_gain=1.5, mlp=False)
    temperature = CovarianceSDE(tau0=1 / 1.5, mlp=False)
    apart = (gain.drift(v) - temperature.drift(v)).abs().max()
    assert apart > 0.05 * gain.drift(v).abs().max()
    bound = rounding(v, 1.5, 1)
    torch.testing.assert_close(gain.diffusion(v), temperature.diffusion(v), rtol=0, atol=bound)


class TestSymmetry:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_permuted_tokens(self, order):
        order = [*order, 3]
        v = generic(4)
        sde = CovarianceSDE(tau0=0.5, branch_gain=0.7)
        moved = v[order][:, order]
        expected = sde.drift(v)[order][:, order]
        bound = rounding(v, 1, 2)
        torch.testing.assert_close(sde.drift(moved), expected, rtol=0, atol=bound)
        sigma = sde.diffusion(v)[order][:, order][:, :, order][:, :, :, order]
        torch.testing.assert_close(sde.diffusion(moved), sigma, rtol=0, atol=bound)

    def test_a_causal_mask_has_an_order(self):
        order = [1, 0, 2, 3]
        v = generic(4)
        sde = CovarianceSDE(tau0=0.5, branch_gain=0.7, is_causal=True)
        moved = v[order][:, order]
        assert (sde.drift(moved) - sde.drift(v)[order][:, order]).abs().max() > 0.05

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_equal_tokens(self, is_causal):
        """x_2 = x_3 stay equal without a mask: V_2j - V_3j has neither drift nor diffusion."""
        take = [0, 1, 1, 2]
        v = generic(3)[take][:, take]
        sde = CovarianceSDE(tau0=0.5, branch_gain=0.7, is_causal=is_causal)
        drift = sde.drift(v)
        apart = (drift[1] - drift[2]).abs().max()
        weight = torch.zeros(4, 4, dtype=torch.float64)
        weight[1, 0], weight[2, 0] = 1.0, -1.0
        spread = torch.einsum("ij,ijpq,pq->", weight, sde.diffusion(v), weight)
        bound = 4 * rounding(v, 1, 2)
        if is_causal:
            assert apart > 1e-3 and spread > 1e-3
        else:
            assert apart <= bound and abs(spread) <= bound

    @given(
        m=st.integers(1, 4),
        seed=st.integers(0, 10**6),
        mask=st.sampled_from(sorted(MASKS)),
        tau0=st.floats(0.2, 5),
        gam=st.floats(0, 1),
        mlp=st.booleans(),
        heads=st.integers(1, 3),
        rank=st.integers(1, 4),
    )
    @settings(max_examples=60)
    def test_covariance_of_a_symmetric_matrix(self, m, seed, mask, tau0, gam, mlp, heads, rank):
        """For any V, singular too: mu is symmetric, Sigma symmetric in every way, and PSD."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        v = x @ x.mT
        sde = CovarianceSDE(tau0=tau0, branch_gain=gam, mlp=mlp, heads=heads, **MASKS[mask](m))
        bound = 4 * rounding(v, 2.2, 1 + 1 / tau0**2)
        drift, sigma = sde.drift(v), sde.diffusion(v)
        torch.testing.assert_close(drift, drift.mT, rtol=0, atol=bound)
        for other in (
            sigma.transpose(0, 1),
            sigma.transpose(2, 3),
            sigma.permute(2, 3, 0, 1),
        ):
            torch.testing.assert_close(sigma, other, rtol=0, atol=bound)
        form = sigma.reshape(m * m, m * m)
        assert torch.linalg.eigvalsh((form + form.mT) / 2)[0] >= -m * m * bound

    @given(seed=st.integers(0, 10**6), tau0=st.floats(0.1, 5), gam=st.floats(0.1, 1))
    def test_first_token_under_a_causal_mask(self, seed, tau0, gam):
        """It sees only itself: a geometric Brownian motion that ignores tau0, (25)."""
        v = generic(3, seed)
        sde = CovarianceSDE(tau0=tau0, branch_gain=gam, is_causal=True)
        bound = rounding(v, 1, 1 + 1 / tau0**2)
        assert abs(sde.drift(v)[0, 0]) <= bound
        assert abs(sde.diffusion(v)[0, 0, 0, 0] - 2 * sde.kappa * v[0, 0] ** 2) <= bound

    def test_token_that_sees_nothing(self):
        """Its row of A is that of the identity; it is not NaN."""
        v = generic(3)
        sde = CovarianceSDE(key_start=1, is_causal=True, mlp=False)
        assert abs(sde.drift(v)[0, 0]) <= rounding(v, 1, 1)
        nobody = CovarianceSDE(key_start=2, key_end=2, mlp=False)
        assert not nobody.drift(v).any()
        expected = nobody.kappa * moments.linear_diffusion(v)
        torch.testing.assert_close(nobody.diffusion(v), expected, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("case", MANY)
class TestInterface:
    def test_batch(self, case):
        sde = CovarianceSDE(tau0=0.5, branch_gain=0.7, **MANY[case])
        many = torch.stack([generic(4, seed) for seed in range(6)]).view(2, 3, 4, 4)
        drift, sigma = sde.drift(many), sde.diffusion(many)
        assert drift.shape == (2, 3, 4, 4) and sigma.shape == (2, 3, 4, 4, 4, 4)
        for b, c in itertools.product(range(2), range(3)):
            v = many[b, c]
            bound = rounding(v, 2.2, 2)
            torch.testing.assert_close(drift[b, c], sde.drift(v), rtol=0, atol=bound)
            torch.testing.assert_close(sigma[b, c], sde.diffusion(v), rtol=0, atol=bound)
        assert sde.drift(many[:0]).shape == (0, 3, 4, 4)
        assert sde.diffusion(many[:0]).shape == (0, 3, 4, 4, 4, 4)

    def test_float32(self, case):
        sde = CovarianceSDE(tau0=0.5, branch_gain=0.7, **MANY[case])
        v = generic(4, dtype=torch.float32)
        ratio = torch.finfo(torch.float32).eps / EPS
        for f in (sde.drift, sde.diffusion):
            found = f(v)
            assert found.dtype == torch.float32
            bound = ratio * rounding(v, 2.2, 2)
            torch.testing.assert_close(found.double(), f(v.double()), rtol=0, atol=bound)

    def test_input_is_left_alone(self, case):
        sde = CovarianceSDE(**MANY[case])
        v = generic(4)
        before = v.clone()
        sde.drift(v), sde.diffusion(v)
        assert torch.equal(v, before)
