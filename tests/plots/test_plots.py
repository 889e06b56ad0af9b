"""The figures: that they show the numbers they should, and the map of stopping times."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color, to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from shaped_attn import plots
from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.sample import CovarianceSample
from shaped_attn.sde.stopping_map import StoppingTimeMap, stopping_time_map

REPO = Path(__file__).resolve().parents[2]


def make_sample(source="sde", *, tokens=3, paths=200, times=9, end=1.0, dtype=torch.float64):
    """Random covariances that spread with depth; the first of them is the identity."""
    depth = torch.linspace(0, end, times, dtype=torch.float64)
    noise = torch.randn(paths, tokens, tokens, dtype=torch.float64)
    factor = torch.eye(tokens, dtype=torch.float64) + depth[:, None, None, None] * noise
    return CovarianceSample(
        source,
        depth,
        (factor @ factor.mT).to(dtype),
        torch.full((paths,), math.inf, dtype=torch.float64),
        torch.zeros(paths, dtype=torch.bool),
        paths,
    )


@pytest.fixture
def samples():
    return {
        "prediction": make_sample(),
        "width 64": make_sample("network", paths=150, times=33),
        "width 32": make_sample("chain", paths=120, times=33),
    }


def numpy_quantiles(sample, statistic, levels=(0.05, 0.5, 0.95)):
    values = sample.statistics()[statistic].double().numpy()
    return np.quantile(values, levels, axis=-1)


def line_named(axes, name):
    (line,) = (line for line in axes.lines if line.get_label() == name)
    return line


def errorbars(axes):
    return {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def legend_names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def draw(figure, tmp_path):
    """Everything that fails only when the figure is drawn."""
    return plots.save(figure, tmp_path / "figure.png")


# Covariance


@pytest.mark.parametrize("statistic", ["rho_12", "rho_23", "V_11", "V_33"])
def test_covariance_shows_the_quantiles_of_a_prediction(samples, statistic):
    (axes,) = plots.plot_covariance(samples, [statistic]).axes
    low, middle, high = numpy_quantiles(samples["prediction"], statistic)
    times = np.linspace(0, 1, 9)
    line = line_named(axes, "prediction")
    np.testing.assert_allclose(line.get_xdata(), times, rtol=1e-12)
    np.testing.assert_allclose(line.get_ydata(), middle, rtol=1e-12)
    (band,) = axes.collections[:1]
    (path,) = band.get_paths()
    for time, *ends in zip(times, low, high, strict=True):
        at_time = path.vertices[np.isclose(path.vertices[:, 0], time), 1]
        np.testing.assert_allclose([at_time.min(), at_time.max()], ends, rtol=1e-12)


@pytest.mark.parametrize("statistic", ["rho_12", "V_22"])
def test_covariance_shows_the_quantiles_of_networks(samples, statistic):
    (axes,) = plots.plot_covariance(samples, [statistic]).axes
    shown = {}
    for name, container in errorbars(axes).items():
        points, _, (bars,) = container
        shown[name] = points.get_xdata()
        index = np.round(32 * shown[name]).astype(int)
        low, middle, high = numpy_quantiles(samples[name], statistic)[:, index]
        np.testing.assert_allclose(points.get_ydata(), middle, rtol=1e-12)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack((low, high), axis=1), rtol=1e-9)
    assert list(shown) == ["width 64", "width 32"]
    # The laws are compared at the end. No whisker covers another.
    assert shown["width 64"][-1] == 1.0
    assert not set(shown["width 64"]) & set(shown["width 32"])
    assert all(5 <= len(times) <= 10 for times in shown.values())


def test_covariance_has_a_panel_for_each_statistic(samples, tmp_path):
    figure = plots.plot_covariance(samples, title="A title")
    correlation, variance = figure.axes
    assert correlation.get_xlabel() == variance.get_xlabel() == "depth / width"
    assert correlation.get_ylabel() == r"correlation $\rho_{12}$"
    assert variance.get_ylabel() == "variance $V_{11}$"
    assert correlation.get_yscale() == "linear"
    assert variance.get_yscale() == "log"
    assert legend_names(figure) == list(samples)
    assert figure.legends[0].get_title().get_text() == "median, and 5 to 95 % of paths"
    assert figure.get_suptitle() == "A title"
    draw(figure, tmp_path)


def test_covariance_at_other_levels(samples):
    figure = plots.plot_covariance(samples, ["V_11"], levels=(0.25, 0.4, 0.75))
    assert figure.legends[0].get_title().get_text() == "40 % quantile, and 25 to 75 % of paths"
    _, middle, _ = numpy_quantiles(samples["prediction"], "V_11", (0.25, 0.4, 0.75))
    line = line_named(figure.axes[0], "prediction")
    np.testing.assert_allclose(line.get_ydata(), middle, rtol=1e-12)


def test_names_of_many_tokens(tmp_path):
    figure = plots.plot_covariance({"a": make_sample(tokens=11)}, ["rho_2_11", "V_11_11"])
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [r"correlation $\rho_{2,11}$", "variance $V_{11,11}$"]
    draw(figure, tmp_path)


def test_samples_look_different_in_colour_and_in_shape(samples):
    samples["SDE of width 64"] = make_sample()
    (axes,) = plots.plot_covariance(samples, ["rho_12"]).axes
    lines = [line_named(axes, name) for name in ("prediction", "SDE of width 64")]
    lines += [container[0] for container in errorbars(axes).values()]
    assert len({to_rgba(line.get_color()) for line in lines}) == 4
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 4


def test_one_time_and_one_path_can_be_drawn(tmp_path):
    figure = plots.plot_covariance(
        {"prediction": make_sample(paths=1), "end": make_sample("network").at(-1)}
    )
    assert errorbars(figure.axes[0])["end"][0].get_xdata() == [1.0]
    draw(figure, tmp_path)


# Densities


def test_densities_of_a_prediction_are_its_histogram(samples):
    figure = plots.plot_densities({"prediction": samples["prediction"]})
    for axes, statistic in zip(figure.axes, ("rho_12", "V_11"), strict=True):
        values = samples["prediction"].statistics()[statistic][-1].numpy()
        (outline,) = (p for p in axes.patches if p.get_label() == "prediction")
        heights, edges, _ = outline.get_data()
        if statistic == "V_11":
            values, edges = np.log10(values), np.log10(edges)
        widths = np.diff(edges)
        np.testing.assert_allclose(widths, widths[0], rtol=1e-9)
        expected = [
            ((values >= low) & (values < high)).mean() / (high - low)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        np.testing.assert_allclose(heights[:-1], expected[:-1], rtol=1e-9)
        # Of 200 paths the axis leaves out none.
        assert (heights * widths).sum() == pytest.approx(1)
        filled = [p for p in axes.patches if isinstance(p, StepPatch) and p.get_fill()]
        assert len(filled) == 1
        np.testing.assert_array_equal(filled[0].get_data().values, heights)


def test_densities_of_networks_stand_in_the_bins_of_the_prediction(samples):
    (axes,) = plots.plot_densities(samples, ["V_11"]).axes
    (outline,) = (p for p in axes.patches if p.get_label() == "prediction")
    edges = np.log10(outline.get_data().edges)
    width = edges[1] - edges[0]
    places = {}
    for name, container in errorbars(axes).items():
        points, _, (bars,) = container
        values = np.log10(samples[name].statistics()["V_11"][-1].numpy())
        x, y = np.log10(points.get_xdata()), points.get_ydata()
        bins = np.digitize(x, edges) - 1
        places[name] = (x - edges[bins]) / width
        counts = np.array([((values >= edges[b]) & (values < edges[b + 1])).sum() for b in bins])
        # The upper edge of the last bin may be a value itself.
        is_inner = bins < len(edges) - 2
        np.testing.assert_allclose(y[is_inner], (counts / len(values) / width)[is_inner])
        share = y * width
        errors = np.sqrt(share * (1 - share) / len(values)) / width
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack((y - errors, y + errors), 1), atol=1e-12)
        assert axes.get_ylim()[1] > (y + errors).max()
    np.testing.assert_allclose(places["width 64"], 1 / 3)
    np.testing.assert_allclose(places["width 32"], 2 / 3)


def test_densities_are_those_of_the_last_time(samples, tmp_path):
    before = plots.plot_densities(samples)
    samples["prediction"].covariances[:-1] = math.nan
    after = plots.plot_densities(samples)
    for first, second in zip(before.axes, after.axes, strict=True):
        np.testing.assert_array_equal(
            first.patches[0].get_data().values, second.patches[0].get_data().values
        )
    assert after.legends[0].get_title().get_text() == "at depth / width = 1"
    assert [axes.get_xscale() for axes in after.axes] == ["linear", "log"]
    assert [axes.get_ylabel() for axes in after.axes] == ["density", "density per decade"]
    draw(after, tmp_path)


def test_values_that_are_not_finite_lower_the_density_and_are_noted(samples):
    sample = samples["width 64"]
    sample.covariances[-1, :30, 0, 0] = math.nan
    (axes,) = plots.plot_densities(samples, ["V_11"]).axes
    assert axes.get_title(loc="right") == "width 64: 30 paths not finite"
    points = errorbars(axes)["width 64"][0]
    (outline,) = (p for p in axes.patches if p.get_label() == "prediction")
    width = np.diff(np.log10(outline.get_data().edges))[0]
    assert (points.get_ydata() * width).sum() == pytest.approx(120 / 150)


def test_densities_of_a_single_point(tmp_path):
    draw(plots.plot_densities({"a": make_sample().at(0)}), tmp_path)


def test_densities_need_a_finite_value():
    sample = make_sample()
    sample.covariances[-1] = math.nan
    with pytest.raises(ValueError, match="must have a finite variance V_11 at the last time"):
        plots.plot_densities({"a": sample}, ["V_11"])


def test_the_axis_of_a_density_leaves_out_a_small_tail_that_still_counts():
    sample = make_sample(paths=5000)
    sample.covariances[-1, :5, 0, 0] = 1e80  # 0.1 %
    (axes,) = plots.plot_densities({"a": sample}, ["V_11"]).axes
    (outline,) = (p for p in axes.patches if p.get_label() == "a")
    heights, edges, _ = outline.get_data()
    assert edges[-1] < 1e3
    inside = (heights * np.diff(np.log10(edges))).sum()
    assert 1 - 2 * 0.005 <= inside <= 0.999


# Stopping times


def make_map(median, branch_gains, tau0s, time=1.0):
    median = torch.as_tensor(median, dtype=torch.float64)
    rest = [torch.zeros_like(median)] * 5
    return StoppingTimeMap(tuple(branch_gains), tuple(tau0s), time, 8, 10, 0, median, *rest)


def test_stopping_times_are_shown_in_their_cells(tmp_path):
    median = torch.arange(12.0).reshape(4, 3) / 12
    gains, tau0s = (0.2, 0.4, 0.6, 0.8), (0.1, 0.4, 1.6)
    figure = plots.plot_stopping_times(make_map(median, gains, tau0s, time=2.0))
    axes, bar = figure.axes
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array().reshape(3, 4), median.T)
    corners = mesh.get_coordinates()
    for row, tau0 in enumerate(tau0s):
        for column, gain in enumerate(gains):
            (x_low, y_low), (x_high, y_high) = corners[row, column], corners[row + 1, column + 1]
            assert (x_low + x_high) / 2 == pytest.approx(gain)
            assert math.sqrt(y_low * y_high) == pytest.approx(tau0)
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert axes.get_xlabel() == r"branch gain $\gamma$"
    assert axes.get_ylabel() == r"temperature $\tau_0$"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.1", "0.4", "1.6"]
    assert mesh.get_clim() == (0, 2.0)
    assert bar.get_ylabel() == "median stopping time (depth / width),\ncapped at 2"
    assert not figure.legends
    draw(figure, tmp_path)


def test_cells_that_were_not_computed_are_told_from_the_others(tmp_path):
    found = make_map([[0.5, math.nan], [math.nan, math.nan]], (0.3, 0.6), (0.5, 1.0))
    figure = plots.plot_stopping_times(found)
    np.testing.assert_array_equal(
        np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).ravel(),
        [False, True, True, True],
    )
    assert figure.axes[0].patch.get_hatch()
    assert legend_names(figure) == ["not computed"]
    draw(figure, tmp_path)


def test_a_map_of_one_cell_can_be_drawn(tmp_path):
    draw(plots.plot_stopping_times(make_map([[0.5]], [0.3], [1.0])), tmp_path)
    draw(plots.plot_stopping_times(make_map([[0.5]], [0.0], [1.0])), tmp_path)


def test_settings_of_a_map():
    with pytest.raises(TypeError, match="map must be a StoppingTimeMap, got dict"):
        plots.plot_stopping_times({})


SMALL = {"time": 0.5, "paths": 24, "steps": 60, "is_causal": True, "mlp": False}


def start():
    return equicorrelated(2, 0.2)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_a_cell_is_the_sample_of_its_settings_at_the_seed_of_the_map():
    narrow = {"eigenvalue_range": (0.3, 2.0), "integrator": "euler_maruyama"}
    progress = []
    found = stopping_time_map(
        start(),
        branch_gains=(0.3, 0.9),
        tau0s=(0.2, 1.0, 5.0),
        generator=seeded(),
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
    generator = seeded()
    gains = [0.7, 0.8, 0.9]
    settings = dict(branch_gains=gains, tau0s=[0.3, 0.5], eigenvalue_range=(0.3, 2.0), **SMALL)
    first = stopping_time_map(start(), generator=generator, **settings)
    second = stopping_time_map(start(), generator=generator, **settings)
    again = stopping_time_map(start(), generator=seeded(), **settings)
    assert first.seed == again.seed != second.seed
    assert torch.equal(first.median, again.median)
    assert not torch.equal(first.exploded, second.exploded)


def test_an_interrupted_map_keeps_its_finished_cells():
    done = []
    settings = dict(branch_gains=[0.5, 0.9], tau0s=[0.3, 1.0], generator=seeded(), **SMALL)
    whole = stopping_time_map(start(), **settings | {"generator": seeded()})
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
        ({"tau0s": []}, ValueError, "tau0s must have at least one number"),
        ({"tau0s": 1.0}, TypeError, "tau0s must be a sequence of numbers, got float"),
        ({"tau0s": ["a"]}, TypeError, "tau0s must be a number"),
        ({"branch_gains": [0.5, 0.3]}, ValueError, "branch_gains must ascend"),
        ({"tau0": 2.0}, TypeError, "tau0 must be given by tau0s"),
        ({"paths": 0}, ValueError, "paths must be at least 1"),
        ({"time": 0.0}, ValueError, "time must be greater than 0"),
        ({"eigenvalue_range": (1.0, 0.5)}, ValueError, "eigenvalue_range must ascend"),
    ):
        with pytest.raises(error, match=message):
            stopping_time_map(start(), **cells | change)


# Rank collapse


def collapsing(factor, growth, *, width=50, layers=60, paths=80, dtype=torch.float64):
    """Networks whose 1 - rho and variance change by a factor in each layer."""
    layer = torch.arange(layers + 1, dtype=torch.float64)
    spread = 1 + 0.1 * torch.rand(paths, dtype=torch.float64)
    distance = 0.8 * factor ** layer[:, None] * spread
    eye = torch.eye(3, dtype=torch.float64)
    rho = eye + (1 - eye) * (1 - distance[..., None, None])
    return CovarianceSample(
        "network",
        layer / width,
        (rho * growth ** layer[:, None, None, None] * spread[:, None, None]).to(dtype),
        torch.full((paths,), math.inf, dtype=torch.float64),
        torch.zeros(paths, dtype=torch.bool),
        paths,
    )


def test_rank_collapse_shows_distance_and_size_over_layers(tmp_path):
    samples = {"shaped": make_sample("network"), "plain": collapsing(0.8, 1.1)}
    widths = {"shaped": 100, "plain": 50}
    figure = plots.plot_rank_collapse(samples, width=widths)
    left, right = figure.axes
    for name, sample in samples.items():
        v = sample.covariances.numpy()
        scale = np.sqrt(np.diagonal(v, axis1=-2, axis2=-1))
        rho = v / scale[..., None, :] / scale[..., :, None]
        distance = 1 - (rho.sum((-2, -1)) - 3) / 6
        size = np.trace(v, axis1=-2, axis2=-1) / 3
        for axes, values in ((left, distance), (right, size)):
            line = line_named(axes, name)
            expected = np.median(values, axis=-1)
            np.testing.assert_allclose(line.get_xdata(), sample.times.numpy() * widths[name])
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-7, atol=1e-15)
    assert left.get_xlabel() == right.get_xlabel() == "layer"
    assert left.get_ylabel() == r"$1 - \rho$ (mean over pairs)"
    assert right.get_ylabel() == r"mean variance $\mathrm{tr}\,V / m$"
    assert left.get_yscale() == right.get_yscale() == "log"
    assert legend_names(figure) == ["shaped", "plain"]
    draw(figure, tmp_path)


def test_rank_collapse_without_a_width_is_over_depth():
    figure = plots.plot_rank_collapse({"plain": collapsing(0.8, 1.0)})
    assert figure.axes[0].get_xlabel() == "depth / width"
    assert line_named(figure.axes[0], "plain").get_xdata()[-1] == pytest.approx(60 / 50)


def test_theory_is_a_power_from_the_start_of_the_sample(tmp_path):
    samples = {"plain": collapsing(0.8, 1.0)}
    figure = plots.plot_rank_collapse(
        samples, width=50, theory={"slow": 0.9, "fast": 0.25, "flat": 1.0}
    )
    left, right = figure.axes
    begin = line_named(left, "plain").get_ydata()[0]
    for name, factor in (("slow", 0.9), ("fast", 0.25), ("flat", 1.0)):
        line = line_named(left, name)
        np.testing.assert_allclose(line.get_ydata(), begin * factor ** line.get_xdata())
        assert line.get_xdata()[0] == 0
        assert name not in [line.get_label() for line in right.lines]
    assert line_named(left, "slow").get_xdata()[-1] == 60
    assert line_named(left, "fast").get_ydata()[-1] >= np.finfo(np.float64).eps  # no longer axis
    assert legend_names(figure) == ["plain", "slow", "fast", "flat"]
    draw(figure, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distances_below_rounding_are_drawn_at_it(dtype):
    figure = plots.plot_rank_collapse({"plain": collapsing(0.3, 1.0, dtype=dtype)})
    values = line_named(figure.axes[0], "plain").get_ydata()
    assert values[-1] == torch.finfo(dtype).eps
    assert (values > 0).all()


def test_a_cross_where_half_of_the_paths_are_frozen():
    sample = collapsing(0.8, 1.1)
    times = torch.full((80,), math.inf, dtype=torch.float64)
    times[:39] = 0.1
    few = replace(sample, stop_times=times.clone())
    times[39] = 0.5  # layer 25
    half = replace(sample, stop_times=times)
    figure = plots.plot_rank_collapse({"few": few, "half": half}, width=50)
    assert legend_names(figure) == ["few", "half", "half of the paths frozen"]
    for axes in figure.axes:
        assert line_named(axes, "few").get_xdata()[-1] == 60
        assert line_named(axes, "half").get_xdata()[-1] == 25
        (rest,) = (line for line in axes.lines if line.get_marker() == "X")
        assert (rest.get_xdata()[0], rest.get_xdata()[-1]) == (25, 60)
        assert rest.get_markevery() == [0]
        assert same_color(rest.get_color(), line_named(axes, "half").get_color())


@pytest.mark.parametrize(
    ("factor", "matrix"),
    [
        (plots.uncentered_factor, lambda m: torch.eye(m) + torch.ones(m, m) / m),
        (plots.softmax_factor, lambda m: torch.ones(m, m) / m),
    ],
    ids=["uncentered", "softmax"],
)
def test_factors_are_those_of_the_mean_layer(factor, matrix):
    """V' = lam^2 V + gam^2 A V A^T at zero logits, covariance-sde.md (12)."""
    gain = 0.6
    a = matrix(4).double()
    v = equicorrelated(4, 0.2)
    distances = []
    for _ in range(20):
        v = (1 - gain**2) * v + gain**2 * a @ v @ a.mT
        distances.append(1 - float(v[0, 1] / v[0, 0]))
    assert distances[-1] / distances[-2] == pytest.approx(factor(gain), rel=1e-3)


