"""The map of stopping times: that it shows the numbers it should."""

import math

import numpy as np
import pytest
import torch
from figures import legend_names

from shaped_attn import plots
from shaped_attn.plots import style
from shaped_attn.sde.stopping_map import StoppingTimeMap


def make_map(median, branch_gains, tau0s, time=1.0):
    median = torch.as_tensor(median, dtype=torch.float64)
    rest = [torch.zeros_like(median)] * 5
    return StoppingTimeMap(tuple(branch_gains), tuple(tau0s), time, 8, 10, 0, median, *rest)


def test_stopping_times_are_shown_in_their_cells():
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
    figure.draw_without_rendering()


def test_cells_that_were_not_computed_are_told_from_the_others():
    found = make_map([[0.5, math.nan], [math.nan, math.nan]], (0.3, 0.6), (0.5, 1.0))
    figure = plots.plot_stopping_times(found)
    np.testing.assert_array_equal(
        np.ma.getmaskarray(figure.axes[0].collections[0].get_array()).ravel(),
        [False, True, True, True],
    )
    assert figure.axes[0].patch.get_hatch()
    assert style.MISSING not in plots.svg(figure, "a map")  # it is below a pattern there
    assert legend_names(figure) == ["not computed"]
    figure.draw_without_rendering()


def test_a_map_of_one_cell_can_be_drawn():
    plots.plot_stopping_times(make_map([[0.5]], [0.3], [1.0])).draw_without_rendering()
    plots.plot_stopping_times(make_map([[0.5]], [0.0], [1.0])).draw_without_rendering()


def test_settings_of_a_map():
    with pytest.raises(TypeError, match="map must be a StoppingTimeMap, got dict"):
        plots.plot_stopping_times({})
