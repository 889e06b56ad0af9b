"""The comparison of two samples: its statistics by hand, its error rates, its edge cases."""

import json
import math

import pytest
import torch
from scipy.stats import ks_2samp

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.comparison import compare, critical_value
from shaped_attn.sde.sample import CovarianceSample

INF, NAN = math.inf, math.nan


def make_sample(rho, v_11=None, v_22=None, *, time=1.0, stop_times=None, exploded=None, **options):
    """A sample of two tokens with these final values; at time 0 every V is the identity."""
    rho = torch.as_tensor(rho, dtype=torch.float64)
    v_11, v_22 = (
        torch.ones_like(rho) if v is None else torch.as_tensor(v, dtype=torch.float64)
        for v in (v_11, v_22)
    )
    off = rho * (v_11 * v_22).sqrt()
    final = torch.stack((v_11, off, off, v_22), dim=-1).unflatten(-1, (2, 2))
    start = torch.eye(2, dtype=torch.float64).expand_as(final)
    paths = len(rho)
    if stop_times is None:
        stop_times = torch.full((paths,), INF, dtype=torch.float64)
    if exploded is None:
        exploded = torch.zeros(paths, dtype=torch.bool)
    return CovarianceSample(
        options.get("source", "sde"),
        torch.tensor([0.0, time], dtype=torch.float64),
        torch.stack((start, final)),
        torch.as_tensor(stop_times),
        torch.as_tensor(exploded),
        options.get("requested", paths),
    )


def random_sample(paths, *, shift=0.0):
    """Three statistics that are independent of each other."""
    draws = torch.randn(3, paths, dtype=torch.float64)
    return make_sample(draws[0].tanh(), draws[1].exp(), (draws[2] + shift).exp())


def distance(first, second):
    """The KS statistic by its definition."""
    return max(
        abs(sum(a <= x for a in first) / len(first) - sum(b <= x for b in second) / len(second))
        for x in [*first, *second]
    )


def test_ks_is_the_definition_and_scipys():
    first, second = random_sample(37), random_sample(60, shift=0.4)
    # Ties, within a sample and across.
    second.covariances[-1, :20] = first.covariances[-1, 5:25]
    second.covariances[-1, 20:23] = first.covariances[-1, 3]
    found = compare(first, second).statistics
    assert list(found) == ["rho_12", "V_11", "V_22"]
    for name, statistic in found.items():
        values = [sample.statistics()[name][-1].tolist() for sample in (first, second)]
        assert statistic.ks == pytest.approx(distance(*values), abs=1e-12)
        assert statistic.ks == pytest.approx(ks_2samp(*values).statistic, abs=1e-12)


def test_only_the_last_time_counts():
    first, second = random_sample(50), random_sample(50)
    before = compare(first, second)
    first.covariances[0] *= 7
    assert compare(first, second) == before


def test_critical_values():
    # The tables have 1.63 and 1.36 for the limit law at 1 % and 5 %.
    assert critical_value(0.01, 2, 2) == pytest.approx(1.6276, abs=1e-4)
    assert critical_value(0.05, 2, 2) == pytest.approx(1.3581, abs=1e-4)
    comparison = compare(random_sample(100), random_sample(400), level=0.01)
    root = math.sqrt(1 / 100 + 1 / 400)
    assert comparison.uncorrected_critical == pytest.approx(1.6276 * root, abs=1e-5)
    expected = math.sqrt(-math.log(0.01 / 3 / 2) / 2) * root
    assert comparison.critical == pytest.approx(expected, rel=1e-12)
    for statistic in comparison.statistics.values():
        assert statistic.critical == comparison.critical
        assert statistic.uncorrected_critical == comparison.uncorrected_critical


def test_the_default_level_is_one_in_a_hundred():
    """Of samples of one law, three statistics each; it would be three without the correction."""
    critical = compare(random_sample(150), random_sample(250)).critical
    steps = torch.cat((torch.full((150,), 1 / 150), torch.full((250,), -1 / 250)))
    wrong = repeats = 0
    for _ in range(4):
        order = torch.rand(5000, 3, 400).argsort(-1)  # the ranks of samples of one law
        ks = steps[order].double().cumsum(-1).abs().amax(-1)
        wrong += int((ks >= critical).any(-1).sum())
        repeats += len(ks)
    # The critical value is that of many paths; for these numbers it errs to the safe side.
    assert 0.01 / 2 < wrong / repeats < 0.01 + 4 * math.sqrt(0.01 / repeats)


