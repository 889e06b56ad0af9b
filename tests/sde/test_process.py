"""The simulation of the SDE: its noise and steps against drift and diffusion, freezing, errors.

Equation numbers are those of covariance-sde.md. Statistical tests have fixed seeds; their bounds
are those of normal z-scores, corrected for the number of entries that are looked at.
"""

import itertools
import math
import re
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from shaped_attn.sde import CovarianceSDE, Detuning, chain, equicorrelated, limit
from shaped_attn.sde.limit import EulerMaruyama, LimitChain
from shaped_attn.sde.paths import check_range, locate, run

NORMAL = statistics.NormalDist()
INTEGRATORS = ["chain", "euler_maruyama"]

# So small a step that its bias, of relative order of the step, is far below any standard error.
TINY = 2.0**-20


def generic(tokens, seed=0):
    """Not equicorrelated, unequal diagonal."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(tokens, 2 * tokens, generator=generator, dtype=torch.float64)
    h = torch.randn(2 * tokens, generator=generator, dtype=torch.float64)
    x = g + 0.6 * h
    return x @ x.mT / (2 * tokens)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def z_bound(count, level=1e-5):
    """What the largest of ``count`` z-scores exceeds with a probability below ``level``."""
    return NORMAL.inv_cdf(1 - level / (2 * count))


def upper(x):
    """The entries on and above the diagonal of (..., m, m)."""
    i, j = torch.triu_indices(*x.shape[-2:])
    return x[..., i, j]


def form(sigma):
    """Sigma of those entries as a matrix."""
    i, j = torch.triu_indices(*sigma.shape[:2])
    return sigma[i, j][:, i, j]


def covariance_z(moves, sigma):
    """z-scores of the covariances of (paths, m, m) against Sigma, for normal moves.

    The variance of the product of two centred normal variables is S_aa S_bb + S_ab^2.
    """
    x = upper(moves)
    found = torch.cov(x.mT)
    s = form(sigma)
    size = s.diagonal()
    error = ((size[:, None] * size + s.square()) / (len(x) - 1)).sqrt()
    return upper((found - s) / error).abs().max().item(), error


def mean_z(values, expected):
    """z-scores of the mean of (paths, m, m), and the largest standard error."""
    x = upper(values)
    error = x.std(0) / math.sqrt(len(x))
    return ((x.mean(0) - upper(expected)) / error).abs().max().item(), error.max().item()


PRIOR = torch.tensor([[0.5, 0.0, 0.0], [0.2, 1.2, 0.0], [0.3, 0.9, 0.8]], dtype=torch.float64)
ATTENTION = {"mlp": False, "branch_gain": 0.7, "tau0": 0.3}
MLP = {"attention": False, "branch_gain": 0.7, "c_plus": 0.5, "c_minus": -3.0}
BLOCK = {"branch_gain": 0.7, "tau0": 0.3, "c_plus": 0.5, "c_minus": -3.0}
CASES = {
    "full": ATTENTION,
    "causal": {**ATTENTION, "is_causal": True},
    "padding": {**ATTENTION, "key_start": 1, "is_causal": True},
    "gain": {**ATTENTION, "is_causal": True, "softmax_gain": 1.5},
    "heads": {**ATTENTION, "heads": 4},
    "head_gains": {**ATTENTION, "heads": 2, "softmax_gain": (0.5, -2.0), "is_causal": True},
    "gaussian": {**ATTENTION, "heads": 4, "out_proj": "gaussian", "is_causal": True},
    "orthogonal": {**ATTENTION, "heads": 4, "out_proj": "orthogonal"},
    "prior": {**ATTENTION, "prior": PRIOR},
    "identity": {**ATTENTION, "prior": PRIOR, "identity_gain": -0.8},
    "mlp": MLP,
    "mlp_4": {**MLP, "mlp_ratio": 4.0},
    "block": BLOCK,
    "block_all": {
        **BLOCK,
        "heads": 4,
        "out_proj": "gaussian",
        "mlp_ratio": 4.0,
        "is_causal": True,
    },
}


class TestEulerMaruyamaNoise:
    """(39) and (40) against (13) and (14)."""

    @staticmethod
    def draw(sde, v, paths=100_000):
        noise = EulerMaruyama(sde, v, TINY, seeded())
        many = v.expand(paths, *v.shape)
        return noise.noise(many, torch.linalg.cholesky(many))

    @pytest.mark.parametrize("case", CASES)
    def test_covariance(self, case):
        v = generic(3)
        sde = CovarianceSDE(**CASES[case])
        noise = self.draw(sde, v)
        # Equal up to the rounding of the two products.
        assert (noise - noise.mT).abs().max() <= 64 * 2**-52 * noise.abs().max()
        z, _ = covariance_z(noise, sde.diffusion(v))
        assert z < z_bound(21)
        assert mean_z(noise, torch.zeros_like(v))[0] < z_bound(6)

    @pytest.mark.parametrize(
        ("case", "wrong"),
        [
            ("full", {"tau0": 0.33}),
            ("causal", {"is_causal": False}),
            ("padding", {"key_start": None}),
            ("gain", {"softmax_gain": 1.4}),
            ("heads", {"heads": 3}),
            ("head_gains", {"softmax_gain": (1.25, 1.25)}),  # the mean of beta, not of beta^2
            ("gaussian", {"out_proj": "orthogonal"}),
            ("orthogonal", {"out_proj": "gaussian"}),
            ("prior", {"prior": PRIOR / PRIOR.sum(-1, keepdim=True)}),
            ("identity", {"identity_gain": 0.7}),
            ("mlp_4", {"mlp_ratio": 1.0}),
        ],
    )
    def test_is_not_blind(self, case, wrong):
        """The same draws, and the diffusion of other settings."""
        v = generic(3)
        noise = self.draw(CovarianceSDE(**CASES[case]), v)
        other = CovarianceSDE(**{**CASES[case], **wrong}).diffusion(v)
        assert covariance_z(noise, other)[0] > 2 * z_bound(21)

    def test_of_many_v(self):
        """Each path has the noise of its own V."""
        sde = CovarianceSDE(**CASES["causal"])
        two = torch.stack((generic(3), 0.5 * generic(3, seed=1)))
        many = two.repeat(50_000, 1, 1)
        noise = EulerMaruyama(sde, two[0], TINY, seeded()).noise(many, torch.linalg.cholesky(many))
        for k in range(2):
            assert covariance_z(noise[k::2], sde.diffusion(two[k]))[0] < z_bound(21)

    @pytest.mark.parametrize("case", ["prior", "block"])
    def test_step_adds_the_parts(self, case, monkeypatch):
        """V + dt mu + sqrt(dt) dN of (41), with a given dN."""
        v = torch.stack([generic(3, seed) for seed in range(4)])
        sde = CovarianceSDE(**CASES[case])
        given_noise = torch.randn(4, 3, 3, dtype=torch.float64)
        given_noise = given_noise + given_noise.mT
        monkeypatch.setattr(EulerMaruyama, "noise", lambda self, v, factor: given_noise)
        moved = EulerMaruyama(sde, v[0], 2.0**-16, None).step(v, 0)
        expected = v + 2.0**-16 * sde.drift(v) + 2.0**-8 * given_noise
        torch.testing.assert_close(moved, expected, rtol=0, atol=64 * 2**-52 * float(v.max()))

    def test_projection(self):
        """What is not positive definite gets eigenvalues of 1e-12 of the largest."""
        generator = seeded()
        frame = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        values = torch.tensor([-0.5, -1e-9, 0.3, 2.0], dtype=torch.float64)
        bad = (frame * values) @ frame.mT
        good = torch.eye(4, dtype=torch.float64) * 1e-20
        broken = torch.full((4, 4), math.nan, dtype=torch.float64)
        found = EulerMaruyama._projected(torch.stack((bad, good, broken)))
        expected = values.clamp(min=2e-12)
        torch.testing.assert_close(torch.linalg.eigvalsh(found[0]), expected, rtol=0, atol=1e-14)
        assert torch.equal(found[1], good) and found[2].isnan().all()

    @pytest.mark.parametrize("m", [1, 2])
    def test_projection_of_what_has_no_positive_part(self, m):
        """It was once left negative, and a variance below 0 was recorded."""
        found = EulerMaruyama._projected(-torch.eye(m, dtype=torch.float64)[None])
        assert torch.equal(found[0], torch.zeros(m, m, dtype=torch.float64))


def mirror_draws(monkeypatch):
    """Make the second half of the paths the mirror image of the first in every draw.

    The law of each path stays what it is, but what is odd in the draws cancels from the mean over a
    pair; it hides the drift, which is smaller by sqrt(dt).
    """
    from scipy.special import gammaincinv

    def normal(sizes, like, generator):
        half = torch.randn(sizes[0] // 2, *sizes[1:], dtype=like.dtype, generator=generator)
        return torch.cat((half, -half))

    def gamma(shape, generator):
        concentration = shape[: len(shape) // 2].numpy()
        uniform = torch.rand(concentration.shape, dtype=shape.dtype, generator=generator).numpy()
        pair = gammaincinv(concentration, uniform), gammaincinv(concentration, 1 - uniform)
        return torch.from_numpy(np.concatenate(pair))

    monkeypatch.setattr(chain, "normal", normal)
    monkeypatch.setattr(limit, "normal", normal)
    monkeypatch.setattr(torch, "_standard_gamma", gamma)


def one_step(sde, v, paths, step=TINY, seed=0):
    """V' - V of one step of the chain."""
    simulation = LimitChain(sde, v, step, seeded(seed))
    state = simulation.start(paths)
    return simulation.covariance(simulation.step(state, 0)) - simulation.covariance(state)


