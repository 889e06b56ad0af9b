"""Real text that every machine has: the source of Python's own standard library, as bytes."""

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Installed packages are not the standard library; the tests, where a distribution ships them,
# are several times the library itself and full of tables of literals.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
VALIDATION_SHARE = 0.1
BYTE_VALUES = 256


@dataclass(frozen=True)
class Corpus:
    """Bytes of source files, split by file into a training and a validation part."""

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    source: str

    def summary(self) -> dict:
        """Sizes of the two parts, for the report."""
        return {
            "source": self.source,
            "train_files": len(self.train_files),
            "validation_files": len(self.validation_files),
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
        }


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the file's name alone, so equal on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def load_corpus(root: Path | None = None, max_bytes: int = 6_000_000) -> Corpus:
    """Read ``*.py`` below ``root`` up to ``max_bytes`` and split it by file.

    A file's place in the order and its side of the split are functions of its relative path, so two
    machines with the same Python see the same data, and no file is on both sides.

    Raises:
        FileNotFoundError: if ``root`` has no Python source, as in an installation that ships its
            standard library compiled or zipped.
    """
    root = standard_library() if root is None else Path(root)
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if path.is_file() and not EXCLUDED_DIRECTORIES & set(path.relative_to(root).parts[:-1])
    ]
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    files: dict[str, list[str]] = {"train": [], "validation": []}
    # Validation files have the smallest positions; the two sides are filled separately, so that the
    # size cap leaves the proportions alone.
    caps = {
        "validation": int(max_bytes * VALIDATION_SHARE),
        "train": max_bytes - int(max_bytes * VALIDATION_SHARE),
    }
    for name in sorted(names, key=lambda name: (_position(name), name)):
        side = "validation" if _position(name) < VALIDATION_SHARE else "train"
        if caps[side] <= 0:
            continue
        try:
            content = (root / name).read_bytes()[: caps[side]]
        except OSError:
            continue
        if content:
            parts[side].append(content)
            files[side].append(name)
            caps[side] -= len(content)
    if not parts["train"] or not parts["validation"]:
        raise FileNotFoundError(
            f"found {len(files['train'])} training and {len(files['validation'])} validation "
            f"files (*.py) below {root}; the demo needs both. Run it with a Python that ships its "
            "standard library as source."
        )
    return Corpus(
        train=_as_bytes(b"\n".join(parts["train"])),
        validation=_as_bytes(b"\n".join(parts["validation"])),
        train_files=tuple(files["train"]),
        validation_files=tuple(files["validation"]),
        source=f"Python standard library, {len(names)} source files",
    )


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unigram_entropy(corpus: Corpus) -> float:
    """Nats per byte of the validation part, coded by the byte frequencies of the training part.

    What a model reaches that looks at no context at all.
    """
    counts = torch.bincount(corpus.train.long(), minlength=BYTE_VALUES).double() + 1
    return float(-(counts / counts.sum()).log()[corpus.validation.long()].mean())


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


def sample_batch(data: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(batch, length + 1)`` bytes at random offsets, as int64; deterministic by the generator."""
    if data.numel() <= length + 1:
        raise ValueError(
            f"data must hold more than length + 1 = {length + 1} bytes, got {data.numel()}; use "
            "more text or a shorter length"
        )
    starts = torch.randint(data.numel() - length - 1, (batch,), generator=generator)
    return data[starts[:, None] + torch.arange(length + 1)].long()


def fixed_windows(data: Tensor, windows: int, length: int) -> Tensor:
    """``(windows, length + 1)`` bytes, evenly spread over ``data``: always the same ones."""
    if data.numel() <= length + 1:
        raise ValueError(
            f"data must hold more than length + 1 = {length + 1} bytes, got {data.numel()}; use "
            "more text or a shorter length"
        )
    last = data.numel() - length - 1
    windows = max(1, min(windows, math.ceil(last / length)))
    starts = torch.linspace(0, last, windows).long()
    return data[starts[:, None] + torch.arange(length + 1)].long()
