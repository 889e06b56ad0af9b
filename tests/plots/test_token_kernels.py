"""The figure of token kernels: that it shows the numbers it should."""

import numpy as np
import pytest
import torch

from shaped_attn import plots
from shaped_attn.priors import ESPA, USPA
from shaped_attn.sde.token_kernel import input_kernel, propagate

TOKENS, LAYERS = 6, 5


@pytest.fixture
def propagations():
    eye = torch.eye(TOKENS)
    return {
        "E-SPA": propagate(eye, ESPA.schedule(LAYERS)),
        "U-SPA": propagate(eye, USPA.schedule(LAYERS)),
        "plain softmax": propagate(eye, [None] * LAYERS),
    }


def maps(figure, rows, columns):
    """The axes with an image, as a grid, and the rest."""
    axes = [axes for axes in figure.axes if axes.images]
    assert len(axes) == rows * columns
    return np.array(axes).reshape(rows, columns), [a for a in figure.axes if not a.images]


def test_each_map_has_the_correlations_of_its_layer(propagations):
    layers = [0, 1, 5]
    figure = plots.plot_token_kernels(propagations, layers, title="A title")
    grid, (bar,) = maps(figure, 3, 3)
    for row, (name, propagation) in zip(grid, propagations.items(), strict=True):
        kernels = propagation.kernels.numpy()
        for axes, layer in zip(row, layers, strict=True):
            size = np.sqrt(np.diagonal(kernels[layer]))
            (image,) = axes.images
            np.testing.assert_allclose(
                image.get_array(), kernels[layer] / size / size[:, None], rtol=1e-12, atol=1e-15
            )
            assert image.get_clim() == (0, 1)
            assert image.origin == "upper"  # token 1 in the upper left corner
        assert row[0].get_ylabel() == name
    assert [axes.get_title() for axes in grid[0]] == ["input", "layer 1", "layer 5"]
    assert all(not axes.get_title() for axes in grid[1:].flat)
    assert bar.get_ylabel() == "correlation of two tokens"
    assert figure.get_suptitle() == "A title"
    figure.draw_without_rendering()


def test_maps_are_square_and_names_stand_beside_them(propagations):
    propagations["E-SPA, repeated tokens"] = propagations["E-SPA"]
    figure = plots.plot_token_kernels(propagations, [1, 2])
    figure.draw_without_rendering()
    grid, _ = maps(figure, 4, 2)
    for axes in grid.flat:
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=0.01)
    for axes in grid[:, 0]:
        label, box = axes.yaxis.label.get_window_extent(), axes.get_window_extent()
        assert label.x0 >= 0 and label.x1 <= box.x0
        assert box.y0 <= label.y0 and label.y1 <= box.y1


def test_the_colour_bar_reaches_below_zero_for_negative_correlations(propagations):
    kernel = input_kernel(
        torch.arange(TOKENS), positions="sinusoidal", position_weight=1.0, width=2
    )
    assert kernel.min() < -0.5
    propagations["sinusoids"] = propagate(kernel, ESPA.schedule(1))
    figure = plots.plot_token_kernels(propagations, [0])
    grid, _ = maps(figure, 4, 1)
    assert {axes.images[0].get_clim() for axes in grid.flat} == {(-1, 1)}
    figure.draw_without_rendering()


def test_one_map_can_be_drawn(propagations):
    figure = plots.plot_token_kernels({"one": propagations["E-SPA"]}, [LAYERS])
    maps(figure, 1, 1)
    figure.draw_without_rendering()


def test_arguments(propagations):
    for arguments, error, message in (
        (([propagations["E-SPA"]], [1]), TypeError, "propagations must be a Mapping, got list"),
        (({}, [1]), ValueError, "propagations must not be empty"),
        ((propagations, []), ValueError, "layers must not be empty"),
        ((propagations, [1, -1]), ValueError, "layers must be at least 0"),
        ((propagations, [1.0]), TypeError, "layers must be an int"),
        (
            (propagations, [1, 6]),
            ValueError,
            r"layers must be at most 5, the layers of propagations\['E-SPA'\], got 6",
        ),
        (
            ({"a": propagations["E-SPA"].kernels}, [1]),
            TypeError,
            r"propagations\['a'\] must be a Propagation, got Tensor",
        ),
    ):
        with pytest.raises(error, match=message):
            plots.plot_token_kernels(*arguments)