# All figures


PLOTS = [plots.plot_covariance, plots.plot_densities, plots.plot_rank_collapse]


@pytest.mark.parametrize("plot", PLOTS)
def test_samples_have_to_be_named_samples_with_paths(plot):
    sample = make_sample()
    with pytest.raises(ValueError, match="samples must not be empty"):
        plot({})
    with pytest.raises(TypeError, match="samples must be a mapping from names"):
        plot([sample])
    with pytest.raises(TypeError, match=r"samples\['a'\] must be a CovarianceSample, got Tensor"):
        plot({"a": sample.covariances})
    with pytest.raises(ValueError, match=r"samples\['b'\] must have at least one path"):
        plot({"a": sample, "b": make_sample(paths=0)})


@pytest.mark.parametrize("plot", PLOTS[:2])
def test_statistics_have_to_be_there(plot):
    samples = {"a": make_sample(), "b": make_sample(tokens=2)}
    with pytest.raises(ValueError, match=r"samples\['b'\], rho_12, V_11, V_22, got 'V_33'"):
        plot(samples, ["rho_12", "V_33"])
    with pytest.raises(TypeError, match="statistics must be a sequence of names, got 'rho_12'"):
        plot(samples, "rho_12")
    with pytest.raises(ValueError, match="statistics must not be empty"):
        plot(samples, [])


