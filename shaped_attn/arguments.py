"""The arguments that every implementation of shaped attention shares, after validation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gain = float | Tensor


class Gains(NamedTuple):
    """Weights of the terms of shaped attention: each a float, or a Tensor of shape () or (H,)."""

    identity: Gain = 1.0
    softmax: Gain = 1.0
    center: Gain = 1.0
    skip: Gain = 1.0
    branch: Gain = 1.0
    scale: Gain = 1.0


def per_head(gain: Gain, dtype: torch.dtype) -> Gain:
    """Return a gain that multiplies (B, H, T, D): a float as it is, a Tensor as (H or 1, 1, 1)."""
    if isinstance(gain, Tensor):
        return gain.to(dtype).reshape(-1, 1, 1)
    return gain


def is_zero(gain: Gain) -> bool:
    """Whether a gain is fixed at zero, so that its term need not be computed."""
    return not isinstance(gain, Tensor) and gain == 0.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all arithmetic and of the lse: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def output_dtype(q: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of the output: the residual's where there is one, else that of q."""
    return q.dtype if residual is None else residual.dtype
