"""The folder of a run: which files it has, and that it belongs to one configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checks import fail
from ..destination import when_whole
from ..nn import saving
from .settings import TrainSettings


def write_text(path: Path, text: str) -> None:
    """Write a file that appears only when it is whole; an existing one is replaced."""
    with when_whole(path) as part:
        part.write_text(text, encoding="utf-8")


class RunFolder:
    """Paths below the folder of a run.

    Attributes:
        root: the folder.
        run: settings, the text's fingerprint and sizes, and the number of processes.
        model: configuration of the model; with ``weights`` it is what
            ``ShapedTransformer.from_pretrained`` reads.
        metrics: one JSON object per line.
        checkpoints: folder of the checkpoints.
        weights: of the trained model; not there before the run has finished.
        result: how the run ended; not there before that.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.run = self.root / "run.json"
        self.model = self.root / saving.CONFIG
        self.metrics = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / saving.WEIGHTS
        self.result = self.root / "result.json"

    def check(self, settings: TrainSettings, digest: str, processes: int) -> None:
        """Check that the folder is new, empty or that of a run of the same configuration.

        Raises:
            ValueError: it is another's.
            OSError: it cannot be read.
        """
        if not self.run.exists():
            visible = [] if not self.root.exists() else list(self.root.iterdir())
            if any(not path.name.startswith(".") for path in visible):
                self._refuse("which holds other files")
            return
        try:
            found = json.loads(self.run.read_text(encoding="utf-8"))
            differences = settings.differences(found["settings"])
            known_digest, known_processes = found["data"]["sha256"], found["processes"]
        except (ValueError, KeyError, TypeError, AttributeError):
            self._refuse(f"whose {self.run.name} is none of ours")
        if known_digest != digest:
            differences.append("the text is another one")
        if known_processes != processes:
            differences.append(f"processes: {known_processes}, now {processes}")
        if differences:
            self._refuse(f"a run of another configuration ({'; '.join(differences)})")

    def _refuse(self, got: str) -> None:
        rule = "must be a new folder, or that of a run of the same configuration to resume"
        fail(ValueError, "output", rule, f"{self.root}, {got}", "Name another folder.")

    def begin(self, settings: TrainSettings, data: dict[str, Any], processes: int) -> None:
        """Make the folder and write what identifies the run."""
        self.root.mkdir(parents=True, exist_ok=True)
        run = {"settings": settings.to_dict(), "data": data, "processes": processes}
        write_text(self.run, json.dumps(run, indent=1) + "\n")
        write_text(self.model, settings.model_config().to_json() + "\n")