def one_step_drift(sde, v, monkeypatch, pairs=20_000):
    """The mean of (V' - V) / dt over each pair of mirrored paths."""
    mirror_draws(monkeypatch)
    moves = one_step(sde, v, 2 * pairs) / TINY
    return (moves[:pairs] + moves[pairs:]) / 2


class TestLimitChainStep:
    """(66) against the formulas of section 3."""

    @pytest.mark.parametrize("case", CASES)
    def test_drift(self, case, monkeypatch):
        v = generic(3)
        sde = CovarianceSDE(**CASES[case])
        z, error = mean_z(one_step_drift(sde, v, monkeypatch), sde.drift(v))
        assert z < z_bound(6)
        assert error < 0.05 * sde.drift(v).abs().max()  # or the test would see little

    @pytest.mark.parametrize(
        ("case", "wrong"),
        [
            ("gain", {"softmax_gain": -1.5}),  # the s terms alone are odd in beta
            ("causal", {"is_causal": False}),
            ("padding", {"key_start": None}),
            ("prior", {"prior": PRIOR / PRIOR.sum(-1, keepdim=True)}),
            ("head_gains", {"softmax_gain": (-0.75, -0.75)}),  # the mean of beta, not of beta^2
            ("identity", {"identity_gain": 0.8}),
            ("mlp", {"width": 16}),
            ("mlp", {"c_minus": -2.5}),
        ],
    )
    def test_drift_is_not_blind(self, case, wrong, monkeypatch):
        v = generic(3)
        moves = one_step_drift(CovarianceSDE(**CASES[case]), v, monkeypatch)
        other = CovarianceSDE(**{**CASES[case], **wrong})
        assert mean_z(moves, other.drift(v))[0] > 2 * z_bound(6)

    @pytest.mark.parametrize("case", CASES)
    def test_diffusion(self, case):
        v = generic(3)
        sde = CovarianceSDE(**CASES[case])
        moves = one_step(sde, v, 100_000) / math.sqrt(TINY)
        assert covariance_z(moves, sde.diffusion(v))[0] < z_bound(21)

    @pytest.mark.parametrize(
        ("case", "wrong"),
        [
            ("causal", {"is_causal": False}),
            ("gain", {"softmax_gain": 1.4}),
            ("heads", {"heads": 3}),
            ("head_gains", {"softmax_gain": (1.25, 1.25)}),
            ("gaussian", {"out_proj": "none"}),
            ("orthogonal", {"out_proj": "gaussian"}),
            ("mlp_4", {"mlp_ratio": 1.0}),
            ("block_all", {"mlp_ratio": 1.0}),
        ],
    )
    def test_diffusion_is_not_blind(self, case, wrong):
        v = generic(3)
        moves = one_step(CovarianceSDE(**CASES[case]), v, 100_000) / math.sqrt(TINY)
        other = CovarianceSDE(**{**CASES[case], **wrong}).diffusion(v)
        assert covariance_z(moves, other)[0] > 2 * z_bound(21)

    @pytest.mark.parametrize("case", ["causal", "prior", "identity", "block_all"])
    @pytest.mark.parametrize(
        "detuning",
        [Detuning(identity=8.0), Detuning(softmax=-11.0), Detuning(variance=5.0)],
        ids=["identity", "softmax", "variance"],
    )
    def test_detuning(self, case, detuning, monkeypatch):
        """(35), and what it adds with the other sign must be refused."""
        v = generic(3)
        plain = CovarianceSDE(**CASES[case])
        sde = CovarianceSDE(**CASES[case], detuning=detuning)
        moves = one_step_drift(sde, v, monkeypatch)
        assert mean_z(moves, sde.drift(v))[0] < z_bound(6)
        reverse = 2 * plain.drift(v) - sde.drift(v)
        assert mean_z(moves, reverse)[0] > 2 * z_bound(6)

    def test_correction_of_a_target_width(self, monkeypatch):
        """c_n of (4) is on the drift of the MLP."""
        v = generic(3)
        sde = CovarianceSDE(**MLP, width=16)
        c_n = 1 / (1 - 2.5 / 4 + 9.25 / 32)
        expected = c_n * CovarianceSDE(**MLP).drift(v)
        moves = one_step_drift(sde, v, monkeypatch)
        assert mean_z(moves, expected)[0] < z_bound(6)
        assert mean_z(moves, expected / c_n)[0] > 2 * z_bound(6)

    @pytest.mark.parametrize("width", [8, 64])
    @pytest.mark.parametrize("target", [None, 16])
    def test_mlp_kernel_at_any_width(self, width, target, monkeypatch):
        """(27) is exact: so is the mean of a layer."""
        v = generic(4)
        sde = CovarianceSDE(**MLP, width=target)
        simulation = LimitChain(sde, v, 1 / width, None)
        expected = v + sde.drift(v) / width
        for one in simulation.mean(simulation.start(2)):
            torch.testing.assert_close(one, expected, rtol=0, atol=64 * 2**-52 * float(v.max()))

    @pytest.mark.parametrize("ratio", [1.0, 4.0])
    def test_mlp_mean_at_a_small_width(self, ratio):
        """E[V'] = V + dt mu at every n', not in the limit alone."""
        v = generic(3)
        sde = CovarianceSDE(**MLP, mlp_ratio=ratio)
        moves = one_step(sde, v, 200_000, step=1 / 6)
        assert mean_z(moves, sde.drift(v) / 6)[0] < z_bound(6)

    def test_states_are_factors(self):
        simulation = LimitChain(CovarianceSDE(**BLOCK), generic(3), 0.1, seeded())
        state = simulation.step(simulation.start(5), 0)
        assert state.shape == (5, 3, 3) and not state.triu(1).any()
        assert torch.equal(simulation.covariance(state), state @ state.mT)

    def test_token_that_is_zero(self):
        """Its correlation is 0 / 0, which once ended every path of a block as exploded."""
        v0 = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
        for integrator in INTEGRATORS:
            sample = CovarianceSDE(branch_gain=0.7, tau0=2.0).sample(
                v0,
                0.25,
                paths=8,
                steps=32,
                integrator=integrator,
                eigenvalue_range=(0, 1e4),
            )
            assert not sample.stopped.any() and sample.covariances.isfinite().all()
            # The projection (41) gives it a size of 1e-6.
            assert sample.final[:, 1].abs().max() < (1e-14 if integrator == "chain" else 1e-4)
            assert (sample.final[:, 0, 0] != 1).all() and (sample.final[:, 0, 2] != 0).all()


