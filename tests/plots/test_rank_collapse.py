"""Rank collapse over depth: that the figure shows the numbers it should."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from figures import legend_names, line_named, make_sample
from matplotlib.colors import same_color

from shaped_attn import plots
from shaped_attn.sde import equicorrelated
from shaped_attn.sde.sample import CovarianceSample


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


def test_rank_collapse_shows_distance_and_size_over_layers():
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
    figure.draw_without_rendering()


@pytest.mark.parametrize("index", [0, 1])
def test_each_quantity_can_stand_alone(index):
    samples = {"plain": collapsing(0.8, 1.1)}
    whole = plots.plot_rank_collapse(samples, width=50)
    figure = plots.plot_rank_collapse(
        samples, width=50, quantities=(("distance", "size")[index],), theory={"factor": 0.8}
    )
    (axes,) = figure.axes
    assert axes.get_ylabel() == whole.axes[index].get_ylabel()
    shown = line_named(axes, "plain").get_ydata()
    np.testing.assert_array_equal(shown, line_named(whole.axes[index], "plain").get_ydata())
    assert ("factor" in legend_names(figure)) == (index == 0)


def test_rank_collapse_without_a_width_is_over_depth():
    figure = plots.plot_rank_collapse({"plain": collapsing(0.8, 1.0)})
    assert figure.axes[0].get_xlabel() == "depth / width"
    assert line_named(figure.axes[0], "plain").get_xdata()[-1] == pytest.approx(60 / 50)


def test_theory_is_a_power_from_the_start_of_the_sample():
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
    figure.draw_without_rendering()


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


def test_settings_of_rank_collapse():
    samples = {"a": make_sample(), "b": make_sample()}
    for settings, error, message in (
        ({"theory": {"t": 0.9}}, ValueError, "width must be given with theory"),
        ({"width": {"a": 64}}, ValueError, "width must be one number, or have one for each sample"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"quantities": ()}, ValueError, "quantities must not be empty"),
        ({"quantities": ("rank",)}, ValueError, "quantities must be one of 'distance', 'size'"),
        ({"width": 6.5}, TypeError, "width must be an int"),
        ({"width": 64, "theory": {"t": 0.0}}, ValueError, r"theory\['t'\] must be greater than 0"),
    ):
        with pytest.raises(error, match=message):
            plots.plot_rank_collapse(samples, **settings)
    with pytest.raises(ValueError, match=r"samples\['c'\] must have at least two tokens"):
        plots.plot_rank_collapse({**samples, "c": make_sample(tokens=1)})
