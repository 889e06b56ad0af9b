"""What one process of a run decides for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Result = TypeVar("Result")


def on_main_process(
    accelerator: Accelerator | PartialState, function: Callable[[], Result]
) -> Result:
    """Call ``function`` in the main process; every process returns or raises what it does there.

    So no process waits for a main process that has failed. All must call this.
    """
    from accelerate.utils import broadcast_object_list

    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
