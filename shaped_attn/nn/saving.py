"""A model in a folder: its configuration as JSON and its weights as safetensors.

`shaped-attn train` leaves the same two files.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import fail
from ..destination import check_folder, when_whole

if TYPE_CHECKING:
    from .transformer import ShapedTransformer, ShapedTransformerConfig

CONFIG = "model.json"
WEIGHTS = "model.safetensors"


def save(model: ShapedTransformer, folder: Path) -> None:
    """Write both files; `ShapedTransformer.save_pretrained` describes it."""
    folder = Path(folder)
    _safetensors()
    check_folder(folder, "folder")
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            got = f"{folder}, which has {name}"
            fail(FileExistsError, "folder", "must not have a model yet", got, "Name another one.")
    problem = _differences(model.state_dict(), type(model)(model.config, device="meta"))
    if problem is not None:
        fail(
            ValueError,
            "model",
            "must have the weights that its configuration describes",
            problem,
            "Save the weights of another model yourself, from its state_dict().",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / WEIGHTS)
    with when_whole(folder / CONFIG) as part:
        part.write_text(model.config.to_json() + "\n", encoding="utf-8")


def write_weights(model: ShapedTransformer, path: Path) -> None:
    """Write the weights under the names of the model."""
    state = {name: x.detach().contiguous().cpu() for name, x in model.state_dict().items()}
    with when_whole(path) as part:
        _safetensors().save_file(state, part)


def load(
    make: type[ShapedTransformer],
    configuration: type[ShapedTransformerConfig],
    folder: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> ShapedTransformer:
    """Read both files; `ShapedTransformer.from_pretrained` describes it."""
    safetensors = _safetensors()
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        fail(
            FileNotFoundError,
            "folder",
            f"must hold {CONFIG} and {WEIGHTS}, as save_pretrained and shaped-attn train write",
            f"{folder}, " + (f"without {CONFIG}" if folder.exists() else "which does not exist"),
            "Name the folder of a model.",
        )
    if not (folder / WEIGHTS).exists():
        fail(
            FileNotFoundError,
            "folder",
            f"must hold {CONFIG} and {WEIGHTS}",
            f"{folder}, without {WEIGHTS}",
            "If it is that of a run of shaped-attn train, it has not finished: give the command "
            "again.",
        )
    try:
        config = configuration.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is not a configuration of ours: {error}") from error
    device = torch.get_default_device() if device is None else torch.device(device)
    try:
        state = safetensors.load_file(folder / WEIGHTS, device=str(device))
    except importlib.import_module("safetensors").SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged, or not of the format safetensors: {error}. Put a "
            "whole copy in its place."
        ) from error
    model = make(config, device="meta")  # nothing is drawn
    problem = _differences(state, model)
    if problem is not None:
        raise ValueError(
            f"{folder / WEIGHTS} must have the weights that {CONFIG} beside it describes, got "
            f"{problem}. Put both files of one model into the folder."
        )
    model.load_state_dict(state, assign=True)
    return model if dtype is None else model.to(dtype)


def _differences(state: Mapping[str, Tensor], model: ShapedTransformer) -> str | None:
    """Say how names and shapes differ from those of ``model``, or None."""
    wanted = model.state_dict()
    problems = [f"no {name}" for name in wanted if name not in state]
    problems += [f"{name}, which is unknown" for name in state if name not in wanted]
    problems += [
        f"{name} of shape {tuple(state[name].shape)} for {tuple(x.shape)}"
        for name, x in wanted.items()
        if name in state and state[name].shape != x.shape
    ]
    if len(problems) > 3:
        problems[3:] = [f"and {len(problems) - 3} more"]
    return "; ".join(problems) or None


def _safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "safetensors":
            raise
        raise ModuleNotFoundError(
            "saving and loading a model needs the package safetensors, which is not installed. "
            "Install it with: pip install safetensors",
            name="safetensors",
        ) from None
