import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.sample import CovarianceSample, mean_correlation, quantile, quantile_error
from shaped_attn.sde.tuning import tune

START = equicorrelated(3, 0.2)


@dataclass(frozen=True, kw_only=True)
class Law:
    """Stands in for a process: all paths end with the correlation that a function says."""

    correlation: Callable[[float, float], float]
    branch_gain: float = 0.5
    tau0: float = 1.0
    identity_gain: float = 1.0
    attention: bool = True
    skip_gain: float | None = 0.5
    calls: list = field(default_factory=list)

    def sample(self, v0, time, paths, steps, generator, *, snapshots, chunk, stop=None, **rest):
        done = 0 if stop is not None and stop() else paths
        self.calls.append((self, time, paths, steps, generator, rest))
        tokens = v0.shape[-1]
        v = equicorrelated(tokens, self.correlation(self.branch_gain, self.tau0))
        return CovarianceSample(
            "sde",
            torch.tensor([0.0, time], dtype=torch.float64),
            torch.stack([v0, v])[:, None].expand(2, done, tokens, tokens),
            torch.full((done,), torch.inf, dtype=torch.float64),
            torch.zeros(done, dtype=torch.bool),
            paths,
        )


def of_gain(correlation):
    return Law(correlation=lambda gain, tau0: correlation(gain))


def of_tau0(correlation):
    return Law(correlation=lambda gain, tau0: correlation(tau0))


def search(law, band, **options):
    return tune(law, START, band=band, paths=5, **options)


def ends(interval):
    return tuple(
        getattr(end.candidate, interval.parameter) for end in (interval.low, interval.high)
    )


def test_both_ends_are_found_to_the_resolution():
    found = search(of_gain(lambda gain: gain**2), (0.1, 0.5)).branch_gain
    assert ends(found) == (0.32, 0.70)
    assert (found.low.outside, found.high.outside) == (0.31, 0.71)
    assert not found.low.is_search_limit
    assert not found.high.is_search_limit
    assert found.resolution == 0.01
    assert found.is_complete
    values = [candidate.branch_gain for candidate in found.candidates]
    assert values == sorted(set(values))
    assert len(values) < 25  # of 96


def test_tau0_is_found_on_a_logarithmic_scale():
    found = search(of_tau0(lambda tau0: 0.9 - tau0 / 12), (0.2, 0.8)).tau0
    low, high = ends(found)
    assert found.low.outside < 1.2 <= low
    assert high <= 8.4 < found.high.outside
    for inside, outside in ((low, found.low.outside), (high, found.high.outside)):
        # Three digits are kept of each.
        assert max(inside / outside, outside / inside) == pytest.approx(found.resolution, rel=6e-3)
    assert found.resolution == pytest.approx(10 ** (1 / 48))


def test_each_parameter_is_searched_at_the_given_value_of_the_other():
    law = Law(correlation=lambda gain, tau0: gain / (2 * tau0 + 1), branch_gain=0.4, tau0=2.0)
    found = search(law, (0.049, 0.151))
    assert ends(found.branch_gain) == (0.25, 0.75)
    assert {candidate.tau0 for candidate in found.branch_gain.candidates} == {2.0}
    crossing = (0.4 / 0.151 - 1) / 2
    assert found.tau0.low.outside < crossing <= found.tau0.low.candidate.tau0
    assert {candidate.branch_gain for candidate in found.tau0.candidates} == {0.4}


def test_an_end_of_the_search_range_is_marked():
    found = search(of_gain(lambda gain: 0.3), (0.2, 0.4))
    for interval, limits in ((found.branch_gain, (0.05, 1.0)), (found.tau0, (0.1, 10.0))):
        assert ends(interval) == limits == interval.search_range
        assert interval.low.is_search_limit
        assert interval.high.is_search_limit
        assert interval.low.outside is interval.high.outside is None


def test_of_several_intervals_the_one_with_the_most_conservative_value_is_found():
    def humps(x, *centers):
        return 0.3 if any(abs(x - center) <= 0.1201 for center in centers) else 0.0

    band = (0.2, 0.4)
    by_gain = search(of_gain(lambda gain: humps(gain, 0.3, 0.7)), band).branch_gain
    assert ends(by_gain) == (0.18, 0.42)
    assert any(c.correlation.value > 0.2 for c in by_gain.candidates if c.branch_gain > 0.5)
    by_tau0 = search(of_tau0(lambda tau0: humps(math.log10(tau0), -0.5, 0.5)), band).tau0
    assert ends(by_tau0) == (2.49, 4.02)  # within 10^(1/48) of 10^0.38 and 10^0.62
    assert any(c.correlation.value > 0.2 for c in by_tau0.candidates if c.tau0 < 1)


