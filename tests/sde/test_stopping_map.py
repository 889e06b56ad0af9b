"""The map of stopping times over branch gain and temperature."""

import json

import pytest
import torch
from covariances import seeded

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.stopping_map import stopping_time_map

SMALL = {"time": 0.5, "paths": 24, "steps": 60, "is_causal": True, "mlp": False}


def start():
    return equicorrelated(2, 0.2)


def test_a_cell_is_the_sample_of_its_settings_at_the_seed_of_the_map():
    narrow = {"eigenvalue_range": (0.3, 2.0), "integrator": "euler_maruyama"}
    progress = []
    found = stopping_time_map(
        start(),
        branch_gains=(0.3, 0.9),
        tau0s=(0.2, 1.0, 5.0),
        generator=seeded(3),
        on_progress=lambda *counts: progress.append(counts),
        **SMALL,
        **narrow,
    )
    assert progress == [(done, 6) for done in range(1, 7)]
    assert found.is_complete
    assert found.median.shape == (2, 3)
    for row, gain in enumerate(found.branch_gains):
        for column, tau0 in enumerate(found.tau0s):
            sde = CovarianceSDE(branch_gain=gain, tau0=tau0, is_causal=True, mlp=False)
            sample = sde.sample(start(), 0.5, 24, 60, seeded(found.seed), **narrow)
            capped = sample.stop_times.clamp(max=0.5).sort().values
            assert found.median[row, column] == pytest.approx(float(capped[11:13].mean()))
            # Half the distance of the paths sqrt(24 / 4) ranks below and above the middle.
            error = float(capped[14] - capped[9]) / 2
            assert found.median_error[row, column] == pytest.approx(error)
            assert found.stopped[row, column] == sample.stopped.double().mean()
            assert found.exploded[row, column] == sample.exploded.double().mean()
            assert found.stopped_error[row, column] == sample.stopped_fraction().standard_error
            assert found.exploded_error[row, column] == sample.exploded_fraction().standard_error
    # The cells are not all alike, and some paths stop at each end.
    assert found.median.min() < 0.4
    assert found.median.max() == 0.5
    assert 0 < found.exploded[1, 2] < found.stopped[1, 2]
    assert found.median_error.max() > 0


def test_a_map_is_repeatable_and_advances_the_generator():
    generator = seeded(3)
    gains = [0.7, 0.8, 0.9]
    settings = dict(branch_gains=gains, tau0s=[0.3, 0.5], eigenvalue_range=(0.3, 2.0), **SMALL)
    first = stopping_time_map(start(), generator=generator, **settings)
    second = stopping_time_map(start(), generator=generator, **settings)
    again = stopping_time_map(start(), generator=seeded(3), **settings)
    assert first.seed == again.seed != second.seed
    assert torch.equal(first.median, again.median)
    assert not torch.equal(first.exploded, second.exploded)


def test_an_interrupted_map_keeps_its_finished_cells():
    done = []
    settings = dict(branch_gains=[0.5, 0.9], tau0s=[0.3, 1.0], generator=seeded(3), **SMALL)
    whole = stopping_time_map(start(), **settings | {"generator": seeded(3)})
    found = stopping_time_map(
        start(),
        on_progress=lambda count, total: done.append(count),
        stop=lambda: len(done) >= 3,
        **settings,
    )
    assert not found.is_complete
    assert found.finished.tolist() == [[True, True], [True, False]]
    for name in ("median", "median_error", "stopped", "stopped_error", "exploded"):
        assert getattr(found, name)[1, 1].isnan()
        assert torch.equal(
            getattr(found, name)[found.finished], getattr(whole, name)[found.finished]
        )
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["median"][1] == [float(found.median[1, 0]), "nan"]
    assert plain["is_complete"] is False
    assert plain["seed"] == found.seed


def test_bad_settings_of_a_map_are_found_before_the_first_cell():
    def asked():
        raise AssertionError("a cell has been started")

    cells = {"branch_gains": [0.3, 0.5], "tau0s": [0.5, 1.0], "stop": asked}
    for change, error, message in (
        ({"branch_gains": [0.3, 1.5]}, ValueError, "branch_gain must be from 0 to 1, got 1.5"),
        ({"tau0s": [-1.0, 1.0]}, ValueError, "tau0 must be"),
        ({"tau0s": []}, ValueError, "tau0s must be a sequence of numbers, got 0"),
        ({"tau0s": 1.0}, TypeError, "tau0s must be a sequence of numbers, got 1.0"),
        ({"tau0s": ["a"]}, TypeError, "tau0s must be a number"),
        ({"branch_gains": [0.5, 0.3]}, ValueError, "branch_gains must ascend"),
        ({"tau0": 2.0}, TypeError, "tau0 must be given by tau0s"),
        ({"paths": 0}, ValueError, "paths must be at least 1"),
        ({"time": 0.0}, ValueError, "time must be greater than 0"),
        ({"eigenvalue_range": (1.0, 0.5)}, ValueError, "eigenvalue_range must ascend"),
    ):
        with pytest.raises(error, match=message):
            stopping_time_map(start(), **cells | change)
