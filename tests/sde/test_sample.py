"""What a simulation returns: names, quantiles and their errors, fractions, joining and picking."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shaped_attn.sde.sample import (
    CovarianceSample,
    Estimate,
    fraction,
    mean_correlation,
    quantile,
    quantile_error,
)

NORMAL = statistics.NormalDist()


def sample_of(covariances, stop_times=None, exploded=None, requested=None, source="sde"):
    times = torch.linspace(0, 1, len(covariances), dtype=torch.float64)
    paths = covariances.shape[1]
    if stop_times is None:
        stop_times = torch.full((paths,), math.inf, dtype=torch.float64)
    if exploded is None:
        exploded = torch.zeros(paths, dtype=torch.bool)
    requested = paths if requested is None else requested
    return CovarianceSample(source, times, covariances, stop_times, exploded, requested)


def random_sample(times=3, paths=50, tokens=3, dtype=torch.float64):
    x = torch.randn(times, paths, tokens, tokens + 2, dtype=dtype)
    return sample_of(x @ x.mT)


class TestStatistics:
    def test_are_their_definitions(self):
        sample = random_sample()
        found = sample.statistics()
        assert list(found) == ["rho_12", "rho_13", "rho_23", "V_11", "V_22", "V_33"]
        v = sample.covariances
        for k, path in ((0, 0), (2, 49), (1, 7)):
            one = v[k, path].tolist()
            for i in range(3):
                assert found[f"V_{i + 1}{i + 1}"][k, path] == one[i][i]
                for j in range(i + 1, 3):
                    rho = one[i][j] / math.sqrt(one[i][i] * one[j][j])
                    assert math.isclose(found[f"rho_{i + 1}{j + 1}"][k, path], rho, rel_tol=1e-14)
        assert list(sample.correlations()) == ["rho_12", "rho_13", "rho_23"]
        assert list(sample.variances()) == ["V_11", "V_22", "V_33"]

    def test_one_token(self):
        assert list(random_sample(tokens=1).statistics()) == ["V_11"]

    def test_names_from_ten_tokens_on(self):
        """rho_111 could be that of tokens 1 and 11, or 11 and 1."""
        names = list(random_sample(tokens=11, paths=2).statistics())
        assert len(set(names)) == len(names) == 66
        assert names[0] == "rho_1_2" and names[9] == "rho_1_11" and names[-1] == "V_11_11"
        assert "rho_12" in random_sample(tokens=9, paths=2).statistics()

    def test_size_does_not_matter_to_a_correlation(self):
        """float32 too: V_ii V_jj would overflow or vanish."""
        for scale in (1e-25, 1e25):
            v = scale * torch.tensor([[[[1.0, 0.5], [0.5, 1.0]]]])
            assert math.isclose(sample_of(v).correlations()["rho_12"][0, 0], 0.5, rel_tol=1e-6)

    def test_mean_correlation(self):
        sample = random_sample(times=2, paths=7, tokens=4)
        expected = torch.stack(list(sample.correlations().values())).mean(0)
        found = mean_correlation(sample.covariances)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        one = mean_correlation(sample.covariances[1, 5])
        torch.testing.assert_close(one, expected[1, 5], rtol=1e-12, atol=1e-12)


class TestShape:
    def test_sizes(self):
        sample = random_sample(times=4, paths=7, tokens=2)
        assert (sample.paths, sample.tokens) == (7, 2)
        assert torch.equal(sample.final, sample.covariances[3])

    def test_is_complete(self):
        sample = random_sample(paths=5)
        assert sample.is_complete
        assert not sample_of(sample.covariances, requested=6).is_complete

    def test_stopped_is_exploded_or_collapsed(self):
        stop_times = torch.tensor([math.inf, 0.25, 1.0, math.inf], dtype=torch.float64)
        exploded = torch.tensor([False, True, False, False])
        sample = sample_of(random_sample(paths=4).covariances, stop_times, exploded)
        assert sample.stopped.tolist() == [False, True, True, False]
        assert sample.exploded.tolist() == [False, True, False, False]
        assert sample.collapsed.tolist() == [False, False, True, False]
        assert sample.stopped_fraction().value == 0.5
        assert sample.exploded_fraction().value == 0.25

    @pytest.mark.parametrize("index", [0, 2, -1, -3])
    def test_at(self, index):
        whole = random_sample()
        sample = whole.at(index)
        assert sample.times.tolist() == [whole.times[index]]
        assert torch.equal(sample.covariances, whole.covariances[index][None])
        assert sample.paths == whole.paths and torch.equal(sample.stop_times, whole.stop_times)

    @pytest.mark.parametrize("index", [3, -4])
    def test_at_a_time_that_is_not_there(self, index):
        with pytest.raises(IndexError):
            random_sample().at(index)

    def test_of_paths(self):
        whole = random_sample()
        part = whole.of_paths(1, 3)
        assert (part.source, part.paths, part.requested) == (whole.source, 2, whole.requested)
        assert not part.is_complete
        assert torch.equal(part.times, whole.times)
        assert torch.equal(part.covariances, whole.covariances[:, 1:3])
        assert torch.equal(part.stop_times, whole.stop_times[1:3])
        assert torch.equal(part.exploded, whole.exploded[1:3])
        part.covariances[:] = 7
        assert (whole.covariances[:, 1:3] == 7).all()


class TestQuantiles:
    @given(
        values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
        levels=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    )
    def test_is_that_of_torch(self, values, levels):
        values = torch.tensor(values, dtype=torch.float64)
        expected = torch.quantile(values, torch.tensor(levels, dtype=torch.float64))
        # torch multiplies level and count in another order: a rounding of the rank.
        allowed = 4 * len(values) * 2**-52 * 2e6
        torch.testing.assert_close(quantile(values, levels), expected, rtol=0, atol=allowed)

    def test_known(self):
        values = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0])
        assert quantile(values, (0.0, 0.25, 0.5, 0.6, 1.0)).tolist() == [0, 1, 2, 2.4, 4]

    def test_more_values_than_torch_takes(self):
        """torch.quantile ends at 2^24 numbers; 33 times, 6 statistics, 1e6 paths are more."""
        values = torch.arange(2**24 + 2, dtype=torch.float32)
        assert quantile(values, (0.5,)).tolist() == [2.0**23 + 0.5]

    def test_of_a_sample(self):
        sample = random_sample(times=4, paths=31)
        found = sample.quantiles()
        errors = sample.quantile_errors()
        assert list(found) == list(errors) == list(sample.statistics())
        for name, values in sample.statistics().items():
            assert found[name].shape == errors[name].shape == (4, 3)
            for k in range(4):
                levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
                expected = torch.quantile(values[k], levels)
                torch.testing.assert_close(found[name][k], expected)
                assert torch.equal(errors[name][k], quantile_error(values[k], (0.05, 0.5, 0.95)))
        assert sample.quantiles((0.25,))["rho_12"].shape == (4, 1)

    def test_float32_becomes_float64(self):
        assert quantile(torch.ones(3), (0.5,)).dtype == torch.float64

    @pytest.mark.parametrize("levels", [(), (1.5,), (0.5, -0.1), (math.nan,)])
    def test_levels(self, levels):
        sample = random_sample()
        for f in (sample.quantiles, sample.quantile_errors):
            with pytest.raises(
                ValueError, match=r"levels must be numbers from 0 to 1, got \[.*Give"
            ):
                f(levels)

    def test_no_path(self):
        sample = sample_of(random_sample().covariances[:, :0], requested=4)
        for f in (sample.quantiles, sample.quantile_errors):
            with pytest.raises(
                ValueError, match="quantiles need at least one path, .* interrupted"
            ):
                f()
        estimate = sample.stopped_fraction()
        assert math.isnan(estimate.value) and math.isnan(estimate.standard_error)


class TestQuantileErrors:
    def test_by_hand(self):
        """100 paths at the median: the number below it has the standard deviation 5."""
        values = torch.arange(100.0)[torch.randperm(100)] ** 2
        # Ranks from 49.5 - 5 down to 49.5 + 5 up.
        assert quantile_error(values, (0.5,)).item() == (55**2 - 44**2) / 2

    @pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
    @pytest.mark.parametrize("count", [400, 4000])
    def test_is_the_spread_of_the_quantile(self, count, level):
        """Over many samples of one law: sqrt(p (1 - p) / count) / density, to leading order."""
        values = torch.randn(1000, count, dtype=torch.float64).exp()
        x = NORMAL.inv_cdf(level)
        density = NORMAL.pdf(x) / math.exp(x)
        expected = math.sqrt(level * (1 - level) / count) / density
        spread = quantile(values, (level,))[:, 0].std().item()
        errors = quantile_error(values, (level,))[:, 0]
        # The spread of 1000 values is known to 1 / sqrt(2000) = 2.2 %.
        assert abs(spread / expected - 1) < 0.1
        # Ranks are rounded outwards: by up to 1 of sqrt(count p (1 - p)) >= 4.3 on either side.
        slack = 1 / math.sqrt(count * level * (1 - level))
        assert -0.05 < errors.mean().item() / expected - 1 < slack + 0.1

    def test_ignores_the_scale_of_the_tail(self):
        """An error from a density or from moments would not."""
        values = torch.randn(1001, dtype=torch.float64)
        tail = values.clone()
        tail[values > 2] *= 1e9
        assert torch.equal(quantile_error(values, (0.5,)), quantile_error(tail, (0.5,)))

    def test_few_paths(self):
        values = torch.tensor([1.0, 2.0])
        assert quantile_error(values, (0.0, 0.5, 1.0)).tolist() == [0.0, 0.5, 0.0]


class TestFraction:
    def test_known(self):
        is_true = torch.arange(400) < 100
        found = fraction(is_true)
        assert isinstance(found, Estimate) and found.value == 0.25
        p = 100.5 / 401
        assert math.isclose(found.standard_error, math.sqrt(p * (1 - p) / 401), rel_tol=1e-14)

    @pytest.mark.parametrize("value", [False, True])
    def test_error_is_not_zero_at_the_ends(self, value):
        found = fraction(torch.full((100,), value))
        assert found.value == float(value)
        assert 0.005 < found.standard_error < 0.01

    @pytest.mark.parametrize("p", [0.01, 0.3])
    def test_error_is_the_spread(self, p):
        hits = torch.rand(500, 1000) < p
        values = [fraction(row) for row in hits]
        spread = statistics.stdev(value.value for value in values)
        error = statistics.mean(value.standard_error for value in values)
        # 500 values give their spread to 3.2 %; half a hit in 10 is another 2.5 %.
        assert abs(error / spread - 1) < 0.15
