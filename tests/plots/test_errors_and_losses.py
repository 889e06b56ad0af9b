"""The centred term's error over the logits, and losses over steps: that the figures show them."""

import numpy as np
import pytest
from figures import legend_names
from matplotlib.colors import same_color

from shaped_attn import fidelity, plots

STDS = (0.1, 1.0)


@pytest.fixture(scope="module")
def report():
    impls, dtypes = ("torch", "reference"), ("bf16", "fp32")
    return fidelity.measure(impls, dtypes=dtypes, logit_stds=STDS, length=16)


def test_the_centred_error_has_a_line_for_each_implementation_and_the_composition(report):
    figure = plots.plot_centred_error(report, title="A title")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["bf16", "fp32"]
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log"
        rows = [
            m
            for m in report.measurements
            if (m.dtype, m.regime) == (axes.get_title(loc="left"), "plain")
            and m.quantity == fidelity.CENTRED
        ]
        *impls, composed, budget = axes.lines
        for line, impl in zip(impls, ("torch", "reference"), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), STDS)
            errors = [m.error for m in rows if m.impl == impl]
            np.testing.assert_array_equal(line.get_ydata(), errors)
            assert not same_color(line.get_color(), composed.get_color())
        expected = [m.composed_error for m in rows if m.impl == "reference"]
        np.testing.assert_array_equal(composed.get_ydata(), expected)
        assert set(budget.get_ydata()) == {max(m.budget for m in rows)}
    assert legend_names(figure)[-2:] == ["softmax minus mean, composed", "budget"]
    figure.draw_without_rendering()


def test_the_centred_error_of_nothing_is_refused(report):
    other = fidelity.FidelityReport(report.measurements[1:2], {}, 0.0)
    with pytest.raises(ValueError, match="report must have the centred term"):
        plots.plot_centred_error(other)


def test_losses_are_drawn_over_steps():
    curves = {"ours": [(0, 5.5), (10, 2.5)], "theirs": [(0, 90.0), (10, 3.0)], "none yet": []}
    figure = plots.plot_losses(
        curves,
        training={"ours": [(1, 5.4), (2, 5.0)]},
        levels={"byte frequencies": 2.97},
        top=6.0,
    )
    (axes,) = figure.axes
    drawn = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert drawn[:2] == [[(1, 5.4), (2, 5.0)], curves["ours"]]
    assert drawn[3] == curves["theirs"]
    assert set(axes.lines[-1].get_ydata()) == {2.97}
    assert axes.get_ylim()[1] == 6.0
    assert legend_names(figure) == [*curves, "byte frequencies"]
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="validation must not be empty"):
        plots.plot_losses({})