class TestChainParts:
    """The exact pieces of section 7, at small widths where no limit hides an error."""

    @pytest.mark.parametrize("degrees", [3, 4.5, 40])
    def test_wishart_factor(self, degrees):
        """E[W] = nu I, cov(W_ij, W_pq) = nu (I_ip I_jq + I_iq I_jp)."""
        count = 200_000
        like = torch.zeros((), dtype=torch.float64)
        factor = chain.wishart_factor((count, 3, 3), degrees, like, seeded())
        assert not factor.triu(1).any()
        w = factor @ factor.mT
        eye = torch.eye(3, dtype=torch.float64)
        assert mean_z(w, degrees * eye)[0] < z_bound(6)
        products = upper(w - degrees * eye)
        products = products[:, :, None] * products[:, None, :]
        expected = degrees * (
            torch.einsum("ip,jq->ijpq", eye, eye) + torch.einsum("iq,jp->ijpq", eye, eye)
        )
        assert mean_z(products, form(expected))[0] < z_bound(21)

    @pytest.mark.parametrize("width", [4, 5.5, 64])
    def test_branch_step(self, width):
        """(42): mean lam^2 V + gam^2 K, and its covariance, exactly at n >= 2m."""
        skip, gam, count = 0.8, 0.9, 200_000
        v, k = generic(2), 0.5 * generic(2, seed=3)
        factors = [torch.linalg.cholesky(x).expand(count, 2, 2) for x in (v, k)]
        # Another root of K: only R R^T matters.
        turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
        moved = chain.branch_step(factors[0], factors[1] @ turn, skip, gam, width, seeded())
        found = moved @ moved.mT
        mean = skip**2 * v + gam**2 * k
        assert mean_z(found, mean)[0] < z_bound(3)

        def pair(a, b):
            return torch.einsum("ip,jq->ijpq", a, b) + torch.einsum("iq,jp->ijpq", a, b)

        sigma = skip**2 * gam**2 * (pair(k, v) + pair(v, k)) + gam**4 * pair(k, k)
        products = upper(found - mean)
        products = products[:, :, None] * products[:, None, :]
        assert mean_z(products, form(sigma) / width)[0] < z_bound(6)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_lower_factor(self, dtype):
        """Also of matrices whose Gram matrix has lost its small eigenvalues, or is broken."""
        wide = torch.randn(6, 3, 6, dtype=dtype)
        wide[1, 2] = wide[1, 1] + 1e-4 * wide[1, 2]
        wide[2, 2] = wide[2, 1]
        wide[3] *= 1e-12
        wide[4, 1, 2] = math.nan
        factor = chain.lower_factor(wide)
        assert factor.shape == (6, 3, 3) and not factor[[0, 1, 2, 3, 5]].triu(1).any()
        assert factor[4].isnan().all()
        eps = torch.finfo(dtype).eps
        for k in (0, 1, 2, 3, 5):
            expected = (wide[k].double() @ wide[k].double().mT).to(dtype)
            size = float(expected.abs().max())
            torch.testing.assert_close(
                factor[k] @ factor[k].mT, expected, rtol=0, atol=32 * eps * size
            )
        # The smallest pivot of a nearly singular one is good to eps / 1e-4, not to its square.
        exact = torch.linalg.qr(wide[1].double().mT).R[2, 2].abs()
        assert abs(factor[1, 2, 2].abs().double() - exact) < 32 * eps * wide[1].norm()

    def test_root_of_singular(self):
        v = torch.stack((generic(3), torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)))
        v[3, 0, 1] = v[3, 1, 0] = math.nan
        root = chain.root_of(v)
        torch.testing.assert_close((root @ root.mT)[:3], v[:3], rtol=0, atol=1e-14)
        assert root[3].isnan().any()

    @pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e300])
    def test_shaped_matrix(self, size):
        """(5) by loops; logits of any size, hidden keys and a row that sees none."""
        sde = CovarianceSDE(prior=PRIOR, mlp=False, heads=2, key_start=1)
        like = torch.zeros((), dtype=torch.float64)
        zero_logit = sde.zero_logit_attention(3, like)
        logits = size * torch.randn(4, 2, 3, 3, dtype=torch.float64)
        gains = torch.tensor([1.5, 0.5]).double(), torch.tensor([1.2, 0.7]).double()
        before = logits.clone()
        found = chain.ShapedMatrix(zero_logit, 0.9, *gains)(logits)
        assert torch.equal(logits, before)
        for b, h, i in itertools.product(range(4), range(2), range(3)):
            keys = [j for j in range(3) if PRIOR[i, j] > 0 and j >= 1]
            mass = sum(float(PRIOR[i, j]) for j in keys)
            row = [0.9 * (i == j) for j in range(3)]
            top = max((float(logits[b, h, i, j]) for j in keys), default=0)
            weights = {j: PRIOR[i, j] * math.exp(logits[b, h, i, j] - top) for j in keys}
            for j in keys:
                softmax = mass * weights[j] / sum(weights.values())
                row[j] += float(gains[0][h] * softmax - gains[1][h] * PRIOR[i, j])
            torch.testing.assert_close(
                found[b, h, i], torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-14
            )

    def test_normal(self):
        """On a CPU it is not torch's own draw."""
        for sizes, dtype in (((3, 33_333, 3), torch.float64), ((99_999,), torch.float32)):
            like = torch.zeros((), dtype=dtype)
            x = chain.normal(sizes, like, seeded())
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
        assert chain.normal((0, 3, 3), torch.zeros(()).double(), seeded()).shape == (0, 3, 3)


def ks(first, second):
    """Two-sample Kolmogorov-Smirnov statistic."""
    both = torch.cat((first, second)).sort().values
    below = [
        torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (first, second)
    ]
    return (below[0] - below[1]).abs().max().item()


def ks_bound(count, *paths, level=1e-5):
    """Its critical value at ``level``, for the largest of ``count``."""
    return math.sqrt(-math.log(level / count / 2) / 2 * sum(1 / n for n in paths))


