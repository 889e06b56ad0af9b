"""The gains of the shaped attention matrix: fixed, learned, or annealed to plain attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import Gain
from ..checks import check_choice, check_head_gain, check_number, check_size
from .initialization import Initialized, Law, constant

GAIN_NAMES = ("identity_gain", "softmax_gain", "center_gain")
GAIN_SCHEMES = ("fixed", "learn", "recover")


class ShapingGains(Initialized, nn.Module):
    r"""Gains of A = identity_gain I + softmax_gain softmax(Y) - center_gain A0, called to get them.

    "fixed"
        constants. A gain that is the number 0.0 saves the work of its term.
    "learn"
        the gains named in ``learned_gains`` are parameters, one per head. Identity and centre are
        the two that 2306.17759 learns; with "softmax_gain" as well it is 2311.01906, equation (5).
    "recover"
        identity and centre are their start values times ``1 - fraction``. `anneal_gains` moves the
        buffer ``fraction`` from 0, shaped attention, to 1, where both are exactly 0 and what is
        left is ``softmax_gain`` times plain softmax attention (2306.17759).

    | tensor            | shape    | present as                               | initial value |
    | --- | --- | --- | --- |
    | ``identity_gain`` | (heads,) | parameter if learned, buffer if per head | start value |
    | ``softmax_gain``  | (heads,) | parameter if learned, buffer if per head | start value |
    | ``center_gain``   | (heads,) | parameter if learned, buffer if per head | start value |
    | ``fraction``      | ()       | buffer with "recover"                    | 0 |

    All are part of the state dict; gains that are one fixed number are not tensors.

    Args:
        heads: number of query heads.
        identity_gain: start value, a number or one per head. Default 1.0.
        softmax_gain: the same. Default 1.0.
        center_gain: the same. Default None: that of ``softmax_gain``, so that the matrix is the
            identity at zero logits.
        gain_scheme: "fixed" (the default), "learn" or "recover".
        learned_gains: names of the gains that "learn" trains. Default identity and centre.
        device, dtype: of the tensors. Default: those of torch.

    Raises:
        TypeError: a gain is neither a number nor a sequence of numbers.
        ValueError: a gain is not finite or not one per head; an unknown scheme or name.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; He and Hofmann, Simplifying
        Transformer Blocks, arXiv 2311.01906, equation (5); papers.md (P1), sections 2 and 4.
    """

    def __init__(
        self,
        heads: int,
        *,
        identity_gain: float | Sequence[float] = 1.0,
        softmax_gain: float | Sequence[float] = 1.0,
        center_gain: float | Sequence[float] | None = None,
        gain_scheme: str = "fixed",
        learned_gains: Sequence[str] = ("identity_gain", "center_gain"),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = check_size("heads", heads)
        check_choice("gain_scheme", gain_scheme, GAIN_SCHEMES)
        self.gain_scheme = gain_scheme
        learned = check_learned_gains(learned_gains) if gain_scheme == "learn" else ()
        center_gain = softmax_gain if center_gain is None else center_gain
        given = zip(GAIN_NAMES, (identity_gain, softmax_gain, center_gain), strict=True)
        self.start = {name: check_head_gain(name, gain, heads) for name, gain in given}
        for name, gain in self.start.items():
            if name in learned:
                setattr(self, name, nn.Parameter(torch.empty(heads, device=device, dtype=dtype)))
            elif isinstance(gain, tuple):
                self.register_buffer(name, torch.empty(heads, device=device, dtype=dtype))
            else:
                setattr(self, name, gain)
        if gain_scheme == "recover":
            self.register_buffer("fraction", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def laws(self) -> dict[str, Law]:
        """Return the start values as laws."""
        given = self.start.items()
        tensors = {name: x for name, x in given if isinstance(getattr(self, name), Tensor)}
        if self.gain_scheme == "recover":
            tensors["fraction"] = 0.0
        return {name: constant(value) for name, value in tensors.items()}

    def forward(self) -> dict[str, Gain]:
        """Return the present gains by their names in `shaped_attn.shaped_attention`."""
        gains = {name: getattr(self, name) for name in GAIN_NAMES}
        if self.gain_scheme == "recover":
            for name in ("identity_gain", "center_gain"):
                if self.start[name] != 0.0:  # absent from the start: keep saving the work
                    gains[name] = (1.0 - self.fraction) * gains[name]
        return gains

    def extra_repr(self) -> str:
        """Return the scheme and the start values, and which gains are learned."""
        parts = [f"gain_scheme={self.gain_scheme!r}"]
        for name, gain in self.start.items():
            kind = " (learned)" if isinstance(getattr(self, name), nn.Parameter) else ""
            parts.append(f"{name}={gain}{kind}")
        return ", ".join(parts)


def anneal_gains(module: nn.Module, fraction: float) -> None:
    """Set how far the gains of all "recover" attentions in ``module`` are on the way to plain.

    Identity and centre gain become their start values times ``1 - fraction``. Call it once per
    optimizer step, for example with ``min(1, step / steps_to_recover)`` for the linear schedule of
    2306.17759. Nothing is recompiled under ``torch.compile``: only the value of a buffer changes,
    which the state dict keeps.

    Args:
        module: a tree of modules with at least one attention of ``gain_scheme="recover"``.
        fraction: from 0, shaped attention, to 1, plain softmax attention.

    Raises:
        TypeError: ``fraction`` is not a number.
        ValueError: ``fraction`` is outside of [0, 1], or nothing in ``module`` can be annealed.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759, "recover"; papers.md, section 2.
    """
    fraction = check_number("fraction", fraction, low=0.0, high=1.0)
    annealed = [
        part
        for part in module.modules()
        if isinstance(part, ShapingGains) and part.gain_scheme == "recover"
    ]
    if not annealed:
        raise ValueError(
            'module must contain an attention with gain_scheme="recover", got a '
            f"{type(module).__name__} without one. "
            'Build it with gain_scheme="recover", or do not anneal it.'
        )
    for gains in annealed:
        gains.fraction.fill_(fraction)


def check_learned_gains(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the learned gains, at least one."""
    if isinstance(names, str) or len(names) == 0:
        raise ValueError(
            "learned_gains must be a sequence of at least one of "
            f"{', '.join(map(repr, GAIN_NAMES))}, got {names!r}. "
            'Pass for example ("identity_gain", "center_gain"), or gain_scheme="fixed".'
        )
    for name in names:
        check_choice("learned_gains", name, GAIN_NAMES)
    return tuple(names)
