"""What tests of the covariance SDE share: covariances, statistics with their bounds, messages."""

import itertools
import math
import re
import statistics

import torch

NORMAL = statistics.NormalDist()


def generic(tokens, seed=0, dtype=torch.float64):
    """Not equicorrelated, unequal diagonal: the V of the reference's one-step tables."""
    generator = seeded(seed)
    g = torch.randn(tokens, 2 * tokens, generator=generator, dtype=torch.float64)
    h = torch.randn(2 * tokens, generator=generator, dtype=torch.float64)
    x = g + 0.6 * h
    return (x @ x.mT / (2 * tokens)).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stop_at(call):
    """A ``stop`` that ends a simulation when it is asked for the ``call``-th time, from 0."""
    calls = itertools.count()
    return lambda: next(calls) >= call


def upper(x):
    """The entries on and above the diagonal of (..., m, m)."""
    i, j = torch.triu_indices(*x.shape[-2:])
    return x[..., i, j]


def form(sigma):
    """Sigma of those entries as a matrix."""
    i, j = torch.triu_indices(*sigma.shape[:2])
    return sigma[i, j][:, i, j]


def z_bound(count, level=1e-5):
    """What the largest of ``count`` z-scores exceeds with a probability below ``level``."""
    return NORMAL.inv_cdf(1 - level / (2 * count))


def mean_z(values, expected):
    """z-scores of the mean of (paths, m, m), and the largest standard error."""
    x = upper(values)
    error = x.std(0) / math.sqrt(len(x))
    return ((x.mean(0) - upper(expected)) / error).abs().max().item(), error.max().item()


def covariance_z(moves, sigma):
    """z-scores of the covariances of (paths, m, m) against Sigma, for normal moves.

    The variance of the product of two centred normal variables is S_aa S_bb + S_ab^2.
    """
    x = upper(moves)
    found = torch.cov(x.mT)
    s = form(sigma)
    size = s.diagonal()
    error = ((size[:, None] * size + s.square()) / (len(x) - 1)).sqrt()
    return upper((found - s) / error).abs().max().item()


def second_moment_z(values, sigma):
    """z-scores of the mean of products of entries of centred (paths, m, m) against Sigma."""
    products = upper(values)
    return mean_z(products[:, :, None] * products[:, None, :], form(sigma))[0]


def ks_bound(count, *paths, level=1e-5):
    """What the largest of ``count`` KS statistics exceeds with a probability below ``level``."""
    return math.sqrt(-math.log(level / count / 2) / 2 * sum(1 / n for n in paths))


def check_message(message, parts):
    """That an error has these parts in their order, given as argument ... rule ... value ..."""
    pattern = ".*".join(re.escape(part) for part in parts.split(" ... "))
    assert re.match(pattern, message), message
    # One wording: argument rule, got value. Remedy.
    assert re.fullmatch(r".+, got .+\. \S.+\.", message), message
