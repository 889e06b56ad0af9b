"""Deprecated name of `shaped_attn.sde.token_kernel`."""

import warnings

from .sde.token_kernel import Propagation, input_kernel, propagate

__all__ = ["Propagation", "input_kernel", "propagate"]

warnings.warn(
    "shaped_attn.spa is now shaped_attn.sde.token_kernel. Import from there.",
    DeprecationWarning,
    stacklevel=2,
)