@pytest.mark.parametrize("plot", [PLOTS[0], PLOTS[2]])
@pytest.mark.parametrize(
    ("levels", "rule"),
    [
        ((0.5,), "must be 3 numbers"),
        ((0.5, 0.4, 0.9), "must ascend"),
        ((0.1, 0.5, 1.1), "must be from 0 to 1"),
    ],
)
def test_levels_are_three_ascending_numbers(plot, levels, rule):
    with pytest.raises(ValueError, match=f"levels {rule}"):
        plot({"a": make_sample()}, levels=levels)


def test_settings_of_rank_collapse():
    samples = {"a": make_sample(), "b": make_sample()}
    for settings, error, message in (
        ({"theory": {"t": 0.9}}, ValueError, "width must be given with theory"),
        ({"width": {"a": 64}}, ValueError, "width must be one number, or have one for each sample"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"width": 6.5}, TypeError, "width must be an int"),
        ({"width": 64, "theory": {"t": 0.0}}, ValueError, r"theory\['t'\] must be greater than 0"),
    ):
        with pytest.raises(error, match=message):
            plots.plot_rank_collapse(samples, **settings)
    with pytest.raises(ValueError, match=r"samples\['c'\] must have at least two tokens"):
        plots.plot_rank_collapse({**samples, "c": make_sample(tokens=1)})


