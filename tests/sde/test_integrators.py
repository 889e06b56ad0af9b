"""The integrators: their noise and steps against drift and diffusion, and the law of many steps.

Equation numbers are those of covariance-sde.md. Statistical tests have fixed seeds; their bounds
are those of normal z-scores, corrected for the number of entries that are looked at.
"""

import math

import numpy as np
import pytest
import torch
from covariances import (
    check_message,
    covariance_z,
    generic,
    ks_bound,
    mean_z,
    seeded,
    z_bound,
)
from scipy import special

from shaped_attn.sde import CovarianceSDE, Detuning, chain, compare, equicorrelated, integrators
from shaped_attn.sde.chain import root_of
from shaped_attn.sde.integrators import INTEGRATORS, EulerMaruyamaSimulation
from shaped_attn.sde.paths import locate

# So small a step that its bias, of relative order of the step, is far below any standard error.
TINY = 2.0**-20

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

# What a test of the diffusion, and one of the drift, must not take for the case itself.
UNIFORM = {"prior": PRIOR / PRIOR.sum(-1, keepdim=True)}
OTHER_DIFFUSION = {
    "full": {"tau0": 0.33},
    "causal": {"is_causal": False},
    "padding": {"key_start": None},
    "gain": {"softmax_gain": 1.4},
    "heads": {"heads": 3},
    "head_gains": {"softmax_gain": (1.25, 1.25)},  # the mean of beta, not of beta^2
    "gaussian": {"out_proj": "orthogonal"},
    "orthogonal": {"out_proj": "gaussian"},
    "prior": UNIFORM,
    "identity": {"identity_gain": 0.7},
    "mlp_4": {"mlp_ratio": 1.0},
    "block_all": {"mlp_ratio": 1.0},
}
OTHER_DRIFT = {
    "gain": {"softmax_gain": -1.5},  # the s terms alone are odd in beta
    "causal": {"is_causal": False},
    "padding": {"key_start": None},
    "prior": UNIFORM,
    "head_gains": {"softmax_gain": (-0.75, -0.75)},  # the mean of beta, not of beta^2
    "identity": {"identity_gain": 0.8},
    "mlp": {"c_minus": -2.5},
}


def simulation_of(name, sde, v, step=TINY, seed=0):
    limit = sde.coefficients(len(v), v)
    return INTEGRATORS[name].simulation(limit, v, step, seeded(seed))


def one_step(name, sde, v, paths, step=TINY):
    """V' - V of one step."""
    simulation = simulation_of(name, sde, v, step)
    state = simulation.start(paths)
    return simulation.covariance(simulation.step(state, 0)) - simulation.covariance(state)


@pytest.mark.parametrize("name", INTEGRATORS)
@pytest.mark.parametrize("case", CASES)
def test_diffusion(case, name):
    """(13) and (14): that of the case, and not that of other settings."""
    v = generic(3)
    moves = one_step(name, CovarianceSDE(**CASES[case]), v, 100_000) / math.sqrt(TINY)
    assert covariance_z(moves, CovarianceSDE(**CASES[case]).diffusion(v)) < z_bound(21)
    if case in OTHER_DIFFUSION:
        other = CovarianceSDE(**{**CASES[case], **OTHER_DIFFUSION[case]}).diffusion(v)
        assert covariance_z(moves, other) > 2 * z_bound(21)


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
    monkeypatch.setattr(integrators, "normal", normal)
    monkeypatch.setattr(torch, "_standard_gamma", gamma)


def one_step_drift(name, sde, v, monkeypatch, pairs=20_000):
    """The mean of (V' - V) / dt over each pair of mirrored paths."""
    mirror_draws(monkeypatch)
    moves = one_step(name, sde, v, 2 * pairs) / TINY
    return (moves[:pairs] + moves[pairs:]) / 2


@pytest.mark.parametrize("case", CASES)
def test_drift_of_the_chain(case, monkeypatch):
    v = generic(3)
    sde = CovarianceSDE(**CASES[case])
    moves = one_step_drift("chain", sde, v, monkeypatch)
    z, error = mean_z(moves, sde.drift(v))
    assert z < z_bound(6)
    assert error < 0.05 * sde.drift(v).abs().max()  # or the test would see little
    if case in OTHER_DRIFT:
        other = CovarianceSDE(**{**CASES[case], **OTHER_DRIFT[case]})
        assert mean_z(moves, other.drift(v))[0] > 2 * z_bound(6)


