"""Samples to draw, and what is found in a figure."""

import math

import torch
from matplotlib.container import ErrorbarContainer

from shaped_attn.sde.sample import CovarianceSample


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


def line_named(axes, name):
    (line,) = (line for line in axes.lines if line.get_label() == name)
    return line


def errorbars(axes):
    return {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def legend_names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]