def test_a_shifted_law_is_found():
    comparison = compare(random_sample(500), random_sample(500, shift=0.4))
    assert not comparison.agrees
    assert comparison.largest.name == "V_22"
    assert [name for name, s in comparison.statistics.items() if not s.agrees] == ["V_22"]
    assert comparison.largest.ratio == comparison.largest.ks / comparison.critical > 1


def test_agreement_is_by_the_corrected_value():
    # 100 paths each: critical 0.253 for three statistics, 0.230 for one.
    values = torch.arange(100.0)
    first = make_sample([0.0] * 100, values + 1)
    second = make_sample([0.0] * 100, values + 25)
    comparison = compare(first, second)
    assert comparison.largest.ks == pytest.approx(0.24)
    assert comparison.uncorrected_critical < 0.24 < comparison.critical
    assert comparison.agrees
    assert not compare(first, make_sample([0.0] * 100, values + 27)).agrees


def test_the_sde_agrees_with_itself_and_not_with_another():
    v0 = equicorrelated(3, 0.3)
    samples = [
        CovarianceSDE(branch_gain=gain).sample(
            v0, paths=1000, steps=16, generator=torch.Generator().manual_seed(seed)
        )
        for seed, gain in enumerate((0.4, 0.4, 0.6))
    ]
    assert compare(samples[0], samples[1]).agrees
    assert not compare(samples[0], samples[2]).agrees
    assert len(compare(samples[0], samples[1]).statistics) == 6  # 3 pairs and 3 variances


def test_quantiles_are_those_of_the_samples():
    samples = random_sample(300), random_sample(200)
    for name, statistic in compare(*samples).statistics.items():
        for i, sample in enumerate(samples):
            assert statistic.quantiles[i] == tuple(sample.quantiles()[name][-1].tolist())
            errors = tuple(sample.quantile_errors()[name][-1].tolist())
            assert statistic.quantile_errors[i] == errors
            assert min(errors) > 0


def test_fractions_and_their_difference_by_hand():
    def stopped(count, exploded, paths):
        times = torch.full((paths,), INF, dtype=torch.float64)
        times[:count] = 0.5
        return make_sample(
            torch.linspace(-0.5, 0.5, paths),
            stop_times=times,
            exploded=torch.arange(paths) < exploded,
        )

    comparison = compare(stopped(30, 10, 100), stopped(30, 0, 200))
    assert comparison.stopped.first.value == 0.3
    assert comparison.stopped.second.value == 0.15
    # Standard errors of binomial fractions, half a hit added to both outcomes.
    variances = [p * (1 - p) / (n + 1) for p, n in ((30.5 / 101, 100), (30.5 / 201, 200))]
    assert comparison.stopped.difference.value == pytest.approx(0.15)
    assert comparison.stopped.difference.standard_error == pytest.approx(math.sqrt(sum(variances)))
    assert comparison.stopped.z_score == pytest.approx(0.15 / math.sqrt(sum(variances)))
    assert comparison.exploded.first.value == 0.1
    assert comparison.exploded.second.value == 0.0
    assert compare(stopped(0, 0, 50), stopped(0, 0, 60)).exploded.z_score == 0.0


@pytest.mark.parametrize("value", [NAN, INF])
def test_values_that_are_not_finite_count_as_outcomes(value):
    base = torch.linspace(1, 2, 100)
    broken = base.clone()
    broken[70:] = value
    first, second = make_sample([0.0] * 100, base), make_sample([0.0] * 100, broken)
    found = compare(first, second).statistics["V_11"]
    assert found.ks == pytest.approx(0.3)  # the 30 that are gone from the upper end
    assert found.not_finite == (0, 30)
    assert compare(second, second).statistics["V_11"].ks == 0.0


def test_nan_is_above_all_numbers():
    first = make_sample([0.0] * 10, [2.0] * 7 + [NAN] * 3)
    second = make_sample([0.0] * 10, [1.0] * 10)
    assert compare(first, second).statistics["V_11"].ks == 1.0  # below them it would be 0.7


def test_nan_is_not_infinity():
    ends = [[1.0, 2.0, INF, INF], [1.0, 2.0, NAN, NAN]]
    found = compare(*(make_sample([0.0] * 4, end) for end in ends)).statistics["V_11"]
    assert found.ks == 0.5
    assert found.not_finite == (2, 2)


