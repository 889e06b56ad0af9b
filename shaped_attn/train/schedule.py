"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    step: int, steps: int, *, warmup_steps: int, final_share: float, schedule: str = "cosine"
) -> float:
    """Return the learning rate of a step over the peak learning rate.

    With p = (step - warmup_steps) / (steps - warmup_steps) and f = final_share:

        (step + 1) / warmup_steps            step < warmup_steps
        f + (1 - f) (1 + cos(pi p)) / 2      "cosine"
        f + (1 - f) (1 - p)                  "linear"
        1                                    "constant"

    Args:
        step: from 0.
        steps: of the whole run.
        warmup_steps: over which the rate grows linearly, from 1 / warmup_steps to 1.
        final_share: what it comes down to at ``step = steps``; "constant" does not use it.
        schedule: "cosine" (the default), "linear" or "constant".
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_share + (1 - final_share) * left
