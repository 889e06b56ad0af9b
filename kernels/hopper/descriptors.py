"""Gluon's tensor descriptors, made without its checks: a call's plan has made them once."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


class Describe:
    """Makes the descriptors of tensors of one signature, None for None.

    blocks: the block shape of each tensor, of the tensor's rank.
    """

    def __init__(self, *blocks: list[int]) -> None:
        self.blocks = blocks
        self.fields: list[dict | None] = [None] * len(blocks)

    def __call__(self, *tensors: torch.Tensor | None) -> tuple[TensorDescriptor | None, ...]:
        return tuple(
            None if tensor is None else self._describe(i, tensor)
            for i, tensor in enumerate(tensors)
        )

    def _describe(self, i: int, tensor: torch.Tensor) -> TensorDescriptor:
        fields = self.fields[i]
        if fields is None:
            block = self.blocks[i]
            layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
            checked = TensorDescriptor(
                tensor, list(tensor.shape), list(tensor.stride()), block, layout
            )
            self.fields[i] = {**vars(checked), "base": None}
            return checked
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(fields, base=tensor)
        return descriptor