class TestLaw:
    """Many steps."""

    @staticmethod
    def worst(first, second):
        """The largest KS of all statistics at the last time, in units of its critical value."""
        first, second = first.at(-1).statistics(), second.at(-1).statistics()
        bound = ks_bound(len(first), *(x["V_11"].shape[1] for x in (first, second)))
        return max(ks(first[name][0], second[name][0]) for name in first) / bound

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"is_causal": True, "heads": 2}, {"mlp": False, "prior": PRIOR}],
        ids=["full", "causal_heads", "prior"],
    )
    def test_integrators_agree(self, arguments):
        """Where hardly a path blows up: coarse steps disagree about those that do."""
        arguments = {"tau0": 0.8, **arguments}
        first, second, other = (
            CovarianceSDE(branch_gain=gain, **arguments).sample(
                generic(3), 0.5, 3000, steps, seeded(seed), integrator=name, snapshots=2
            )
            for seed, (gain, name, steps) in enumerate(
                ((0.35, "chain", 96), (0.35, "euler_maruyama", 256), (0.5, "chain", 32))
            )
        )
        assert self.worst(first, second) < 1
        assert self.worst(first, other) > 1.5 and self.worst(second, other) > 1.5

    def test_another_temperature_is_seen(self):
        first, second, same = (
            CovarianceSDE(branch_gain=0.6, tau0=tau0, is_causal=True, mlp=False).sample(
                generic(3), 0.5, 3000, 64, seeded(seed), snapshots=2
            )
            for seed, tau0 in enumerate((2.0, 0.5, 2.0))
        )
        assert self.worst(first, second) > 1.2 and self.worst(first, same) < 1

    @staticmethod
    def check_normal(values, mean, variance):
        """Mean, variance and law of log V against a normal law."""
        count = len(values)
        assert abs(values.mean() - mean) < z_bound(2) * math.sqrt(variance / count)
        # The variance of a normal sample has the standard error variance sqrt(2 / (count - 1)).
        assert abs(values.var() / variance - 1) < z_bound(2) * math.sqrt(2 / (count - 1))
        x = ((values - mean) / math.sqrt(variance)).sort().values
        cdf = torch.special.ndtr(x)
        rank = torch.arange(count, dtype=torch.float64) / count
        distance = max((cdf - rank).max(), (rank + 1 / count - cdf).max())
        assert distance < ks_bound(1, count)

    KAPPA = {
        "causal": ({"is_causal": True, "mlp": False}, 0.25 * 1.75),
        "causal_gaussian": ({"is_causal": True, "mlp": False, "out_proj": "gaussian"}, 0.5),
        "causal_block": ({"is_causal": True, "heads": 2}, 0.25 * 1.75 + 0.5),
        "mlp": ({"attention": False}, 0.5),
        "mlp_4": ({"attention": False, "mlp_ratio": 4.0}, 0.25 * (2 - 0.25 + 0.25 / 4)),
    }

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    @pytest.mark.parametrize("case", KAPPA)
    def test_lone_token(self, case, integrator):
        """(25): log V_11 ~ N(log V_11(0) - kappa t, 2 kappa t) at t = 0.5, whatever tau0.

        A step multiplies V_11 by 1 + e with E[e] = 0 and E[e^2] = 2 kappa dt, and with
        E[e^3] = O(dt^2), so the mean of log V_11 over t is off by O(kappa^2 dt t): here by about
        0.001 for standard errors of 0.01.
        """
        arguments, kappa = self.KAPPA[case]
        # Sharp attention would blow up the other token, sooner in Euler-Maruyama.
        tau0 = 0.7 if integrator == "chain" else 4.0
        sde = CovarianceSDE(branch_gain=0.5, tau0=tau0, **arguments)
        assert math.isclose(sde.kappa, kappa, rel_tol=1e-14)
        v0 = equicorrelated(2, 0.2) * torch.tensor([[1.0, 0.5], [0.5, 0.25]])
        sample = sde.sample(
            v0,
            0.5,
            4000,
            256,
            seeded(),
            integrator=integrator,
            snapshots=2,
            eigenvalue_range=(0, math.inf),
        )
        assert not sample.stopped.any()
        logs = sample.variances()["V_11"].log()
        self.check_normal(logs[-1], math.log(v0[0, 0]) - kappa / 2, kappa)
        if not sde.attention:
            logs = sample.variances()["V_22"].log()
            self.check_normal(logs[-1], math.log(v0[1, 1]) - kappa / 2, kappa)

    def test_lone_token_at_a_coarse_step(self):
        """At 4 steps the law is not (25), but known too: V' nu / V is chi^2 with nu = 4 / kappa."""
        gam, steps, paths = 0.8, 4, 50_000
        kappa = gam**2 * (2 - gam**2)
        freedom = steps / kappa
        mean = math.log(2 / freedom) + float(special.digamma(freedom / 2))
        variance = float(special.polygamma(1, freedom / 2))
        fourth = float(special.polygamma(3, freedom / 2)) + 3 * variance**2
        sde = CovarianceSDE(branch_gain=gam, mlp=False, is_causal=True)
        v0, forever = equicorrelated(2, 0.2), (0, math.inf)
        sample = sde.sample(v0, 1.0, paths, steps, seeded(), eigenvalue_range=forever)
        found = sample.variances()["V_11"].log().diff(dim=0).flatten()
        assert len(found) == 4 * paths
        count = len(found)
        assert abs(found.mean() - mean) < z_bound(2) * math.sqrt(variance / count)
        error = math.sqrt((fourth - variance**2) / count)
        assert abs(found.var() - variance) < z_bound(2) * error
        # The limit would be refused.
        assert abs(-kappa / steps - mean) > 5 * math.sqrt(variance / count)


class Scripted:
    """A simulation of given covariances, (paths, steps + 1, m, m). The state is (path, step)."""

    def __init__(self, table):
        self.table, self.begun, self.moved = table, 0, []

    def start(self, paths):
        first = torch.arange(self.begun, self.begun + paths)
        self.begun += paths
        return torch.stack((first, torch.zeros_like(first)), -1)

    def step(self, state, index):
        assert (state[:, 1] == index).all()
        self.moved += [(index, int(path)) for path in state[:, 0]]
        return state + torch.tensor([0, 1])

    def covariance(self, state):
        return self.table[state[:, 0], state[:, 1]]


def run_script(table, **changes):
    arguments = {
        "source": "sde",
        "paths": len(table),
        "steps": table.shape[1] - 1,
        "time": 1.0,
        "snapshots": table.shape[1],
        "eigenvalue_range": (0.1, 10.0),
        "chunk": 100,
    }
    return run(Scripted(table), **{**arguments, **changes})


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


