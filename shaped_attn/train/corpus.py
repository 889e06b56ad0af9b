"""Text as bytes: a training and a validation part, their entropies, and windows of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import fail

BYTE_VALUES = 256


@dataclass(frozen=True)
class Corpus:
    """Bytes of documents, split by document into a training and a validation part.

    Attributes:
        train, validation: (bytes,) uint8.
        train_files, validation_files: names of the files that the parts are made of; none if they
            are not made of files.
        source: where the text comes from, in words.

    Raises:
        TypeError, ValueError: a part is not a (bytes,) Tensor of uint8, which holds nothing but
            ids of the vocabulary.
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        """Check the two parts: a token outside the vocabulary is found here, not on a device."""
        for name in ("train", "validation"):
            part = getattr(self, name)
            rule = f"must be a (bytes,) Tensor of uint8, of token ids from 0 to {BYTE_VALUES - 1}"
            if not isinstance(part, Tensor):
                fail(TypeError, name, rule, type(part).__name__, "Use as_bytes.")
            if part.dtype != torch.uint8:
                got = f"{part.dtype}"
                if part.numel():
                    got += f" from {part.min()} to {part.max()}"
                fail(TypeError, name, rule, got, "Encode the text as bytes, with as_bytes.")
            if part.ndim != 1:
                fail(ValueError, name, rule, f"shape {tuple(part.shape)}", "Flatten it.")

    def summary(self) -> dict:
        """Fingerprint and sizes of the two parts, for the report."""
        return {
            "source": self.source,
            "sha256": self.digest(),
            "train_files": len(self.train_files),
            "validation_files": len(self.validation_files),
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
        }

    def digest(self) -> str:
        """Return a fingerprint: equal for equal bytes in both parts, and only then."""
        found = hashlib.sha256()
        for part in (self.train, self.validation):
            found.update(f"{part.numel()}:".encode())
            found.update(part.numpy())
        return found.hexdigest()


def as_bytes(content: bytes) -> Tensor:
    """Return the bytes as a uint8 tensor."""
    if not content:  # which frombuffer refuses
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unigram_entropy(corpus: Corpus, coded: Tensor | None = None) -> float:
    """Nats per byte of text that is coded by the byte frequencies of the training part.

    What a model reaches that looks at no context at all. With n_b the number of bytes b in the
    training part, and m_b in the coded text of m bytes:

        - sum_b m_b / m  log( (n_b + 1) / sum_c (n_c + 1) )

    Args:
        corpus: the text.
        coded: integer bytes, of any shape. Default: the validation part.
    """
    coded = corpus.validation if coded is None else coded.flatten()
    train, found = (
        torch.bincount(part, minlength=BYTE_VALUES).double() for part in (corpus.train, coded)
    )
    probability = (train + 1) / (train + 1).sum()
    return float(-(found * probability.log()).sum() / found.sum())


def bigram_entropy(corpus: Corpus) -> float:
    """Nats per byte of the validation part, coded by the training part's byte pairs.

    What a model reaches that looks at the current byte alone: without attention a decoder cannot do
    better, so what a loss is below this line is the work of attention.
    """
    train = corpus.train.long()
    pairs = torch.bincount(train[:-1] * BYTE_VALUES + train[1:], minlength=BYTE_VALUES**2)
    unigram = torch.bincount(train, minlength=BYTE_VALUES).double() + 1
    # Pairs never seen fall back on the byte frequencies, with the weight of one observation.
    counts = pairs.view(BYTE_VALUES, BYTE_VALUES).double() + unigram / unigram.sum()
    validation = corpus.validation.long()
    log_probability = (counts / counts.sum(1, keepdim=True)).log()
    return float(-log_probability[validation[:-1], validation[1:]].mean())


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of a step's batch, a function of seed and step alone.

    A run that is resumed at any step draws what it would have drawn, without a replay.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_batch(data: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(batch, length + 1)`` bytes at random offsets, as int64; deterministic by the generator."""
    _check_enough(data, length)
    starts = torch.randint(data.numel() - length - 1, (batch,), generator=generator)
    return data[starts[:, None] + torch.arange(length + 1)].long()


def fixed_windows(data: Tensor, windows: int, length: int) -> Tensor:
    """``(windows, length + 1)`` bytes, evenly spread over ``data``: always the same ones."""
    _check_enough(data, length)
    last = data.numel() - length - 1
    windows = max(1, min(windows, math.ceil(last / length)))
    starts = torch.linspace(0, last, windows).long()
    return data[starts[:, None] + torch.arange(length + 1)].long()


def _check_enough(data: Tensor, length: int) -> None:
    if data.numel() <= length + 1:
        raise ValueError(
            f"data must hold more than length + 1 = {length + 1} bytes, got {data.numel()}; use "
            "more text or a shorter length"
        )
