"""Host side of every launch: interpreter switch, architecture, index width, tensor layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import triton

from .configs import TileConfig

if TYPE_CHECKING:
    from ..visibility import Visibility

_INT32_MAX = 2**31 - 1


def is_interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (`TRITON_INTERPRET=1` at import)."""
    from . import primitives

    return not isinstance(primitives.cast, triton.JITFunction)


@functools.lru_cache
def _cuda_architecture(device_index: int) -> int | str:
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return 10 * properties.major + properties.minor


_assumed_architecture: ContextVar[int | str | None] = ContextVar("architecture", default=None)


@contextmanager
def assume_architecture(arch: int | str) -> Iterator[None]:
    """Choose configurations as on `arch`, whatever device the tensors are on."""
    token = _assumed_architecture.set(arch)
    try:
        yield
    finally:
        _assumed_architecture.reset(token)


def architecture(tensor: torch.Tensor) -> int | str:
    """Key of the configuration tables: 90 for sm_90, "gfx942", or "interpreter"."""
    assumed = _assumed_architecture.get()
    if assumed is not None:
        return assumed
    if is_interpreted():
        return "interpreter"
    return _cuda_architecture(tensor.device.index)


def dot_precision(dtype: torch.dtype, arch: int | str, head_dim: int, value_dim: int) -> str:
    """Matrix product precision: float32 operands never fall to plain TF32.

    "tf32x3" emulates float32 on NVIDIA's tensor cores. Its split operands do not fit the register
    file for the widest heads, and other back ends lack it: those take "ieee". For 16-bit operands
    the value has no effect.
    """
    has_room = max(head_dim, value_dim) <= 128
    return "tf32x3" if dtype == torch.float32 and isinstance(arch, int) and has_room else "ieee"


def needs_wide_index(config: TileConfig, *tensors: torch.Tensor | None) -> bool:
    """Whether an offset inside one tile may pass 2**31 - 1 elements.

    Tile origins are always computed in int64; only offsets inside a tile may stay int32.
    """
    rows = max(config.block_t, config.block_s, config.sum_block)
    for tensor in tensors:
        if tensor is None:
            continue
        extent = rows * abs(tensor.stride(-2)) + max(rows, 256) * abs(tensor.stride(-1))
        if extent > _INT32_MAX:
            return True
    return False


def launch_options(config: TileConfig) -> dict[str, int | bool]:
    """Options of one launch; FP fusion is pinned because its default changes between releases."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def gain_arguments(
    gains: tuple[float | torch.Tensor, ...],
) -> tuple[tuple[float | torch.Tensor, ...], tuple[int, ...], tuple[bool, ...]]:
    """Split gains into kernel arguments: values, per-head strides, which of them are tensors."""
    is_tensor = tuple(isinstance(gain, torch.Tensor) for gain in gains)
    strides = tuple(
        gain.stride(0) if tensor and gain.ndim == 1 else 0
        for gain, tensor in zip(gains, is_tensor, strict=True)
    )
    return gains, strides, is_tensor


def strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a four-dimensional tensor, zeros for one that is absent."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """View a boolean mask as bytes without copying or expanding it."""
    return None if mask is None else mask.view(torch.uint8)


def diagonal(visibility: Visibility, T: int, S: int) -> int:
    """Row i sees keys below `i + diagonal`; without a causal mask this is past every key.

    Clamped to where it still matters, so that any Python integer is a valid `q_offset`.
    """
    return min(max(visibility.q_offset + 1, -T), S) if visibility.is_causal else S


def clamp_offset(q_offset: int) -> int:
    """`q_offset` as a 32-bit argument; beyond this no key is aligned and no prior has weight."""
    return min(max(q_offset, -(2**30)), 2**30)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one for the launches inside."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
