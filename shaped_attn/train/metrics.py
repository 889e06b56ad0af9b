"""Losses over the steps of a run, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

TRAIN, VALIDATION = "train", "validation"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Writes JSON lines, and sends their numbers to TensorBoard.

    The lines are of these kinds:

        {"kind": "validation", "step": 0, "loss": 5.9}
        {"kind": "train", "step": 1, "loss": 5.9, "learning_rate": 2e-05, "gradient_norm": 1.2,
         "tokens_per_second": 1e4}

    The loss of a "train" line is that of the step's batch before the step, in nats per token; that
    of a "validation" line is after the step. The norm is the gradient's before clipping.

    Args:
        accelerator: with a TensorBoard tracker.
        path: of the JSON lines.
        step: that the run goes on from. Later lines of a run that was killed, and a last line that
            is torn, are removed.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int) -> None:
        self.accelerator = accelerator
        accelerator.init_trackers(TENSORBOARD, init_kwargs={TENSORBOARD: {"purge_step": step + 1}})
        self._file = None
        if accelerator.is_main_process:
            kept = [line for line in read(path) if line["step"] <= step] if step else []
            write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append a line."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        self.accelerator.log({f"{kind}/{name}": v for name, v in values.items()}, step=step)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics; a last line that is torn is left out.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.exists():
        return []
    try:
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(
            f"{path} must hold one JSON object on each line, and one is damaged ({error}). Remove "
            "that line, which is lost; the run itself does not need it."
        ) from error