@pytest.mark.parametrize("case", CASES)
def test_drift_of_euler_maruyama(case, monkeypatch):
    """Its noise is odd in the draws, so that a pair has the drift alone."""
    v = generic(3)
    sde = CovarianceSDE(**CASES[case])
    for moves in one_step_drift("euler_maruyama", sde, v, monkeypatch, pairs=2):
        rounding = 64 * 2**-52 * float(v.max()) / TINY
        torch.testing.assert_close(moves, sde.drift(v), rtol=0, atol=rounding)


class TestEulerMaruyama:
    def test_noise_of_many_v(self):
        """Each path has the noise of its own V."""
        sde = CovarianceSDE(**CASES["causal"])
        two = torch.stack((generic(3), 0.5 * generic(3, seed=1)))
        many = two.repeat(50_000, 1, 1)
        noise = simulation_of("euler_maruyama", sde, two[0]).noise(many, root_of(many))
        for k in range(2):
            assert covariance_z(noise[k::2], sde.diffusion(two[k])) < z_bound(21)

    def test_projection(self):
        """What is not positive definite gets eigenvalues of 1e-12 of the largest."""
        generator = seeded()
        frame = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        values = torch.tensor([-0.5, -1e-9, 0.3, 2.0], dtype=torch.float64)
        bad = (frame * values) @ frame.mT
        good = torch.eye(4, dtype=torch.float64) * 1e-20
        broken = torch.full((4, 4), math.nan, dtype=torch.float64)
        found = EulerMaruyamaSimulation._projected(torch.stack((bad, good, broken)))
        expected = values.clamp(min=2e-12)
        torch.testing.assert_close(torch.linalg.eigvalsh(found[0]), expected, rtol=0, atol=1e-14)
        assert torch.equal(found[1], good) and found[2].isnan().all()

    @pytest.mark.parametrize("m", [1, 2])
    def test_projection_of_what_has_no_positive_part(self, m):
        """It was once left negative, and a variance below 0 was recorded."""
        found = EulerMaruyamaSimulation._projected(-torch.eye(m, dtype=torch.float64)[None])
        assert torch.equal(found[0], torch.zeros(m, m, dtype=torch.float64))


class TestChain:
    """(66) against the formulas of section 3."""

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
        moves = one_step_drift("chain", sde, v, monkeypatch)
        assert mean_z(moves, sde.drift(v))[0] < z_bound(6)
        reverse = 2 * plain.drift(v) - sde.drift(v)
        assert mean_z(moves, reverse)[0] > 2 * z_bound(6)

    @pytest.mark.parametrize("width", [8, 64])
    @pytest.mark.parametrize("target", [None, 16])
    def test_mlp_kernel_at_any_width(self, width, target):
        """(27) is exact: so is the mean of a layer."""
        v = generic(4)
        sde = CovarianceSDE(**MLP, width=target)
        simulation = simulation_of("chain", sde, v, 1 / width)
        expected = v + sde.drift(v) / width
        for one in simulation.mean(simulation.start(2)):
            torch.testing.assert_close(one, expected, rtol=0, atol=64 * 2**-52 * float(v.max()))

    @pytest.mark.parametrize("ratio", [1.0, 4.0])
    def test_mlp_mean_at_a_small_width(self, ratio):
        """E[V'] = V + dt mu at every n', not in the limit alone."""
        v = generic(3)
        sde = CovarianceSDE(**MLP, mlp_ratio=ratio)
        moves = one_step("chain", sde, v, 200_000, step=1 / 6)
        assert mean_z(moves, sde.drift(v) / 6)[0] < z_bound(6)

    def test_states_are_factors(self):
        simulation = simulation_of("chain", CovarianceSDE(**BLOCK), generic(3), 0.1)
        state = simulation.step(simulation.start(5), 0)
        assert state.shape == (5, 3, 3) and not state.triu(1).any()
        assert torch.equal(simulation.covariance(state), state @ state.mT)


@pytest.mark.parametrize("name", INTEGRATORS)
@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "zero", "singular"])
def test_rows_are_independent(name, kind):
    """What happens to one path does not reach another."""
    v = torch.stack([generic(3, seed) for seed in range(4)])
    simulation = simulation_of(name, CovarianceSDE(branch_gain=0.7, tau0=0.5), v[0], 1 / 16)
    state = torch.linalg.cholesky(v) if name == "chain" else v
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


