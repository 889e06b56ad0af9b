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
from torch import Tensor, nn

from ..destination import check_folder, when_whole

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG = "model.json"
WEIGHTS = "model.safetensors"


class SavingMixin:
    """`save_pretrained` and `from_pretrained`, for a model made of a ``config`` alone.

    Attributes:
        config_class: of ``config``, with ``to_json`` and ``from_json``.
    """

    config_class: type

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.json``, the configuration, and ``model.safetensors``, the weights.

        Args:
            folder: made if it is not there. A model that is in it is not overwritten.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: the folder cannot be written, or has a model.
            ValueError: the weights are not those of the configuration, such as stacks.
        """
        folder = Path(folder)
        _safetensors()
        check_folder(folder, "folder")
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists():
                raise FileExistsError(
                    f"folder must not have a model yet, got {folder}, which has {name}. "
                    "Name another one."
                )
        problem = _differences(self.state_dict(), type(self)(self.config, device="meta"))
        if problem is not None:
            raise ValueError(
                f"model must have the weights that its configuration describes, got {problem}. "
                "Save the weights of another model yourself, from its state_dict()."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(self, folder / WEIGHTS)
        with when_whole(folder / CONFIG) as part:
            part.write_text(self.config.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Make the model that `save_pretrained`, or a finished `shaped-attn train`, has written.

        Args:
            folder: that has ``model.json`` and ``model.safetensors``.
            device: of the parameters. Default: torch's default device.
            dtype: of the parameters. Default: as they were saved, bit for bit.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: a file is missing or cannot be read.
            ValueError: a file is damaged, or of another format or version; the two do not fit.
        """
        safetensors = _safetensors()
        folder = Path(folder)
        wanted = f"folder must hold {CONFIG} and {WEIGHTS}"
        if not (folder / CONFIG).exists():
            found = f"without {CONFIG}" if folder.exists() else "which does not exist"
            raise FileNotFoundError(
                f"{wanted}, as save_pretrained and shaped-attn train write, got {folder}, {found}. "
                "Name the folder of a model."
            )
        if not (folder / WEIGHTS).exists():
            raise FileNotFoundError(
                f"{wanted}, got {folder}, without {WEIGHTS}. If it is that of a run of shaped-attn "
                "train, it has not finished: give the command again."
            )
        try:
            config = cls.config_class.from_json((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            message = f"{folder / CONFIG} is not a configuration of ours: {error}"
            raise ValueError(message) from error
        device = torch.get_default_device() if device is None else torch.device(device)
        try:
            state = safetensors.load_file(folder / WEIGHTS, device=str(device))
        except importlib.import_module("safetensors").SafetensorError as error:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged, or not of the format safetensors: {error}. Put a "
                "whole copy in its place."
            ) from error
        model = cls(config, device="meta")  # nothing is drawn
        problem = _differences(state, model)
        if problem is not None:
            raise ValueError(
                f"{folder / WEIGHTS} must have the weights that {CONFIG} beside it describes, got "
                f"{problem}. Put both files of one model into the folder."
            )
        model.load_state_dict(state, assign=True)
        return model if dtype is None else model.to(dtype)


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the weights under the names of the model."""
    state = {name: x.detach().contiguous().cpu() for name, x in model.state_dict().items()}
    with when_whole(path) as part:
        _safetensors().save_file(state, part)


def _differences(state: Mapping[str, Tensor], model: nn.Module) -> str | None:
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