class TestFreezing:
    def test_by_hand(self):
        ok = [diagonal(1.0 + k, 2.0) for k in range(6)]
        high, low, both = diagonal(11.0, 1.0), diagonal(1.0, 0.09), diagonal(11.0, 0.01)
        nan = diagonal(1.0, math.nan)
        table = torch.stack(
            [
                torch.stack(ok),
                torch.stack([ok[0], ok[1], ok[2], high, ok[4], ok[5]]),  # must not come back
                torch.stack([ok[0], ok[1], low, ok[3], ok[4], ok[5]]),
                torch.stack([ok[0], ok[1], ok[2], ok[3], ok[4], nan]),
                torch.stack([ok[0], both, high, ok[3], ok[4], ok[5]]),
                torch.stack([ok[0], ok[1], -high, low, high, ok[5]]),
            ]
        )
        sample = run_script(table, time=2.5)
        inf = math.inf
        assert sample.times.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert sample.stop_times.tolist() == [inf, 1.5, 1.0, 2.5, 0.5, 1.0]
        assert sample.exploded.tolist() == [False, True, False, True, True, False]
        assert sample.collapsed.tolist() == [False, False, True, False, False, True]
        # The number of the last admissible V at each time.
        last = [
            [0, 1, 2, 3, 4, 5],
            [0, 1, 2, 2, 2, 2],
            [0, 1, 1, 1, 1, 1],
            [0, 1, 2, 3, 4, 4],
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1],
        ]
        for path, numbers in enumerate(last):
            expected = torch.stack([ok[number] for number in numbers])
            assert torch.equal(sample.covariances[:, path], expected)

    @given(data=st.data(), paths=st.integers(1, 5), steps=st.integers(1, 5))
    @settings(max_examples=60)
    def test_is_its_definition(self, data, paths, steps):
        """Any pattern of leaving, any chunks and snapshots, against a loop over one path."""
        kinds = st.lists(st.sampled_from("....+-n"), min_size=steps, max_size=steps)
        script = [data.draw(kinds) for _ in range(paths)]
        chunk, snapshots = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 7))
        table = torch.empty(paths, steps + 1, 1, 1, dtype=torch.float64)
        for path in range(paths):
            for k, kind in enumerate([".", *script[path]]):
                size = {".": 1 + 0.1 * path + 0.01 * k, "+": 20.0, "-": 0.01, "n": math.nan}[kind]
                table[path, k] = size
        simulation = Scripted(table)
        arguments = {"source": "sde", "paths": paths, "steps": steps, "time": 1.0}
        sample = run(
            simulation,
            **arguments,
            snapshots=snapshots,
            chunk=chunk,
            eigenvalue_range=(0.1, 10.0),
        )
        recorded = sorted({round(i * steps / (snapshots - 1)) for i in range(snapshots)})
        assert sample.times.tolist() == [k / steps for k in recorded]
        for path in range(paths):
            kept, stop_time, exploded = [float(table[path, 0])], math.inf, False
            for k, kind in enumerate(script[path], 1):
                if stop_time == math.inf and kind != ".":
                    stop_time, exploded = k / steps, kind != "-"
                is_frozen = stop_time != math.inf
                kept.append(kept[-1] if is_frozen else float(table[path, k]))
                # A path is moved until it leaves, and then no more.
                assert ((k - 1, path) in simulation.moved) == (stop_time >= k / steps)
            assert sample.covariances[:, path, 0, 0].tolist() == [kept[k] for k in recorded]
            assert sample.stop_times[path] == stop_time
            assert sample.exploded[path] == exploded

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("eigenvalue_range", [(1e-4, 1e4), (0, 1e4), (0, math.inf)])
    def test_where_paths_blow_up(self, integrator, dtype, eigenvalue_range):
        """No skip path and sharp attention: nothing that is recorded leaves the range."""
        low, high = eigenvalue_range
        sde = CovarianceSDE(branch_gain=1.0, tau0=0.05, is_causal=True)
        sample = sde.sample(
            generic(3).to(dtype),
            paths=200,
            steps=32,
            generator=seeded(),
            snapshots=33,
            integrator=integrator,
            eigenvalue_range=eigenvalue_range,
        )
        v = sample.covariances
        assert v.isfinite().all() and v.dtype == dtype
        values = torch.linalg.eigvalsh(v.double())
        slack = 8 * torch.finfo(dtype).eps
        assert (values[..., -1] <= high).all()
        assert (values[..., 0] >= low - slack * values[..., -1]).all()
        k = torch.arange(33)[:, None]
        stop_step = sample.stop_times * 32
        moved = (v[1:] != v[:-1]).flatten(2).any(2)
        assert torch.equal(moved, k[1:] < stop_step)
        if high < math.inf:
            assert sample.exploded.any()
        assert sample.collapsed.any() == (low > 0)

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    def test_all_paths_stopped(self, integrator):
        """The rest of the time passes with nothing to move."""
        progress = []
        sample = CovarianceSDE(branch_gain=1.0, tau0=0.1).sample(
            equicorrelated(3, 0.1),
            1.0,
            20,
            64,
            seeded(),
            integrator=integrator,
            eigenvalue_range=(0.5, 2.0),
            on_progress=lambda done, total: progress.append((done, total)),
        )
        assert sample.stopped.all() and sample.stop_times.max() < 0.5
        assert len(sample.times) == 33 and sample.times[-1] == 1.0
        assert progress[-1] == (20 * 64, 20 * 64)

    @pytest.mark.parametrize("integrator", [LimitChain, EulerMaruyama])
    @pytest.mark.parametrize("kind", ["nan", "inf", "huge", "zero", "singular"])
    def test_rows_are_independent(self, integrator, kind):
        """What happens to one path does not reach another."""
        v = torch.stack([generic(3, seed) for seed in range(4)])
        sde = CovarianceSDE(branch_gain=0.7, tau0=0.5)
        simulation = integrator(sde, v[0], 1 / 16, None)
        state = v if integrator is EulerMaruyama else torch.linalg.cholesky(v)
        bad = state.clone()
        bad[2] = {
            "nan": math.nan,
            "inf": math.inf,
            "huge": 1e200 * state[2],
            "zero": 0.0,
            "singular": torch.ones(3, 3, dtype=torch.float64),
        }[kind]
        moved = []
        for x in (state, bad):
            simulation.generator = seeded()
            moved.append(simulation.covariance(simulation.step(x, 0)))
        others = [0, 1, 3]
        assert torch.equal(moved[0][others], moved[1][others])
        assert not torch.equal(moved[0][2], moved[1][2])
        if kind in ("nan", "inf"):
            assert not locate(moved[1], 1e-4, 1e4)[0][2]