class TestLaw:
    """Many steps."""

    @staticmethod
    def worst(first, second):
        """The largest KS of all statistics at the last time, in units of its critical value."""
        return compare(first, second, level=1e-5).largest.ratio

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

    @pytest.mark.parametrize("name", INTEGRATORS)
    @pytest.mark.parametrize("case", KAPPA)
    def test_lone_token(self, case, name):
        """(25): log V_11 ~ N(log V_11(0) - kappa t, 2 kappa t) at t = 0.5, whatever tau0.

        A step multiplies V_11 by 1 + e with E[e] = 0 and E[e^2] = 2 kappa dt, and with
        E[e^3] = O(dt^2), so the mean of log V_11 over t is off by O(kappa^2 dt t): here by about
        0.001 for standard errors of 0.01.
        """
        arguments, kappa = self.KAPPA[case]
        # Sharp attention would blow up the other token, sooner in Euler-Maruyama.
        tau0 = 0.7 if name == "chain" else 4.0
        sde = CovarianceSDE(branch_gain=0.5, tau0=tau0, **arguments)
        assert math.isclose(sde.kappa, kappa, rel_tol=1e-14)
        v0 = equicorrelated(2, 0.2) * torch.tensor([[1.0, 0.5], [0.5, 0.25]])
        sample = sde.sample(
            v0,
            0.5,
            4000,
            256,
            seeded(),
            integrator=name,
            snapshots=2,
            eigenvalue_range=(0, math.inf),
        )
        assert not sample.stopped.any()
        for i in range(1 if sde.attention else 2):
            self.check_normal(sample.final[:, i, i].log(), math.log(v0[i, i]) - kappa / 2, kappa)

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


class TestSteps:
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

    def test_least_number_of_steps_is_enough(self):
        """0.1 * 3 / 3 is above 0.1, and 1 / dt was then below the 10 steps that were given."""
        sample = CovarianceSDE(mlp=False).sample(equicorrelated(5, 0.2), 0.1 * 3, 4, 10)
        assert len(sample.times) == 4

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
            f"steps ... at least {least} per unit of depth / width for the chain of {tokens} "
            f"tokens ... got {least - 1} ... more",
        )
        sde.sample(v0, 1.0, 2, least - 1, integrator="euler_maruyama")

    def test_detuned_variance_of_the_chain(self):
        """There is no skip gain of a negative square; it was once taken as 0."""
        eye = torch.eye(3, dtype=torch.float64)
        sde = CovarianceSDE(branch_gain=0.6, detuning=Detuning(variance=-20.0))
        sde.sample(eye, 0.5, 2, 32)
        for steps, bound in ((31, -19.84), (8, -5.12)):
            with pytest.raises(ValueError) as caught:
                sde.sample(eye, 1.0, 2, steps)
            check_message(
                str(caught.value),
                f"detuning.variance ... at least -skip_gain^2 * steps = {bound} for the chain ... "
                "got -20 ... more steps",
            )
        sde.sample(eye, 1.0, 2, 8, integrator="euler_maruyama", eigenvalue_range=(0, 1e4))

    @pytest.mark.parametrize(
        ("arguments", "tokens", "time", "chain", "euler_maruyama"),
        [
            ({}, 3, 1.0, (256, 64), (256, 256)),
            ({}, 3, 0.1, (640, 160), (640, 640)),  # 64 and 16 in total
            ({"width": 96}, 3, 1.0, (96, 64), (256, 256)),  # a step for each layer
            ({"width": 96}, 60, 1.0, (120, 120), (256, 256)),  # no fewer than 2 m
            ({}, 140, 1.0, (280, 280), (280, 280)),
        ],
    )
    def test_of_a_prediction_and_of_its_medians(
        self, arguments, tokens, time, chain, euler_maruyama
    ):
        limit = CovarianceSDE(mlp=False, **arguments).coefficients(tokens)
        for name, expected in (("chain", chain), ("euler_maruyama", euler_maruyama)):
            integrator = INTEGRATORS[name]
            steps = integrator.default_steps(limit, time)
            assert (steps, integrator.median_steps(limit, time, steps)) == expected
            assert f"{steps} steps per unit" in integrator.description(steps)
