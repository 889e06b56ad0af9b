"""Where text comes from: Python's standard library, a file, a folder, a Hugging Face dataset.

====================== ============================================================================
source                 text
====================== ============================================================================
``stdlib``             the source of this Python's standard library, which every machine has
a file                 its bytes; the last tenth validates
a folder               its text files; a tenth of the files, chosen by their names, validates
a folder that          a dataset, read from there
``save_to_disk`` wrote
``wikitext-103``       WikiText-103, raw, 540 MB (``hf:Salesforce/wikitext:wikitext-103-raw-v1``)
``c4``                 the English part of C4, 300 GB: no more of it is downloaded than is read
``hf:NAME[:CONFIG]``   a dataset of the Hugging Face Hub, or a local folder or script of one
====================== ============================================================================

A dataset's own "validation" split validates; one that has none gives a tenth of its documents.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import fail
from .corpus import Corpus, as_bytes
from .extra import require

STANDARD_LIBRARY = "stdlib"
HUB_PREFIX = "hf:"

# Installed packages are not the standard library; the tests, where a distribution ships them,
# are several times the library itself and full of tables of literals.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
VALIDATION_SHARE = 0.1
VALIDATION_SPLITS = ("validation", "valid", "dev", "test")

_BATCH = 1000  # documents read at a time
_PROBE = 8192  # bytes at the start of a file in which text has no zero byte


class Preset(NamedTuple):
    """A dataset of the Hugging Face Hub.

    Attributes:
        name, config: as in ``datasets.load_dataset``.
        streaming: whether to read it from the network rather than to download all of it first.
        text_column: name of the column with the text.
    """

    name: str
    config: str | None
    streaming: bool
    text_column: str = "text"


PRESETS = {
    "wikitext-103": Preset("Salesforce/wikitext", "wikitext-103-raw-v1", streaming=False),
    "c4": Preset("allenai/c4", "en", streaming=True),
}


def load_corpus(source: str, max_bytes: int, text_column: str = "text") -> Corpus:
    """Read text and split it.

    The split, and what ``max_bytes`` cuts off, depend on the text alone.

    Args:
        source: as in the table at the head of this module.
        max_bytes: most bytes to take; a tenth of them validates.
        text_column: of a dataset, the column with the text. Default "text".

    Raises:
        ValueError: the source is unknown, or a dataset has no such column or no training split.
        OSError: it cannot be read, or has not enough text for both parts.
        ModuleNotFoundError: a dataset needs the package ``datasets``, which is not installed.
    """
    if source == STANDARD_LIBRARY:
        return load_standard_library(max_bytes=max_bytes)
    if source in PRESETS:
        preset = PRESETS[source]
        return _load_hub(preset, max_bytes, f"{source} ({preset.name}, {preset.config})")
    if source.startswith(HUB_PREFIX):
        name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
        preset = Preset(name, config or None, streaming=False, text_column=text_column)
        return _load_hub(preset, max_bytes, source)
    path = Path(source)
    if path.is_file():
        return _load_file(path, max_bytes)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            dataset = require("datasets").load_from_disk(str(path))
            return _split_dataset(dataset, text_column, max_bytes, f"dataset {path.name}")
        return load_folder(path, max_bytes)
    choices = ", ".join((STANDARD_LIBRARY, *PRESETS))
    rule = f"must be a file or folder that exists, one of {choices}, or {HUB_PREFIX}NAME[:CONFIG]"
    remedy = f"Check the path; a dataset of the Hugging Face Hub starts with {HUB_PREFIX}"
    fail(ValueError, "data", rule, repr(source), remedy)


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_standard_library(root: Path | None = None, max_bytes: int = 6_000_000) -> Corpus:
    """Read ``*.py`` below ``root`` up to ``max_bytes`` and split it by file.

    A file's place in the order and its side of the split are functions of its relative path, so two
    machines with the same Python see the same data, and no file is on both sides.

    Raises:
        FileNotFoundError: if ``root`` has no Python source, as in an installation that ships its
            standard library compiled or zipped.
    """
    root = standard_library() if root is None else Path(root)
    names = [
        name
        for name in _file_names(root, lambda folder: folder not in EXCLUDED_DIRECTORIES)
        if name.endswith(".py")
    ]
    source = f"standard library of Python {platform.python_version()}, {len(names)} source files"
    remedy = "Use a Python that ships its standard library as source."
    return _split_files(root, names, max_bytes, source, remedy)


def load_folder(root: Path, max_bytes: int) -> Corpus:
    """Read the text files below ``root`` up to ``max_bytes`` and split them by file.

    Left out are hidden files and folders, and files with a zero byte near their start, which are
    not text. Order and side of a file follow from its relative path.

    Raises:
        FileNotFoundError: there are too few files for both sides.
    """
    names = [
        name
        for name in _file_names(root, lambda folder: not folder.startswith("."))
        if not name.rpartition("/")[2].startswith(".") and _is_text(root / name)
    ]
    remedy = "Add files, or give one file, whose last tenth then validates."
    source = f"folder {root.name}, {len(names)} text files"
    return _split_files(root, names, max_bytes, source, remedy)


def _file_names(root: Path, is_entered: Callable[[str], bool]) -> Iterator[str]:
    """Paths relative to ``root`` of the files in folders whose names, and parents', are entered."""
    for parent, folders, files in os.walk(root):
        # What is not entered may be far larger than the rest.
        folders[:] = [name for name in folders if is_entered(name)]
        for name in files:
            path = Path(parent, name)
            if path.is_file():
                yield path.relative_to(root).as_posix()


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(_PROBE)
    except OSError:
        return False


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so equal on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _is_validation(name: str) -> bool:
    return _position(name) < VALIDATION_SHARE


