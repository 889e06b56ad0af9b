"""Generation of text, one token at a time, from keys and values that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..checks import check_number, check_positive, check_size, fail

if TYPE_CHECKING:
    from .transformer import ShapedTransformer


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
            fail(
                ValueError,
                "cache",
                "is written in place and needs torch.no_grad()",
                "a call with gradients",
                "Call the model under torch.no_grad(), or without a cache.",
            )
        if stop > cache.capacity:
            fail(
                ValueError,
                "cache",
                f"must have room for {stop} tokens, {start} of them read before",
                f"capacity {cache.capacity}",
                "Make it with a larger capacity.",
            )
        if self._parts is None:
            self._parts = tuple(
                x.new_empty(*x.shape[:2], cache.capacity, x.shape[3]) for x in (k, v)
            )
        for kept, new in zip(self._parts, (k, v), strict=True):
            if kept.dtype != new.dtype or kept.device != new.device:
                fail(
                    TypeError,
                    "cache",
                    f"must be of {new.dtype} on {new.device}, which this call computes",
                    f"{kept.dtype} on {kept.device} from calls before",
                    "Make a new cache for another dtype, autocast or device.",
                )
            if (*kept.shape[:2], kept.shape[3]) != (*new.shape[:2], new.shape[3]):
                fail(
                    ValueError,
                    "cache",
                    f"must be of (B, heads, D) = {(*new.shape[:2], new.shape[3])}, as this call",
                    f"{(*kept.shape[:2], kept.shape[3])} from calls before",
                    "Make a new cache for another batch or model.",
                )
            kept[:, :, start:stop] = new
        keys, values = self._parts
        return keys[:, :, :stop], values[:, :, :stop]


def pad_left(sequences: Sequence[Tensor], pad_token: int = 0) -> tuple[Tensor, Tensor]:
    """Put sequences of different lengths into one batch, with padding in front of the shorter.

    Args:
        sequences: at least one Tensor (T,) of integers, all on one device.
        pad_token: what fills the front, any token. Default 0.

    Returns:
        ``tokens`` (B, longest T) and ``key_start`` (B,), as `ShapedTransformer` takes them.

    Raises:
        ValueError: there is no sequence, or one has no tokens or more than one dimension.
    """
    if len(sequences) == 0 or any(x.ndim != 1 or len(x) == 0 for x in sequences):
        fail(
            ValueError,
            "sequences",
            "must be at least one Tensor of shape (T,) with at least one token",
            f"shapes {[tuple(x.shape) for x in sequences]}",
            "Leave empty ones out, or begin each with a token of its own.",
        )
    longest = max(map(len, sequences))
    tokens = sequences[0].new_full((len(sequences), longest), pad_token)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[longest - len(sequence) :] = sequence
    starts = [longest - len(sequence) for sequence in sequences]
    return tokens, torch.tensor(starts, device=tokens.device)


@torch.no_grad()
def generate(
    model: ShapedTransformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key_start: Tensor | None = None,
    end_token: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Continue sequences; `ShapedTransformer.generate` describes it."""
    max_new_tokens = check_size("max_new_tokens", max_new_tokens)
    _check_prompt(model, tokens, max_new_tokens, key_start)
    _check_sampling(model, temperature, top_k, top_p, generator)
    if end_token is not None and (
        check_number("end_token", end_token, 0, model.config.vocab_size - 1) != int(end_token)
    ):
        fail(TypeError, "end_token", "must be an int", end_token, "Pass the id of a token.")
    batch, length = tokens.shape
    # The last token is not read.
    cache = KeyValueCache(length + max_new_tokens - 1, key_start=key_start)
    is_done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    found, read = [tokens], tokens
    for _ in range(max_new_tokens):
        logits = model(read, cache=cache).logits[:, -1]
        if not logits.isfinite().all():
            fail(
                ValueError,
                "model",
                "must give finite logits",
                f"others for token {cache.length}",
                "Look at its weights: training may have diverged.",
            )
        new = sample(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
        if end_token is not None:
            new = new.masked_fill(is_done, end_token)
            is_done |= new == end_token
        read = new[:, None]
        found.append(read)
        if end_token is not None and is_done.all():
            break
    return torch.cat(found, dim=1)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: Generator | None,
) -> Tensor:
    """Return a token (B,) for each row of ``logits`` (B, vocab_size), which are finite."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest is 0, so that a small temperature overflows to -inf alone; one of 0 gives NaN.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits = logits[:, :top_k]
    shares = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)
    chosen = torch.multinomial(shares, 1, generator=generator)  # in proportion to them
    return order.gather(-1, chosen)[:, 0]


def _check_prompt(
    model: ShapedTransformer, tokens: Tensor, max_new_tokens: int, key_start: Tensor | None
) -> None:
    config = model.config
    if config.head != "causal_lm":
        fail(
            ValueError,
            "generate",
            'needs a model with head="causal_lm", which predicts the next token',
            f"head={config.head!r}",
            "Build or load one.",
        )
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or 0 in tokens.shape:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        fail(
            ValueError,
            "tokens",
            "must have shape (B, T) with at least one token to continue",
            got,
            "Begin with a token such as a line break; one sequence is tokens[None].",
        )
    length = tokens.shape[1]
    if config.positions == "learned" and length + max_new_tokens > config.max_length:
        fail(
            ValueError,
            "tokens and max_new_tokens",
            f'must together be at most max_length = {config.max_length} for positions="learned"',
            f"{length} + {max_new_tokens}",
            "Cut the prompt in front, or ask for fewer tokens.",
        )
    if key_start is None:
        return
    if not isinstance(key_start, Tensor) or key_start.shape != tokens.shape[:1]:
        got = tuple(key_start.shape) if isinstance(key_start, Tensor) else type(key_start).__name__
        rule = f"must be a Tensor of shape (B,) = ({len(tokens)},)"
        fail(ValueError, "key_start", rule, got, "pad_left returns it.")
    if ((key_start < 0) | (key_start >= length)).any():
        fail(
            ValueError,
            "key_start",
            f"must be from 0 to T - 1 = {length - 1}, which leaves each prompt a token",
            key_start.tolist(),
            "pad_left returns it.",
        )


def _check_sampling(
    model: ShapedTransformer,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: Generator | None,
) -> None:
    temperature = check_number("temperature", temperature, low=0.0)
    for name, value in (("top_k", top_k), ("top_p", top_p), ("generator", generator)):
        if value is not None and temperature == 0.0:
            fail(
                ValueError,
                name,
                "has no effect at temperature 0, which takes the most likely token",
                value,
                "Leave it out, or pass a temperature such as 1.0.",
            )
    if top_k is not None and check_size("top_k", top_k) > model.config.vocab_size:
        rule = f"must be at most vocab_size = {model.config.vocab_size}"
        fail(ValueError, "top_k", rule, top_k, "Leave it out to take all tokens.")
    if top_p is not None and check_positive("top_p", top_p) > 1.0:
        fail(ValueError, "top_p", "must be at most 1", top_p, "Leave it out to take all tokens.")
