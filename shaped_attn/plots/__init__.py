"""Figures: token covariance over depth (arXiv 2306.17759), token kernels (2302.10322), losses.

Every function returns a `matplotlib.figure.Figure`; `save` writes one to a file, `svg` puts one
into a page. Nothing here uses pyplot or changes a global setting, so that it works without a
display and beside other figures.
"""

from .covariance import plot_covariance, plot_densities
from .fidelity import plot_centred_error
from .losses import plot_losses
from .rank_collapse import plot_rank_collapse, softmax_factor, uncentered_factor
from .stopping_times import plot_stopping_times
from .style import SUFFIXES, save, svg
from .token_kernels import plot_token_kernels

__all__ = [
    "SUFFIXES",
    "plot_centred_error",
    "plot_covariance",
    "plot_densities",
    "plot_losses",
    "plot_rank_collapse",
    "plot_stopping_times",
    "plot_token_kernels",
    "save",
    "softmax_factor",
    "svg",
    "uncentered_factor",
]
