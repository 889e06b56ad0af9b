"""Sampling from the SDE: frozen paths, times, random numbers, defaults, errors."""

import itertools
import math

import pytest
import torch
from covariances import check_message, generic, seeded, stop_at

from shaped_attn.sde import Chain, CovarianceSDE, EulerMaruyama, Integrator, equicorrelated
from shaped_attn.sde.integrators import INTEGRATORS


class TestFreezing:
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

    def test_token_that_is_zero(self):
        """Its correlation is 0 / 0, which once ended every path of a block as exploded."""
        v0 = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
        for integrator in INTEGRATORS:
            sample = CovarianceSDE(branch_gain=0.7, tau0=2.0).sample(
                v0, 0.25, 8, 32, integrator=integrator, eigenvalue_range=(0, 1e4)
            )
            assert not sample.stopped.any() and sample.covariances.isfinite().all()
            # The projection (41) gives it a size of 1e-6.
            assert sample.final[:, 1].abs().max() < (1e-14 if integrator == "chain" else 1e-4)
            assert (sample.final[:, 0, 0] != 1).all() and (sample.final[:, 0, 2] != 0).all()


class TestTimes:
    def test_time_of_less_than_a_step(self):
        """It was once no step at all, and a division by zero."""
        sample = CovarianceSDE().sample(equicorrelated(2, 0.2), 1e-12, 4, 16)
        assert sample.times.tolist() == [0, 1e-12]
        # sqrt(dt) of noise
        torch.testing.assert_close(sample.final[0], equicorrelated(2, 0.2), rtol=0, atol=1e-4)

    def test_first_is_v0(self):
        v0 = generic(3)
        for integrator in INTEGRATORS:
            sample = CovarianceSDE().sample(v0, 0.1, 3, 64, integrator=integrator)
            first = sample.covariances[0]
            torch.testing.assert_close(first, v0.expand(3, 3, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_interruption(integrator):
    arguments = {"time": 0.25, "paths": 10, "steps": 16, "chunk": 4, "integrator": integrator}
    v0 = equicorrelated(3, 0.2, dtype=torch.float32)
    whole = CovarianceSDE().sample(v0, **arguments, generator=seeded())
    part = CovarianceSDE().sample(v0, **arguments, generator=seeded(), stop=stop_at(6))
    assert part.paths == 4 and not part.is_complete
    assert torch.equal(part.covariances, whole.covariances[:, :4])
    none = CovarianceSDE().sample(v0, **arguments, stop=stop_at(0))
    assert none.covariances.shape == (5, 0, 3, 3) and none.covariances.dtype == v0.dtype
    assert torch.equal(none.times, whole.times) and none.requested == 10
    assert not none.is_complete


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
            integrator=Chain(),
            snapshots=33,
            eigenvalue_range=(1e-4, 1e4),
            chunk=2**12,
        )
        assert torch.equal(default.covariances, explicit.covariances)
        assert len(default.times) == 33 and default.times[-1] == 1
        assert (default.source, default.paths, default.requested) == ("sde", 3, 3)
        assert default.times.dtype == default.stop_times.dtype == torch.float64

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


def test_an_integrator_of_ones_own():
    class Doubling(Integrator):
        title = "doubling"

        def least_steps(self, limit):
            return 3

        def simulation(self, limit, v0, step, generator):
            simulation = EulerMaruyama().simulation(limit, v0, step, generator)
            simulation.step = lambda state, index: 2 * state
            return simulation

    v0 = equicorrelated(2, 0.2)
    sample = CovarianceSDE().sample(v0, 1.0, 2, 3, integrator=Doubling())
    assert torch.equal(sample.final, (8 * v0).expand(2, 2, 2))
    with pytest.raises(ValueError, match="at least 3 .* for the doubling of 2 tokens"):
        CovarianceSDE().sample(v0, 1.0, 2, 2, integrator=Doubling())


EYE = torch.eye(3, dtype=torch.float64)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            (
                {"v0": EYE.expand(2, 3, 3)},
                "v0 ... one (m, m) matrix ... got shape (2, 3, 3) ... one after",
            ),
            (
                {"v0": torch.ones(2, 2).double()},
                "v0 ... eigenvalues from 0.0001 to 10000 ... got eigenvalues from ... (0, 1e4)",
            ),
            (
                {"eigenvalue_range": (0, 0.5)},
                "v0 ... eigenvalues from 0 to 0.5 ... got eigenvalues from 1 to 1 ... Scale it",
            ),
            (
                {"eigenvalue_range": (2.0, 1.0)},
                "eigenvalue_range ... ascend ... got (2.0, 1.0) ... (1e-4, 1e4)",
            ),
            (
                {"eigenvalue_range": (-1.0, 1.0)},
                "eigenvalue_range ... not be negative ... got (-1.0, 1.0) ... (1e-4, 1e4)",
            ),
            (
                {"eigenvalue_range": 1e4},
                "eigenvalue_range ... a pair of numbers ... got 10000.0 ... (1e-4, 1e4)",
            ),
            ({"eigenvalue_range": (0, 1, 2)}, "eigenvalue_range ... a pair of numbers ... got"),
            ({"eigenvalue_range": (0, math.nan)}, "eigenvalue_range[1] ... must be finite"),
            ({"eigenvalue_range": (None, 1.0)}, "eigenvalue_range[0] ... must be a number"),
            ({"time": 0}, "time ... greater than 0"),
            ({"time": math.inf}, "time ... must be finite"),
            ({"paths": 0}, "paths ... at least 1"),
            ({"steps": 0}, "steps ... greater than 0"),
            ({"snapshots": 1}, "snapshots ... at least 2"),
            ({"chunk": 0}, "chunk ... at least 1"),
            (
                {"integrator": "milstein"},
                "integrator ... one of 'chain', 'euler_maruyama' ... got 'milstein'",
            ),
            (
                {"generator": 0},
                "generator ... a torch.Generator or None ... got int ... manual_seed(seed)",
            ),
        ],
    )
    def test_sample(self, changes, parts):
        with pytest.raises((TypeError, ValueError)) as caught:
            CovarianceSDE().sample(**{"v0": EYE, "paths": 2, "steps": 8, **changes})
        check_message(str(caught.value), parts)

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