class _Part:
    """Documents of one side, up to a number of bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.documents: list[bytes] = []

    def add(self, content: bytes) -> bool:
        """Take what there is room for; return whether that is anything."""
        content = content[: self.room]
        if content:
            self.documents.append(content)
            self.room -= len(content)
        return bool(content)

    def joined(self) -> Tensor:
        return as_bytes(b"\n".join(self.documents))


def _parts(max_bytes: int) -> dict[str, _Part]:
    """The two sides, with room of their own, so that the size cap leaves the proportions alone."""
    validation = int(max_bytes * VALIDATION_SHARE)
    return {"validation": _Part(validation), "train": _Part(max_bytes - validation)}


def _split_files(
    root: Path, names: Sequence[str], max_bytes: int, source: str, remedy: str
) -> Corpus:
    parts = _parts(max_bytes)
    files: dict[str, list[str]] = {"train": [], "validation": []}
    # Validation files have the smallest positions.
    for name in sorted(names, key=lambda name: (_position(name), name)):
        side = "validation" if _is_validation(name) else "train"
        if parts[side].room <= 0:
            continue
        try:
            content = (root / name).read_bytes()
        except OSError:
            continue
        if parts[side].add(content):
            files[side].append(name)
    if not all(files.values()):
        raise FileNotFoundError(
            f"found {len(files['train'])} training and {len(files['validation'])} validation files "
            f"among the {len(names)} text files below {root}; both are needed. {remedy}"
        )
    found = {side: part.joined() for side, part in parts.items()}
    return Corpus(
        **found,
        train_files=tuple(files["train"]),
        validation_files=tuple(files["validation"]),
        source=source,
    )


def _load_file(path: Path, max_bytes: int) -> Corpus:
    with path.open("rb") as file:
        content = file.read(max_bytes)
    border = len(content) - int(len(content) * VALIDATION_SHARE)
    if border == len(content):
        raise OSError(f"{path} has {len(content)} bytes, too few for training and validation.")
    return Corpus(
        train=as_bytes(content[:border]),
        validation=as_bytes(content[border:]),
        train_files=(path.name,),
        validation_files=(path.name,),
        source=f"file {path.name}",
    )


def _load_hub(preset: Preset, max_bytes: int, source: str) -> Corpus:
    dataset = require("datasets").load_dataset(
        preset.name, preset.config, streaming=preset.streaming
    )
    return _split_dataset(dataset, preset.text_column, max_bytes, source)


def _split_dataset(dataset: Any, text_column: str, max_bytes: int, source: str) -> Corpus:
    """Take the splits of a dataset, or split the one that there is by the place of a document."""
    splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    if "train" not in splits:
        rule = 'must have a split named "train"'
        fail(ValueError, "data", rule, ", ".join(splits), "Rename one of its splits.")
    parts = _parts(max_bytes)
    held_out = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if held_out is None:
        _fill(parts, _documents(splits["train"], text_column))
    else:
        for side, name in (("validation", held_out), ("train", "train")):
            _fill({side: parts[side]}, _documents(splits[name], text_column))
    empty = [side for side, part in parts.items() if not part.documents]
    if empty:
        raise OSError(f"{source} has no text for the {' and the '.join(empty)} part.")
    return Corpus(parts["train"].joined(), parts["validation"].joined(), (), (), source)


def _fill(parts: dict[str, _Part], documents: Iterable[str]) -> None:
    """Give the documents to the one part, or to the two by their place in the dataset."""
    for index, text in enumerate(documents):
        # A dataset may be far larger than what is wanted of it.
        if all(part.room <= 0 for part in parts.values()):
            return
        if len(parts) == 1:
            (part,) = parts.values()
        else:
            part = parts["validation" if _is_validation(str(index)) else "train"]
        part.add(text.encode())


def _documents(split: Any, text_column: str) -> Iterator[str]:
    if split.column_names is not None and text_column not in split.column_names:
        rule = f"must be one of {', '.join(split.column_names)}"
        fail(ValueError, "text_column", rule, repr(text_column), "Choose the column with the text.")
    for batch in split.iter(batch_size=_BATCH):
        for text in batch[text_column]:
            if not isinstance(text, str):
                got = type(text).__name__
                fail(ValueError, "text_column", "must have text", got, "Choose another column.")
            yield text