def test_a_passage_between_two_values_of_the_scan_is_found():
    # From 0.25 to 0.35, two neighbours of the scan, it goes from 0 to 0.9.
    def steep(gain):
        return min(0.9, max(0.0, 9 * (gain - 0.25)))

    found = search(of_gain(steep), (0.25, 0.45)).branch_gain
    assert ends(found) == (0.28, 0.30)
    assert (found.low.outside, found.high.outside) == (0.27, 0.31)
    # It goes before values of the scan that come later.
    later = search(of_gain(lambda gain: 0.3 if gain > 0.5 else steep(gain)), (0.25, 0.45))
    assert ends(later.branch_gain) == (0.28, 0.30)


def test_a_jump_over_the_band_finds_nothing_and_names_the_nearest():
    found = search(of_gain(lambda gain: 0.1 if gain < 0.3 else 0.6), (0.3, 0.5)).branch_gain
    assert not found.is_found
    assert found.low is found.high is None
    assert found.is_complete
    assert found.nearest.correlation.value == pytest.approx(0.6)
    # It was looked for where the median jumps.
    assert {0.29, 0.30} <= {candidate.branch_gain for candidate in found.candidates}


def test_a_band_out_of_reach_names_the_nearest():
    found = search(of_gain(lambda gain: gain / 2), (0.7, 0.9)).branch_gain
    assert not found.is_found
    assert (found.nearest.branch_gain, found.nearest.correlation.value) == (1.0, 0.5)


def test_the_skip_gain_follows_and_the_identity_gain_bounds_the_search():
    law = Law(correlation=lambda gain, tau0: 0.3, identity_gain=1.5)
    found = search(law, (0.2, 0.4), steps=7, integrator="chain").branch_gain
    assert ends(found) == (0.05, 0.66)
    assert {(call[0].skip_gain, call[2], call[3]) for call in law.calls} == {(None, 5, 7)}
    assert all(call[-1] == {"integrator": "chain"} for call in law.calls)


def test_all_candidates_have_the_seed():
    law = of_gain(lambda gain: gain)
    search(law, (0.2, 0.4), seed=11)
    assert {call[4].initial_seed() for call in law.calls} == {11}
    assert len({id(call[4]) for call in law.calls}) == len(law.calls)


def test_without_attention_tau0_is_not_searched():
    law = Law(correlation=lambda gain, tau0: gain, attention=False)
    found = search(law, (0.2, 0.4))
    assert found.tau0 is None
    assert found.is_complete
    assert {call[0].tau0 for call in law.calls} == {1.0}


@pytest.mark.parametrize("candidates", [0, 1, 3, 13, 18, 20])
def test_a_stop_keeps_what_was_tried(candidates):
    law = of_gain(lambda gain: gain / 2)
    found = search(law, (0.01, 0.2), stop=lambda: len(law.calls) >= candidates)
    assert not found.is_complete
    tried = found.branch_gain.candidates + (found.tau0.candidates if found.tau0 else ())
    assert len(tried) == candidates
    assert len(law.calls) == candidates + 1
    gains = found.branch_gain
    if candidates == 0:
        assert gains.nearest is None
        assert not gains.is_found
    elif candidates <= 3:
        assert gains.low.is_search_limit
        assert gains.high.candidate.branch_gain == (0.05 if candidates == 1 else 0.25)
        assert gains.high.outside is None
        assert not gains.high.is_search_limit
    elif candidates == 13:  # two into the bisection
        assert gains.high.candidate.branch_gain <= 0.4 < gains.high.outside
        assert gains.high.outside - gains.high.candidate.branch_gain > 0.015
        assert not gains.is_complete
    assert gains.is_complete == (candidates >= 18)
    assert (found.tau0 is None) == (candidates < 18)
    json.dumps(found.to_dict(), allow_nan=False)


