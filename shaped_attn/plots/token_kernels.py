"""Correlations of all tokens with all others, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ..checks import check_int, check_not_empty, fail
from ..sde.token_kernel import Propagation
from . import style
from .samples import array, check_named


def plot_token_kernels(
    propagations: Mapping[str, Propagation],
    layers: Sequence[int],
    *,
    title: str | None = None,
) -> Figure:
    """Draw the correlations of the tokens after some layers as heat maps, one row per method.

    All share one colour bar, from 0 to 1, or from -1 if a correlation is negative. Token 1 is in
    the upper left corner.

    Args:
        propagations: what to draw, by the name to show, as
            `shaped_attn.sde.token_kernel.propagate` returns it.
        layers: numbers of layers, one column for each; 0 is the input.
        title: stands above the figure. Default none.

    Raises:
        TypeError, ValueError: there is no propagation or no layer, or a propagation has fewer
            layers.

    References:
        He et al., Deep Transformers without Shortcuts, arXiv 2302.10322.
    """
    _check_propagations(propagations, layers)
    shown = {
        name: array(propagation.correlations()[list(layers)])
        for name, propagation in propagations.items()
    }
    # Products of kernels that are positive may round to a little below 0.
    low = 0 if min(float(maps.min()) for maps in shown.values()) > -1e-9 else -1
    figure = Figure(
        figsize=(2.1 * len(layers) + 1.4, 2.1 * len(shown) + 0.4 + (0.3 if title else 0)),
        layout="compressed",  # constrained, for maps that stay square
        facecolor="white",
    )
    grid = figure.subplots(len(shown), len(layers), squeeze=False)
    for row, (name, maps) in zip(grid, shown.items(), strict=True):
        for axes, values in zip(row, maps, strict=True):
            image = axes.imshow(values, cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(name, fontsize=11, color=style.INK)
    for axes, layer in zip(grid[0], layers, strict=True):
        axes.set_title("input" if layer == 0 else f"layer {layer}", fontsize=11, color=style.INK)
    style.colorbar(
        figure,
        image,
        grid.ravel().tolist(),
        "correlation of two tokens",
        shrink=min(1.0, 1.6 / len(shown)),
    )
    style.entitle(figure, title)
    return figure


def _check_propagations(propagations: Mapping[str, Propagation], layers: Sequence[int]) -> None:
    makers = "shaped_attn.sde.token_kernel.propagate returns one."
    check_named("propagations", propagations, Propagation, makers)
    for layer in check_not_empty("layers", layers):
        check_int("layers", layer, low=0)
    for name, propagation in propagations.items():
        if max(layers) > propagation.layers:
            rule = f"must be at most {propagation.layers}, the layers of propagations[{name!r}]"
            fail(ValueError, "layers", rule, max(layers), "Give more priors to propagate.")