class TestLocate:
    @given(
        values=st.lists(
            st.sampled_from([-1e-9, 0.0, 0.01, 0.09, 0.11, 1.0, 2.0, 9.0, 11.0, 1e3]),
            min_size=1,
            max_size=4,
        ),
        seed=st.integers(0, 10**6),
        low=st.sampled_from([0.1, 0.0]),
    )
    @settings(max_examples=200)
    def test_is_its_definition(self, values, seed, low):
        """Eigenvalues on both sides of both bounds, in random directions."""
        m = len(values)
        if low == 0:
            values = [abs(value) for value in values]  # there is no bound at the lower end
        frame = torch.linalg.qr(torch.randn(m, m, generator=seeded(seed)).double()).Q
        v = (frame * torch.tensor(values, dtype=torch.float64)) @ frame.mT
        is_inside, is_above = locate(((v + v.mT) / 2)[None], low, 10.0)
        assert is_inside.tolist() == [all(low <= value <= 10 for value in values)]
        assert is_above.tolist() == [max(values) > 10]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_many(self, dtype):
        generator = seeded()
        v = torch.randn(2000, 3, 3, generator=generator, dtype=torch.float64)
        v = (v @ v.mT * torch.rand(2000, 1, 1, generator=generator)).to(dtype)
        values = torch.linalg.eigvalsh(v.double())
        is_inside, is_above = locate(v, 0.02, 4.0)
        expected = (values[:, 0] >= 0.02) & (values[:, -1] <= 4)
        assert torch.equal(is_inside, expected)
        assert torch.equal(is_above, values[:, -1] > 4)
        assert 0.1 < expected.double().mean() < 0.9

    def test_trace_and_inverse_alone_do_not_decide(self):
        """Both bound eigenvalues within a factor of m only."""
        v = torch.stack((9.0 * torch.eye(4), 0.11 * torch.eye(4))).double()
        is_inside, is_above = locate(v, 0.1, 10.0)
        assert is_inside.all() and not is_above.any()

    def test_not_finite(self):
        eye = torch.eye(2, dtype=torch.float64)
        bad = [eye.clone() for _ in range(3)]
        bad[0][0, 1] = math.nan
        bad[1][0, 0] = math.inf
        bad[2][1, 1] = -math.inf
        for low in (0.0, 0.1):
            is_inside, is_above = locate(torch.stack((eye, *bad)), low, math.inf)
            assert is_inside.tolist() == [True, False, False, False]
            assert is_above.tolist() == [False, True, True, True]

    def test_extremes(self):
        """Nothing raises: LAPACK did its own scaling."""
        v = torch.stack([x * torch.ones(2, 2).double() for x in (1e308, 1e-310, 1.0, 0.0)])
        is_inside, is_above = locate(v, 1e-4, 1e4)
        assert not is_inside.any()
        assert is_above.tolist() == [True, False, False, False]
        assert locate(v, 0.0, 1e4)[0].tolist() == [False, True, True, True]

    def test_none(self):
        is_inside, is_above = locate(torch.empty(0, 3, 3), 1e-4, 1e4)
        assert is_inside.shape == is_above.shape == (0,)

    @pytest.mark.parametrize("given_range", [(0, 1), (1e-4, math.inf), [0.5, 2]])
    def test_check_range(self, given_range):
        assert check_range(given_range) == tuple(map(float, given_range))


class TestTimes:
    @pytest.mark.parametrize(
        ("time", "steps", "count"),
        [(0.5, 4, 2), (0.5, 3, 2), (1, 7, 7), (0.3, 10, 3), (0.1 * 3, 10, 3), (1.0, 6.5, 7)],
    )
    def test_number_of_steps(self, time, steps, count):
        """Rounded up; the rounding of time * steps does not add one."""
        sde = CovarianceSDE(attention=False)
        sample = sde.sample(equicorrelated(1, 0.0), time, 2, steps, snapshots=1000)
        assert sample.times.tolist() == [k / count * time for k in range(count + 1)]
        assert sample.times[-1] == time

    def test_time_of_less_than_a_step(self):
        """It was once no step at all, and a division by zero."""
        sample = CovarianceSDE().sample(equicorrelated(2, 0.2), 1e-12, 4, 16)
        assert sample.times.tolist() == [0, 1e-12]
        # sqrt(dt) of noise
        torch.testing.assert_close(sample.final[0], equicorrelated(2, 0.2), rtol=0, atol=1e-4)

    def test_least_number_of_steps_is_enough(self):
        """0.1 * 3 / 3 is above 0.1, and 1 / dt was then below the 10 steps that were given."""
        sample = CovarianceSDE(mlp=False).sample(equicorrelated(5, 0.2), 0.1 * 3, 4, 10)
        assert len(sample.times) == 4

    @pytest.mark.parametrize(
        ("snapshots", "recorded"),
        [(2, [0, 10]), (3, [0, 5, 10]), (4, [0, 3, 7, 10]), (11, range(11)), (99, range(11))],
    )
    def test_snapshots(self, snapshots, recorded):
        table = 1 + torch.arange(11.0, dtype=torch.float64).view(1, 11, 1, 1) / 100
        sample = run_script(table, snapshots=snapshots, time=0.7)
        assert sample.times.tolist() == [k / 10 * 0.7 for k in recorded]
        assert sample.covariances.flatten().tolist() == [float(table[0, k]) for k in recorded]

    def test_first_is_v0(self):
        v0 = generic(3)
        for integrator in INTEGRATORS:
            sample = CovarianceSDE().sample(v0, 0.1, 3, 64, integrator=integrator)
            torch.testing.assert_close(
                sample.covariances[0], v0.expand(3, 3, 3), rtol=0, atol=1e-14
            )

    def test_stop_times_are_recorded_times(self):
        table = torch.ones(7, 8, 1, 1, dtype=torch.float64)
        for path in range(7):
            table[path, path + 1 :] = 20.0
        sample = run_script(table, time=0.3)
        assert sample.stop_times.tolist() == sample.times[1:].tolist()


class TestInterruption:
    table = torch.ones(10, 5, 1, 1, dtype=torch.float64) + torch.arange(10).view(10, 1, 1, 1) / 100

    @staticmethod
    def stop_at(call):
        calls = itertools.count()
        return lambda: next(calls) >= call

    @pytest.mark.parametrize(
        ("call", "kept"),
        [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8), (12, 10), (99, 10)],
    )
    def test_finished_chunks_are_kept(self, call, kept):
        """Chunks of 4, 4 and 2 paths, of 4 steps each."""
        sample = run_script(self.table, chunk=4, stop=self.stop_at(call), snapshots=3)
        assert sample.paths == kept and sample.requested == 10
        assert sample.is_complete == (kept == 10)
        assert torch.equal(sample.final, self.table[:kept, -1])
        assert sample.stop_times.shape == sample.exploded.shape == (kept,)
        assert sample.times.tolist() == [0, 0.5, 1.0]

    def test_is_asked_before_each_step(self):
        asked = []
        run_script(self.table, chunk=4, stop=lambda: asked.append(1))
        assert len(asked) == 12

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    def test_of_a_sample(self, integrator):
        arguments = {"time": 0.25, "paths": 10, "steps": 16, "chunk": 4, "integrator": integrator}
        v0 = equicorrelated(3, 0.2, dtype=torch.float32)
        whole = CovarianceSDE().sample(v0, **arguments, generator=seeded())
        part = CovarianceSDE().sample(v0, **arguments, generator=seeded(), stop=self.stop_at(6))
        assert part.paths == 4 and not part.is_complete
        assert torch.equal(part.covariances, whole.covariances[:, :4])
        none = CovarianceSDE().sample(v0, **arguments, stop=lambda: True)
        assert none.covariances.shape == (5, 0, 3, 3) and none.covariances.dtype == v0.dtype
        assert torch.equal(none.times, whole.times) and none.requested == 10
        assert not none.is_complete

    def test_on_progress(self):
        seen = []
        run_script(self.table, chunk=4, on_progress=lambda *x: seen.append(x))
        done = [4, 8, 12, 16, 20, 24, 28, 32, 34, 36, 38, 40]
        assert seen == [(x, 40) for x in done]