def test_nothing_finite_is_no_agreement():
    sample = make_sample([0.0] * 2000, [NAN] * 2000)
    comparison = compare(sample, sample)
    assert math.isnan(comparison.statistics["V_11"].ks)
    assert not comparison.statistics["V_11"].agrees
    assert not comparison.agrees
    assert comparison.statistics["V_22"].agrees


def test_nothing_finite_is_the_largest_difference():
    samples = [CovarianceSDE().sample(equicorrelated(3, 0.2), paths=40, steps=8) for _ in range(2)]
    for sample in samples:
        sample.covariances[-1, :, 2, 2] = NAN
    comparison = compare(*samples)
    assert comparison.statistics["rho_12"].ks > 0
    assert math.isnan(comparison.largest.ks)


def test_json_has_everything_and_no_nan():
    first = random_sample(20)
    first.covariances[-1, :15, 0, 0] = NAN
    comparison = compare(first, random_sample(30))
    found = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    statistic = found["statistics"]["V_11"]
    assert statistic["quantiles"][0][1:] == ["nan", "nan"]
    assert statistic["not_finite"] == [15, 0]
    assert statistic["ks"] == comparison.statistics["V_11"].ks
    assert statistic["agrees"] is False
    assert statistic["ratio"] == comparison.statistics["V_11"].ratio
    assert found["largest"] == comparison.largest.name
    assert found["agrees"] is False
    assert found["paths"] == [20, 30]
    assert found["quantile_levels"] == [0.05, 0.5, 0.95]
    assert set(found["stopped"]) == {"first", "second", "difference", "z_score"}
    assert set(found["stopped"]["first"]) == {"value", "standard_error"}


def test_an_interrupted_sample_is_known_by_what_was_asked_for():
    first = make_sample([0.1, 0.2, 0.3], requested=10)
    comparison = compare(first, make_sample([0.1, 0.2], source="network"))
    assert comparison.paths == (3, 2)
    assert comparison.requested == (10, 2)
    assert comparison.sources == ("sde", "network")
    assert (comparison.tokens, comparison.time, comparison.level) == (2, 1.0, 0.01)


def test_too_few_paths_cannot_disagree():
    low, high = make_sample([-0.5, -0.6, -0.7]), make_sample([0.5, 0.6, 0.7])
    comparison = compare(low, high)
    assert comparison.largest.ks == 1.0
    assert comparison.agrees
    assert not comparison.can_disagree
    assert compare(random_sample(10), random_sample(10)).can_disagree


def test_one_token_and_float32():
    sample = random_sample(50)
    one = CovarianceSample(
        "network",
        sample.times,
        sample.covariances[..., :1, :1].float(),
        sample.stop_times,
        sample.exploded,
        50,
    )
    comparison = compare(one, one)
    assert list(comparison.statistics) == ["V_11"]
    assert comparison.critical == comparison.uncorrected_critical
    assert comparison.agrees


def test_the_last_times_may_differ_by_rounding():
    compare(make_sample([0.1], time=0.3), make_sample([0.1], time=0.1 + 0.2))
    with pytest.raises(ValueError, match="same depth / width, got 0.3 and 0.301"):
        compare(make_sample([0.1], time=0.3), make_sample([0.1], time=0.301))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": make_sample([])}, "first must have at least one path"),
        ({"second": make_sample([])}, "second must have at least one path"),
        ({"second": torch.eye(2)}, "second must be a CovarianceSample, got Tensor"),
        ({"second": make_sample([0.1], time=0.5)}, "same depth / width, got 1 and 0.5"),
        ({"second": make_sample([0.1]).at(0)}, "same depth / width, got 1 and 0"),
        ({"level": 0}, "level must be between 0 and 1"),
        ({"level": 1}, "level must be between 0 and 1"),
        ({"level": NAN}, "level must be finite"),
        ({"level": "0.01"}, "level must be a number"),
    ],
)
def test_arguments(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compare(**{"first": make_sample([0.1]), "second": make_sample([0.1]), **change})


def test_samples_of_different_tokens():
    other = CovarianceSDE().sample(equicorrelated(3, 0.2), paths=2, steps=8)
    with pytest.raises(ValueError, match="same number of tokens, got 2 and 3"):
        compare(make_sample([0.1]), other)
