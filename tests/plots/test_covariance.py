"""Correlations and variances over depth, and their densities: that they show what they should."""

import math

import numpy as np
import pytest
from figures import errorbars, legend_names, line_named, make_sample
from matplotlib.colors import to_rgba
from matplotlib.patches import StepPatch

from shaped_attn import plots


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


def test_covariance_has_a_panel_for_each_statistic(samples):
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
    figure.draw_without_rendering()


def test_covariance_at_other_levels(samples):
    figure = plots.plot_covariance(samples, ["V_11"], levels=(0.25, 0.4, 0.75))
    assert figure.legends[0].get_title().get_text() == "40 % quantile, and 25 to 75 % of paths"
    _, middle, _ = numpy_quantiles(samples["prediction"], "V_11", (0.25, 0.4, 0.75))
    line = line_named(figure.axes[0], "prediction")
    np.testing.assert_allclose(line.get_ydata(), middle, rtol=1e-12)


def test_names_of_many_tokens():
    figure = plots.plot_covariance({"a": make_sample(tokens=11)}, ["rho_2_11", "V_11_11"])
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [r"correlation $\rho_{2,11}$", "variance $V_{11,11}$"]
    figure.draw_without_rendering()


def test_samples_look_different_in_colour_and_in_shape(samples):
    samples["SDE of width 64"] = make_sample()
    (axes,) = plots.plot_covariance(samples, ["rho_12"]).axes
    lines = [line_named(axes, name) for name in ("prediction", "SDE of width 64")]
    lines += [container[0] for container in errorbars(axes).values()]
    assert len({to_rgba(line.get_color()) for line in lines}) == 4
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 4


def test_one_time_and_one_path_can_be_drawn():
    figure = plots.plot_covariance(
        {"prediction": make_sample(paths=1), "end": make_sample("network").at(-1)}
    )
    assert errorbars(figure.axes[0])["end"][0].get_xdata() == [1.0]
    figure.draw_without_rendering()


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


def test_densities_are_those_of_the_last_time(samples):
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
    after.draw_without_rendering()


def test_values_that_are_not_finite_lower_the_density_and_are_noted(samples):
    sample = samples["width 64"]
    sample.covariances[-1, :30, 0, 0] = math.nan
    (axes,) = plots.plot_densities(samples, ["V_11"]).axes
    assert axes.get_title(loc="right") == "width 64: 30 paths not finite"
    points = errorbars(axes)["width 64"][0]
    (outline,) = (p for p in axes.patches if p.get_label() == "prediction")
    width = np.diff(np.log10(outline.get_data().edges))[0]
    assert (points.get_ydata() * width).sum() == pytest.approx(120 / 150)


def test_densities_of_a_single_point():
    plots.plot_densities({"a": make_sample().at(0)}).draw_without_rendering()


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