@pytest.mark.parametrize("integrator", INTEGRATORS)
class TestRandomNumbers:
    arguments = {"time": 0.25, "paths": 6, "steps": 32, "snapshots": 2}

    def sample(self, integrator, generator, dtype=torch.float64):
        sde = CovarianceSDE(heads=2, out_proj="gaussian")
        return sde.sample(
            equicorrelated(3, 0.2, dtype=dtype),
            **self.arguments,
            generator=generator,
            integrator=integrator,
        ).final

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_generator(self, integrator, dtype):
        """The same paths, whatever torch's own generator does, which is left alone."""
        first = self.sample(integrator, seeded(3), dtype)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        second = self.sample(integrator, seeded(3), dtype)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first, second) and first.dtype == dtype
        assert not torch.equal(first, self.sample(integrator, seeded(4), dtype))

    def test_paths_run_where_v0_is(self, integrator, device):
        sde = CovarianceSDE(heads=2, out_proj="gaussian")
        v0 = equicorrelated(3, 0.2, device=device)
        source = torch.Generator(device).manual_seed(0)
        sample = sde.sample(v0, **self.arguments, generator=source, integrator=integrator)
        found = (sample.covariances, sample.stop_times, sample.exploded)
        assert all(x.device == device for x in found)
        assert sample.covariances.isfinite().all()

    def test_default_is_that_of_torch(self, integrator):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(self.sample(integrator, None))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def test_paths_differ(self, integrator):
        final = self.sample(integrator, seeded())
        for first, second in itertools.combinations(final, 2):
            assert (first - second).abs().max() > 1e-3

    def test_no_gradient(self, integrator):
        """A V0 with a gradient once kept the graph of every step."""
        v0 = equicorrelated(2, 0.2).requires_grad_()
        sample = CovarianceSDE().sample(v0, **self.arguments, integrator=integrator)
        assert not sample.covariances.requires_grad and not sample.times.requires_grad