def test_the_legend_fits_into_the_figure(tmp_path):
    samples = {f"networks with a long name {i}": make_sample("network") for i in range(5)}
    figure = plots.plot_covariance(samples, ["rho_12"])
    draw(figure, tmp_path)
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert not box.overlaps(figure.axes[0].get_window_extent())


def test_figures_use_no_pyplot_and_change_no_setting(tmp_path):
    code = """
import sys
import matplotlib
def settings():  # reading "backend" chooses one, and imports pyplot for that
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
from shaped_attn import plots
from shaped_attn.sde import CovarianceSDE, equicorrelated
sample = CovarianceSDE().sample(equicorrelated(2, 0.2), paths=20, steps=8)
for plot in (plots.plot_covariance, plots.plot_densities, plots.plot_rank_collapse):
    plots.save(plot({"a": sample}), "a.png")
print("matplotlib.pyplot" in sys.modules, settings() == before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False", "True"]


# Files


@pytest.mark.parametrize(
    ("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")]
)
def test_save_writes_what_the_suffix_says(name, head, tmp_path):
    path = tmp_path / name
    assert plots.save(Figure(), str(path)) == path
    assert path.read_bytes().startswith(head)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_save_refuses_other_suffixes(name, tmp_path):
    with pytest.raises(ValueError, match="path must end in one of .pdf, .png, .svg"):
        plots.save(Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_leaves_nothing_behind_when_drawing_fails(tmp_path):
    figure = Figure()
    figure.text(0.5, 0.5, r"$\nonsense{$")
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    for target in (path, tmp_path / "b.pdf"):
        with pytest.raises(ValueError):
            plots.save(figure, target)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


def test_save_does_not_make_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        plots.save(Figure(), tmp_path / "missing/a.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        plots.save(Figure(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_wants_a_figure(tmp_path):
    with pytest.raises(TypeError, match="figure must be a matplotlib Figure, got NoneType"):
        plots.save(None, tmp_path / "a.png")


def test_the_same_figure_gives_the_same_file(samples, tmp_path):
    paths = [plots.save(plots.plot_covariance(samples), tmp_path / n) for n in ("a.pdf", "b.pdf")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