def test_progress_rises_to_its_end():
    seen = []
    law = of_gain(lambda gain: gain**2)
    search(law, (0.1, 0.5), on_progress=lambda done, total: seen.append((done, total)))
    done = [pair[0] for pair in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert len(law.calls) <= seen[-1][1]


def test_the_result_is_plain_data():
    found = json.loads(
        json.dumps(search(of_gain(lambda gain: gain / 2), (0.0999, 0.2001)).to_dict())
    )
    assert found["band"] == [0.0999, 0.2001]
    assert (found["paths"], found["steps"], found["seed"], found["time"]) == (5, 64, 0, 1.0)
    gains = found["branch_gain"]
    assert gains["is_found"] is True
    assert gains["low"]["candidate"]["branch_gain"] == 0.2
    assert gains["low"]["outside"] == 0.19
    assert gains["high"]["candidate"]["correlation"]["value"] == pytest.approx(0.2)
    assert set(gains["high"]["candidate"]["blow_up"]) == {"value", "standard_error"}
    assert found["tau0"]["is_found"] is False
    assert found["tau0"]["nearest"]["correlation"]["value"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"band": (0.5, 0.2)}, ValueError, "band must ascend and lie in"),
        ({"band": (-0.6, 0.2)}, ValueError, r"\[-0.5, 1\]"),
        ({"band": (0.1, 1.1)}, ValueError, r"got \(0.1, 1.1\)"),
        ({"band": 0.3}, TypeError, "band must be 2 numbers"),
        ({"band": (0.3, "x")}, TypeError, "band must be a number"),
        ({"branch_gains": (0.0, 0.5)}, ValueError, "branch_gains must ascend"),
        ({"branch_gains": (0.5, 1.5)}, ValueError, r"lie in \(0, 1\]"),
        ({"branch_gains": (0.501, 0.502)}, ValueError, "at least two values"),
        ({"tau0s": (2.0, 1.0)}, ValueError, "tau0s must ascend and be positive"),
        ({"paths": 0}, ValueError, "paths must be at least 1"),
        ({"time": -1.0}, ValueError, "time must be greater than 0"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    arguments = {"band": (0.1, 0.3), "paths": 4, **options}
    with pytest.raises(error, match=message):
        tune(CovarianceSDE(), START, **arguments)


def test_one_token_has_no_correlation():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tune(of_gain(lambda gain: gain), equicorrelated(1, 0.0), band=(0.1, 0.3))


def test_a_candidate_is_what_the_process_samples():
    sde = CovarianceSDE(branch_gain=0.9, tau0=0.5)
    options = {"time": 0.5, "paths": 64, "steps": 12, "seed": 5}
    narrow = {"branch_gains": (0.3, 0.32), "tau0s": (0.2, 0.22)}
    found = tune(sde, START, band=(-0.5, 1.0), **options, **narrow)
    assert found == tune(sde, START, band=(-0.5, 1.0), **options, **narrow)
    assert ends(found.tau0)[1] == found.tau0.search_range[1] <= 0.22
    generator = torch.Generator().manual_seed(5)
    sample = CovarianceSDE(branch_gain=0.32, tau0=0.5).sample(START, 0.5, 64, 12, generator)
    final = mean_correlation(sample.final)
    high = found.branch_gain.high.candidate
    assert (high.branch_gain, high.tau0) == (0.32, 0.5)
    assert high.correlation.value == float(quantile(final, (0.5,)))
    assert high.correlation.standard_error == float(quantile_error(final, (0.5,)))
    assert high.blow_up == sample.exploded_fraction()


def test_blow_ups_are_counted():
    # Steps of this size throw most paths out where the drift is large, as it is at small tau0.
    found = tune(
        CovarianceSDE(branch_gain=0.7, tau0=0.05, mlp=False),
        equicorrelated(3, 0.2, 4.0),
        band=(-0.5, 1.0),
        paths=64,
        steps=16,
        branch_gains=(0.1, 0.7),
        tau0s=(0.05, 10.0),
        integrator="euler_maruyama",
    )
    small, large = found.tau0.candidates[0], found.tau0.candidates[-1]
    assert (small.tau0, large.tau0) == (0.0511, 10.0)
    assert small.blow_up.value > 0.3
    assert large.blow_up.value == 0
    assert large.blow_up.standard_error > 0


def test_the_interval_holds_for_other_draws():
    # A strongly bent activation pulls tokens together, the more the larger the gain.
    sde = CovarianceSDE(c_plus=0.0, c_minus=-3.0, attention=False)
    found = tune(sde, START, time=1.0, band=(0.1, 0.5), paths=1024, steps=16)
    end = found.branch_gain.high
    assert not end.is_search_limit

    def median(gain):
        process = CovarianceSDE(c_plus=0.0, c_minus=-3.0, attention=False, branch_gain=gain)
        generator = torch.Generator().manual_seed(99)
        final = mean_correlation(process.sample(START, 1.0, 1024, 16, generator).final)
        return float(final.median()), float(quantile_error(final, (0.5,)))

    value, error = median(end.candidate.branch_gain)
    error = math.hypot(error, end.candidate.correlation.standard_error)
    assert abs(value - end.candidate.correlation.value) < 4 * error
    # Well inside of the interval it is inside of the band, well outside it is not.
    assert 0.1 < median(end.candidate.branch_gain / 2)[0] < 0.5
    assert median(min(1.0, 1.5 * end.outside))[0] > 0.5
