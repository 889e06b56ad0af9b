"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_size


class KeyValueCache:
    """Keys and values of the tokens that a decoder has read, so that it reads each token once.

    A `ShapedTransformer` that is given a cache reads further tokens of the sequences in it:

        cache = KeyValueCache(capacity=128)
        with torch.no_grad():
            logits = model(tokens[:, :100], cache=cache).logits
            logits = model(tokens[:, 100:], cache=cache).logits  # of these tokens alone

    The logits are those of the whole sequence without a cache, up to rounding. That is so for every
    method: row i of a causal attention matrix, of U-SPA and E-SPA too (the rows of a Cholesky
    factor), depends on tokens up to i alone, and the centre is a mean over the keys that are here.

    Args:
        capacity: most tokens of a sequence, padding included; their memory is taken at once.
        key_start: (B,) int, first token of each sequence that is not padding. Default None: no
            padding. Calls of the model with the cache take it from here.

    Attributes:
        length: how many tokens of each sequence the model has read.

    Raises:
        TypeError, ValueError: ``capacity`` is not a positive int.
    """

    def __init__(self, capacity: int, *, key_start: Tensor | None = None) -> None:
        self.capacity = check_size("capacity", capacity)
        self.key_start = key_start
        self.length = 0
        self._layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        """Return the part of one layer, for `ShapedAttention`."""
        return self._layers.setdefault(index, LayerCache(self))

    def advance(self, tokens: int) -> None:
        """Count tokens that all layers have read; before that, they write over them again."""
        self.length += tokens


class LayerCache:
    """Keys and values of one layer of a `KeyValueCache`."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._parts: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k (B, Hkv, T, D) and v (B, Hkv, T, Dv); return those of all tokens so far.

        Raises:
            TypeError: they have another dtype than those before.
            ValueError: they are more than there is room for, of another batch or another model
                than those before, or a gradient may be asked for.
        """
        cache = self._cache
        start, stop = cache.length, cache.length + k.shape[2]
        if torch.is_grad_enabled():
            raise ValueError(
                "cache is written in place and needs torch.no_grad(), got a call with gradients. "
                "Call the model under torch.no_grad(), or without a cache."
            )
        if stop > cache.capacity:
            raise ValueError(
                f"cache must have room for {stop} tokens, {start} of them read before, got "
                f"capacity {cache.capacity}. Make it with a larger capacity."
            )
        if self._parts is None:
            self._parts = tuple(
                x.new_empty(*x.shape[:2], cache.capacity, x.shape[3]) for x in (k, v)
            )
        for kept, new in zip(self._parts, (k, v), strict=True):
            if kept.dtype != new.dtype or kept.device != new.device:
                raise TypeError(
                    f"cache must be of {new.dtype} on {new.device}, which this call computes, got "
                    f"{kept.dtype} on {kept.device} from calls before. "
                    "Make a new cache for another dtype, autocast or device."
                )
            if (*kept.shape[:2], kept.shape[3]) != (*new.shape[:2], new.shape[3]):
                raise ValueError(
                    f"cache must be of (B, heads, D) = {(*new.shape[:2], new.shape[3])}, as this "
                    f"call, got {(*kept.shape[:2], kept.shape[3])} from calls before. "
                    "Make a new cache for another batch or model."
                )
            kept[:, :, start:stop] = new
        keys, values = self._parts
        return keys[:, :, :stop], values[:, :, :stop]
