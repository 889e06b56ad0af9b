"""Generation of text, one token at a time, from keys and values that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..checks import check_int, check_number, check_positive, check_size
from .cache import KeyValueCache


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
        raise ValueError(
            "sequences must be at least one Tensor of shape (T,) with at least one token, got "
            f"shapes {[tuple(x.shape) for x in sequences]}. "
            "Leave empty ones out, or begin each with a token of its own."
        )
    longest = max(map(len, sequences))
    tokens = sequences[0].new_full((len(sequences), longest), pad_token)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[longest - len(sequence) :] = sequence
    starts = [longest - len(sequence) for sequence in sequences]
    return tokens, torch.tensor(starts, device=tokens.device)


class GenerationMixin:
    """`generate`, for a causal model with a ``config`` whose forward takes a `KeyValueCache`."""

    @torch.no_grad()
    def generate(
        self,
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
        """Continue sequences token by token, each computed once with a `KeyValueCache`.

        Every method can, and what it gives is what the model without a cache gives, up to rounding.
        No gradient is kept.

        Args:
            tokens: (B, T) integers, T at least 1: the prompts. Shorter ones have padding in front;
                `pad_left` makes ``tokens`` and ``key_start`` of prompts of different lengths.
            max_new_tokens: how many to add to each. Learned positions limit T + max_new_tokens to
                ``max_length``.
            temperature: 0.0, the default, takes the most likely token, of equal ones the first.
                Otherwise tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k most likely tokens alone. Default None: from all.
            top_p: draw from the fewest most likely tokens (of the k) whose probabilities add up to
                at least p, above 0 and at most 1. Default None: from all.
            key_start: (B,) int, first token of each prompt that is not padding. Default None: no
                padding.
            end_token: after it a sequence is filled with it, and when all have it no further tokens
                are computed. Default None: none ends a sequence.
            generator: source of the draws, on the device of the model; equal states of it give
                equal tokens. Default None: torch's global one.

        Returns:
            (B, T + n) of the dtype of ``tokens``, the prompts in front; n is ``max_new_tokens``, or
            less if all sequences have ended.

        Raises:
            TypeError, ValueError: a model without head "causal_lm", an argument out of its range,
                ``top_k``, ``top_p`` or ``generator`` at temperature 0, logits that are not finite;
                and as ``forward``.
        """
        max_new_tokens = check_size("max_new_tokens", max_new_tokens)
        _check_prompt(self.config, tokens, max_new_tokens, key_start)
        _check_sampling(self.config.vocab_size, temperature, top_k, top_p, generator)
        if end_token is not None:
            end_token = check_int("end_token", end_token, 0, self.config.vocab_size - 1)
        batch, length = tokens.shape
        # The last token is not read.
        cache = KeyValueCache(length + max_new_tokens - 1, key_start=key_start)
        is_done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        found, read = [tokens], tokens
        for _ in range(max_new_tokens):
            logits = self(read, cache=cache).logits[:, -1]
            if not logits.isfinite().all():
                raise ValueError(
                    f"model must give finite logits, got others for token {cache.length}. "
                    "Look at its weights: training may have diverged."
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
    config: Any, tokens: Tensor, max_new_tokens: int, key_start: Tensor | None
) -> None:
    if config.head != "causal_lm":
        raise ValueError(
            'generate needs a model with head="causal_lm", which predicts the next token, got '
            f"head={config.head!r}. Build or load one."
        )
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or 0 in tokens.shape:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"tokens must have shape (B, T) with at least one token to continue, got {got}. "
            "Begin with a token such as a line break; one sequence is tokens[None]."
        )
    length = tokens.shape[1]
    if config.positions == "learned" and length + max_new_tokens > config.max_length:
        raise ValueError(
            f"tokens and max_new_tokens must together be at most max_length = {config.max_length} "
            f'for positions="learned", got {length} + {max_new_tokens}. '
            "Cut the prompt in front, or ask for fewer tokens."
        )
    if key_start is None:
        return
    if not isinstance(key_start, Tensor) or key_start.shape != tokens.shape[:1]:
        got = tuple(key_start.shape) if isinstance(key_start, Tensor) else type(key_start).__name__
        raise ValueError(
            f"key_start must be a Tensor of shape (B,) = ({len(tokens)},), got {got}. "
            "pad_left returns it."
        )
    if ((key_start < 0) | (key_start >= length)).any():
        raise ValueError(
            f"key_start must be from 0 to T - 1 = {length - 1}, which leaves each prompt a token, "
            f"got {key_start.tolist()}. pad_left returns it."
        )


def _check_sampling(
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: Generator | None,
) -> None:
    temperature = check_number("temperature", temperature, low=0.0)
    for name, value in (("top_k", top_k), ("top_p", top_p), ("generator", generator)):
        if value is not None and temperature == 0.0:
            raise ValueError(
                f"{name} has no effect at temperature 0, which takes the most likely token, got "
                f"{value}. Leave it out, or pass a temperature such as 1.0."
            )
    if top_k is not None:
        check_int("top_k", top_k, 1, vocab_size)
    if top_p is not None:
        check_positive("top_p", top_p, high=1.0)
