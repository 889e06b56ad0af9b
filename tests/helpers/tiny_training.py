"""Training runs of seconds: their settings, also as flags, and whether two runs are the same."""

import argparse
import contextlib
import warnings

import torch
from safetensors.torch import load_file

from shaped_attn.train import metrics, trainer
from shaped_attn.train.settings import TrainSettings

TINY = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "mlp_ratio": 2.0,
    "context": 16,
    "data": argparse.__file__,  # English and Python
    "data_bytes": 50_000,
    "steps": 12,
    "batch_size": 4,
    "warmup_steps": 3,
    "evaluate_every": 6,
    "evaluation_windows": 6,
    "checkpoint_every": 4,
}


def settings(**changes):
    return TrainSettings(**(TINY | changes))


def flags(**changes):
    """The settings on the command line, without those that are None."""
    values = {name: value for name, value in (TINY | changes).items() if value is not None}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return [part for pair in pairs for part in pair]


def train(
    output, stop_after=None, *, on_progress=None, on_resume=None, warn=warnings.warn, **changes
):
    """Train in a folder; ask for the end after a number of steps of this call."""
    asked = iter([False] * (stop_after or 0) + [True])
    return trainer.train(
        settings(**changes),
        output,
        device="cpu",
        stop=None if stop_after is None else lambda: next(asked),
        on_progress=on_progress,
        on_resume=on_resume,
        warn=warn,
    )


def lines(output, kind=None):
    """The metrics without what depends on the clock."""
    found = metrics.read(output / "metrics.jsonl")
    for line in found:
        line.pop("tokens_per_second", None)
    return [line for line in found if kind in (None, line["kind"])]


def assert_same_run(output, expected):
    """Losses, rates, norms and weights are equal in every bit."""
    assert lines(output) == lines(expected)
    for name, weight in load_file(expected / "model.safetensors").items():
        assert torch.equal(load_file(output / "model.safetensors")[name], weight), name


@contextlib.contextmanager
def one_thread():
    """Sums that depend neither on the machine nor on what ran before."""
    from accelerate.state import AcceleratorState

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
