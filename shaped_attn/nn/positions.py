"""Rotary positions: queries and keys are turned by angles proportional to their position."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (T, head_dim / 2) or broadcastable to (B, heads, T, head_dim / 2)."""


def rotary_table(
    length: int,
    head_dim: int,
    base: float = 10000.0,
    *,
    start: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Return cosine and sine of ``position * base^(-2 d / head_dim)``, each (length, head_dim / 2).

    Position runs from ``start`` to start + length - 1 and d from 0 to head_dim / 2 - 1. They are
    computed and returned in float32, or in float64 for that ``dtype``.

    References:
        Su et al., RoFormer, arXiv 2104.09864.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, device=device, dtype=dtype) / half)
    angle = torch.arange(start, start + length, device=device, dtype=dtype)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (d, d + D/2) of x (B, heads, T, D) by the angles of ``rotary``.

    Raises:
        ValueError: ``rotary`` is for another head dimension D.
    """
    cos, sin = rotary
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"rotary must have half as many angles as the head dimension, {x.shape[-1]}, got "
            f"{cos.shape[-1]}. Make it with rotary_table(T, head_dim), for an even head dimension."
        )
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)
