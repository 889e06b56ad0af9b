"""Zero columns for head dimensions that are no multiple of what the kernels load at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .configs import padded_width


def pad_columns(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return `x` with zero columns up to `padded_width`; `x` itself if it has that width."""
    missing = 0 if x is None else padded_width(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def trim_columns(x: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """Return the first `width` columns, contiguous; `x` itself if it has no more."""
    return x if x is None or x.shape[-1] == width else x[..., :width].contiguous()
