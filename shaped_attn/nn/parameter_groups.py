"""Which parameters an optimizer may decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import check_number


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for a torch optimizer: weight decay for matrices alone.

    Gains, slopes, norms and biases, that is everything of fewer than two dimensions or with "gain"
    in its name, and embeddings do not decay: decay would pull a gain away from the value that its
    initialisation is about (arXiv 2311.01906 decays no gain).

    Args:
        module: any module. A parameter that appears in several places is listed once, and does not
            decay if one of the places is an embedding. Parameters with ``requires_grad=False`` are
            left out.
        weight_decay: of the matrices, at least 0.

    Returns:
        ``[{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay":
        0.0}]``, in the order of ``module.named_parameters()``.

    Raises:
        TypeError: ``weight_decay`` is not a number.
        ValueError: it is negative or not finite.

    Example:
        >>> import torch
        >>> from shaped_attn.nn import ShapedBlock, parameter_groups
        >>> block = ShapedBlock(32, gain_scheme="learn")
        >>> optimizer = torch.optim.AdamW(parameter_groups(block, weight_decay=0.1), lr=1e-3)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [5, 2]
    """
    weight_decay = check_number("weight_decay", weight_decay, low=0.0)
    tables = (part for part in module.modules() if isinstance(part, nn.Embedding))
    embedded = {id(part.weight) for part in tables}
    matrices, others = [], []
    for name, parameter in module.named_parameters():  # each tensor once
        if not parameter.requires_grad:
            continue
        is_gain = "gain" in name.rpartition(".")[2]
        is_matrix = parameter.ndim >= 2 and not is_gain and id(parameter) not in embedded
        (matrices if is_matrix else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