class TestSample:
    def test_attributes(self):
        sample = CovarianceSDE().sample(equicorrelated(3, 0.2), 0.5, 5, 16)
        assert (sample.source, sample.paths, sample.tokens, sample.requested) == ("sde", 5, 3, 5)
        assert sample.times.dtype == sample.stop_times.dtype == torch.float64
        assert sample.is_complete

    def test_defaults(self):
        """Up to depth = width, by the chain, frozen as in the paper; 33 snapshots."""
        sde = CovarianceSDE(mlp=False)
        v0 = equicorrelated(2, 0.2)
        default = sde.sample(v0, paths=3, generator=seeded())
        explicit = sde.sample(
            v0,
            1.0,
            3,
            256,
            seeded(),
            integrator="chain",
            snapshots=33,
            eigenvalue_range=(1e-4, 1e4),
            chunk=2**12,
        )
        assert torch.equal(default.covariances, explicit.covariances)
        assert len(default.times) == 33 and default.times[-1] == 1

    def test_no_branch(self):
        """branch_gain 0: V stays."""
        for integrator in INTEGRATORS:
            sample = CovarianceSDE(branch_gain=0.0).sample(
                generic(3), 0.25, 4, 16, integrator=integrator
            )
            torch.testing.assert_close(sample.final, generic(3).expand(4, 3, 3), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("integrator", INTEGRATORS)
    def test_equal_tokens_stay_equal(self, integrator):
        """A singular V0, admitted by a lower bound of 0."""
        v0 = generic(2)[[0, 0, 1]][:, [0, 0, 1]]
        sample = CovarianceSDE(branch_gain=0.6).sample(
            v0, 0.5, 16, 32, seeded(), integrator=integrator, eigenvalue_range=(0, 1e4)
        )
        v = sample.final
        assert not sample.stopped.any()
        # The root of rounding, or of the floor of the projection (41), in x_1 - x_2.
        bound = 1e-6 if integrator == "chain" else 1e-4
        torch.testing.assert_close(v[:, 0], v[:, 1], rtol=0, atol=bound)
        assert (v[:, 0, 0] - v0[0, 0]).abs().min() > 1e-3


class TestEquicorrelated:
    @pytest.mark.parametrize("tokens", [1, 2, 5])
    def test_entries(self, tokens):
        v = equicorrelated(tokens, 0.25, 3.0)
        assert v.dtype == torch.float64 and v.shape == (tokens, tokens)
        for i, j in itertools.product(range(tokens), repeat=2):
            assert v[i, j] == (3.0 if i == j else 0.75)

    def test_dtype(self):
        assert equicorrelated(2, 0.5, dtype=torch.float32).dtype == torch.float32

    def test_least_correlation(self):
        values = torch.linalg.eigvalsh(equicorrelated(4, -1 / 3))
        assert abs(values[0]) < 1e-15

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, -0.51), "correlation must be from -0.5 to 1 for 3 tokens, got -0.51. No"),
            ((3, 1.01), "correlation must be from -0.5 to 1 for 3 tokens, got 1.01. No"),
            ((3, math.nan), "correlation must be finite, got nan"),
            ((0, 0.5), "tokens must be at least 1, got 0"),
            ((2, 0.5, 0.0), "variance must be greater than 0, got 0.0"),
        ],
    )
    def test_error(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            equicorrelated(*arguments)


EYE = torch.eye(3, dtype=torch.float64)


def changed(i, j, value):
    v = EYE.clone()
    v[i, j] = value
    return v


# V, the exception, and parts of its message in their order: argument ... rule ... value ... remedy
BAD_V = {
    "list": ([[1.0]], TypeError, "must be a torch.Tensor ... got list ... Pass"),
    "half": (EYE.half(), TypeError, "float64 or float32 ... got torch.float16 ... .double()"),
    "int": (EYE.long(), TypeError, "float64 or float32 ... got torch.int64 ... .double()"),
    "vector": (EYE[0], ValueError, "(..., m, m) ... got shape (3,) ... square"),
    "rectangle": (EYE[:2], ValueError, "(..., m, m) ... got shape (2, 3) ... square"),
    "empty": (EYE[:0, :0], ValueError, "at least one token ... got shape (0, 0) ... square"),
    "nan": (changed(0, 0, math.nan), ValueError, "must be finite ... got NaN ... Correct"),
    "inf": (changed(1, 1, math.inf), ValueError, "must be finite ... infinity ... Correct"),
    "skew": (
        changed(0, 1, 0.25),
        ValueError,
        "must be symmetric ... differ from their mirror image by up to 0.25 ... .mT) / 2",
    ),
    "negative": (
        changed(1, 1, -0.5),
        ValueError,
        "positive semidefinite ... got an eigenvalue of -0.5 ... X X^T / n",
    ),
    "indefinite": (
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        ValueError,
        "positive semidefinite ... got an eigenvalue of -1 ... X X^T / n",
    ),
    "all_negative": (-EYE, ValueError, "positive semidefinite ... eigenvalue of -1 ... X X^T / n"),
}


def check_message(message, parts):
    pattern = ".*".join(re.escape(part) for part in parts.split(" ... "))
    assert re.match(pattern, message), message
    # One wording: argument rule, got value. Remedy.
    assert re.fullmatch(r".+, got .+\. \S.+\.", message), message


class TestErrors:
    @pytest.mark.parametrize("name", BAD_V)
    def test_v(self, name):
        v, error, parts = BAD_V[name]
        sde = CovarianceSDE()
        for argument, f in (("v", sde.drift), ("v", sde.diffusion), ("v0", sde.sample)):
            with pytest.raises(error) as caught:
                f(v)
            check_message(str(caught.value), f"{argument} ... {parts}")

    def test_rounding_is_no_error(self):
        v = generic(4).float() @ generic(4).float()
        v[0, 1] *= 1 + 2**-22
        CovarianceSDE().drift(v)
        singular = torch.randn(5, 2, dtype=torch.float64)
        CovarianceSDE().drift(singular @ singular.mT)

    @pytest.mark.parametrize("name", ["skew", "negative"])
    def test_each_matrix_of_a_batch(self, name):
        """Asymmetry was once measured against the largest matrix of all."""
        batch = torch.stack((1e20 * EYE, BAD_V[name][0]))
        with pytest.raises(ValueError, match="v must be"):
            CovarianceSDE().drift(batch)

    START = {
        "batch": (
            {"v0": EYE.expand(2, 3, 3)},
            ValueError,
            "v0 ... one (m, m) matrix ... got shape (2, 3, 3) ... once for each",
        ),
        "singular": (
            {"v0": torch.ones(2, 2).double()},
            ValueError,
            "v0 ... eigenvalues from 0.0001 to 10000 ... got eigenvalues from ... (0, 1e4)",
        ),
        "large": (
            {"v0": EYE, "eigenvalue_range": (0, 0.5)},
            ValueError,
            "v0 ... eigenvalues from 0 to 0.5 ... got eigenvalues from 1 to 1 ... Scale it",
        ),
        "range_order": (
            {"eigenvalue_range": (2.0, 1.0)},
            ValueError,
            "eigenvalue_range ... ascend and not be negative ... got (2.0, 1.0) ... (1e-4, 1e4)",
        ),
        "range_negative": (
            {"eigenvalue_range": (-1.0, 1.0)},
            ValueError,
            "eigenvalue_range ... ascend and not be negative ... got (-1.0, 1.0) ... (1e-4, 1e4)",
        ),
        "range_number": (
            {"eigenvalue_range": 1e4},
            TypeError,
            "eigenvalue_range ... a pair of numbers ... got 10000.0 ... (1e-4, 1e4)",
        ),
        "range_three": (
            {"eigenvalue_range": (0, 1, 2)},
            TypeError,
            "eigenvalue_range ... a pair of numbers ... got (0, 1, 2) ... (1e-4, 1e4)",
        ),
        "range_nan": (
            {"eigenvalue_range": (0, math.nan)},
            ValueError,
            "eigenvalue_range[1] ... must be finite ... got nan ... finite",
        ),
        "range_none": (
            {"eigenvalue_range": (None, 1.0)},
            TypeError,
            "eigenvalue_range[0] ... must be a number ... got None ... Pass",
        ),
        "time_zero": ({"time": 0}, ValueError, "time ... greater than 0 ... got 0 ... positive"),
        "time_negative": (
            {"time": -1.0},
            ValueError,
            "time ... greater than 0 ... got -1.0 ... positive",
        ),
        "time_inf": (
            {"time": math.inf},
            ValueError,
            "time ... must be finite ... got inf ... finite",
        ),
        "time_str": ({"time": "1"}, TypeError, "time ... must be a number ... got '1' ... Pass"),
        "paths": ({"paths": 0}, ValueError, "paths ... at least 1 ... got 0 ... range"),
        "paths_float": ({"paths": 1e3}, TypeError, "paths ... an int ... got 1000.0 ... whole"),
        "steps": ({"steps": 0}, ValueError, "steps ... greater than 0 ... got 0 ... positive"),
        "steps_nan": (
            {"steps": math.nan},
            ValueError,
            "steps ... must be finite ... got nan ... finite",
        ),
        "snapshots": (
            {"snapshots": 1},
            ValueError,
            "snapshots ... at least 2 ... got 1 ... range",
        ),
        "chunk": ({"chunk": 0}, ValueError, "chunk ... at least 1 ... got 0 ... range"),
        "integrator": (
            {"integrator": "milstein"},
            ValueError,
            "integrator ... one of ('chain', 'euler_maruyama') ... got 'milstein' ... default",
        ),
        "generator": (
            {"generator": 0},
            TypeError,
            "generator ... a torch.Generator or None ... got int ... manual_seed(seed)",
        ),
    }

    @pytest.mark.parametrize("name", START)
    def test_sample(self, name):
        changes, error, parts = self.START[name]
        arguments = {"v0": EYE, "paths": 2, "steps": 8, **changes}
        with pytest.raises(error) as caught:
            CovarianceSDE().sample(**arguments)
        check_message(str(caught.value), parts)

    def test_generator_on_another_device(self):
        class OnGPU:
            device = torch.device("cuda")

        from shaped_attn.sde.process import check_generator

        with pytest.raises(ValueError) as caught:
            check_generator(seeded(), OnGPU)
        check_message(
            str(caught.value), "generator ... on the device of v0, cuda ... got cpu ... v0.device"
        )

    @pytest.mark.parametrize(
        ("arguments", "tokens", "least"),
        [
            ({"mlp": False}, 3, 6),
            ({"c_plus": 0.0, "c_minus": 6.0}, 2, 9),
            # kappa = 0.9639 + 6.2127
            ({"branch_gain": 0.9, "mlp_ratio": 0.125}, 3, 22),
            # c_n = 1 / (1 + 6 / 2 + 36 / 8)
            ({"c_plus": 0.0, "c_minus": 6.0, "width": 4}, 1, 2),
            # c_n = 1 / (1 - 1 + 1) for slopes 1 and -1
            ({"c_plus": 0.0, "c_minus": -4.0, "width": 4}, 1, 4),
        ],
    )
    def test_steps_of_the_chain(self, arguments, tokens, least):
        """Bartlett's factors exist and the kernel of the MLP is positive semidefinite."""
        sde = CovarianceSDE(**arguments)
        v0 = equicorrelated(tokens, 0.2)
        for steps in (least, least + 1):
            sample = sde.sample(v0, 1.0, 50, steps, seeded(), eigenvalue_range=(0, math.inf))
            assert not sample.stopped.any()
        with pytest.raises(ValueError) as caught:
            sde.sample(v0, 1.0, 2, least - 1)
        check_message(
            str(caught.value),
            f"steps ... at least {least} per unit of time for the chain of {tokens} tokens ... "
            f"got {least - 1} ... more",
        )
        sde.sample(v0, 1.0, 2, least - 1, integrator="euler_maruyama")

    def test_detuned_variance_of_the_chain(self):
        """There is no skip gain of a negative square; it was once taken as 0."""
        sde = CovarianceSDE(branch_gain=0.6, detuning=Detuning(variance=-20.0))
        sde.sample(EYE, 0.5, 2, 32)
        for steps, bound in ((31, -19.84), (8, -5.12)):
            with pytest.raises(ValueError) as caught:
                sde.sample(EYE, 1.0, 2, steps)
            check_message(
                str(caught.value),
                f"detuning.variance ... at least -skip_gain^2 * steps = {bound} for the chain ... "
                "got -20 ... more steps",
            )
        sde.sample(EYE, 1.0, 2, 8, integrator="euler_maruyama", eigenvalue_range=(0, 1e4))

    @pytest.mark.parametrize("name", ["attn_mask", "prior"])
    def test_mask_of_another_size(self, name):
        matrix = torch.ones(4, 4)
        sde = CovarianceSDE(**{name: matrix.bool() if name == "attn_mask" else matrix})
        for f in (sde.drift, sde.diffusion, sde.sample):
            with pytest.raises(ValueError) as caught:
                f(EYE)
            check_message(
                str(caught.value),
                f"{name} ... a row for each of the 3 tokens of V ... got shape (4, 4) ... same",
            )

    def test_dead_activation(self):
        """At a width whose slopes are both zero the correction of the MLP does not exist."""
        sde = CovarianceSDE(c_plus=-2.0, c_minus=-2.0, width=4)
        with pytest.raises(ValueError, match=r"c_plus and c_minus must not both be -sqrt\(width\)"):
            sde.drift(EYE)
