"""The MLP, plain and with the shaped ReLU, with its residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Gain
from ..checks import check_choice, check_flag, check_number, check_positive, check_shape, check_size
from .initialization import WEIGHT_LAWS, Initialized, Law, constant
from .projection import Projection


def shaped_relu(x: Tensor, s_plus: Gain, s_minus: Gain) -> Tensor:
    """Return ``s_plus * max(x, 0) + s_minus * min(x, 0)``; the slope at 0 is ``s_minus``.

    Args:
        x: any shape.
        s_plus: slope for x > 0, a number or a Tensor of shape (), which gets a gradient.
        s_minus: slope for x < 0, the same.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; covariance-sde.md (3).
    """
    if isinstance(s_plus, Tensor) or isinstance(s_minus, Tensor):
        # A slope is close to 1. Written like this, only its small distance from 1 is rounded to a
        # half-precision dtype of x.
        positive = F.relu(x)
        return x + (s_plus - 1.0) * positive + (s_minus - 1.0) * (x - positive)
    if s_plus == 0.0:
        return -s_minus * F.relu(-x)
    shaped = F.leaky_relu(x, s_minus / s_plus)
    return shaped if s_plus == 1.0 else s_plus * shaped


class MLP(Initialized, nn.Module):
    r"""Two matrices with an activation between them, mixed with a residual.

    For x (..., width), with hidden = mlp_ratio width:

        forward(x, residual) = skip_gain residual + branch_gain activation(x W_pre) W_post

    | parameter       | shape           | initial law |
    | --- | --- | --- |
    | ``pre.weight``  | (hidden, width) | ``law`` |
    | ``post.weight`` | (width, hidden) | ``law`` |

    There are no biases. The two weights may be replaced by stacks (networks, out, in); x is then
    (networks, ..., width).

    Args:
        width: n, size of the last dimension of x.
        mlp_ratio: hidden width over ``width``; the product must be whole. Default 1.0.
        activation: module between the two. Default None: the identity.
        law: "gaussian" (the default; N(0, 1/in)), "orthogonal" or "gpt2" (N(0, 0.02^2)).
        device, dtype: of the parameters. Default: those of torch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive or not whole, or an unknown law.
    """

    def __init__(
        self,
        width: int,
        mlp_ratio: float = 1.0,
        *,
        activation: nn.Module | None = None,
        law: str = "gaussian",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = check_size("width", width)
        self.hidden_width = _hidden_width(width, mlp_ratio)
        check_choice("law", law, tuple(WEIGHT_LAWS))
        options = {"law": WEIGHT_LAWS[law], "device": device, "dtype": dtype}
        self.pre = Projection(width, self.hidden_width, **options)
        self.activation = activation
        self.post = Projection(self.hidden_width, width, **options)

    def output_scale(self) -> Gain:
        """Return the factor of what W_post gives: 1."""
        return 1.0

    def hidden(self, x: Tensor) -> Tensor:
        """Return ``activation(x W_pre)``, (..., hidden)."""
        hidden = self.pre(x)
        return hidden if self.activation is None else self.activation(hidden)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        skip_gain: Gain = 1.0,
        branch_gain: Gain = 1.0,
    ) -> Tensor:
        """Return ``skip_gain * residual + branch_gain * output_scale() * hidden(x) W_post``.

        Args:
            x: (..., width), dtype of the parameters unless under autocast.
            residual, skip_gain, branch_gain: as in `Projection`, with the shape of x.

        Raises:
            ValueError: shapes do not fit.
        """
        leading = tuple("..." for _ in x.shape[:-1])
        check_shape("x", x, (*leading, self.width))
        return self.post(self.hidden(x), residual, skip_gain, branch_gain * self.output_scale())

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"width={self.width}, hidden_width={self.hidden_width}"


class ShapedMLP(MLP):
    r"""Two matrices with a shaped ReLU between them, mixed with a residual.

    For x (..., width), with hidden = mlp_ratio width:

        forward(x, residual) = skip_gain residual + branch_gain sqrt(c_n) sigma_s(x W_pre) W_post

        sigma_s(x) = s_+ max(x, 0) + s_- min(x, 0) ,      s_± = 1 + c_± / sqrt(width)
        c_n = 2 / (s_+^2 + s_-^2)

    The slopes depend on ``width``, not on the hidden width. c_n keeps the mean square of what it
    multiplies; with trained slopes it follows them, and is not mixed in the epilogue.

    Parameters, and stacks of weights, are those of `MLP` with law "gaussian"; with
    ``trainable_slopes`` also ``c_plus`` and ``c_minus``, each () and at first the value given.

    Args:
        width, mlp_ratio: as in `MLP`; the theory has the ratio 1.0, and 4.0 is usual.
        c_plus: shape constant of the positive side. Default 0.0.
        c_minus: shape constant of the negative side. Default -1.0.
        trainable_slopes: whether ``c_plus`` and ``c_minus`` are parameters. Default False.
        device, dtype: of the parameters. Default: those of torch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive or not whole, a number is not finite, or both slopes are
            0.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; papers.md (P5), (P6);
        covariance-sde.md (2)-(4).
    """

    def __init__(
        self,
        width: int,
        mlp_ratio: float = 1.0,
        *,
        c_plus: float = 0.0,
        c_minus: float = -1.0,
        trainable_slopes: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(width, mlp_ratio, **factory)
        self.start = {
            "c_plus": check_number("c_plus", c_plus),
            "c_minus": check_number("c_minus", c_minus),
        }
        if all(1.0 + c / math.sqrt(width) == 0.0 for c in self.start.values()):
            raise ValueError(
                f"c_plus and c_minus must not both be -sqrt(width) = {-math.sqrt(width):g}, which "
                f"makes every slope 0, got {c_plus} and {c_minus}. Change one of them."
            )
        check_flag("trainable_slopes", trainable_slopes)
        for name, value in self.start.items():
            if trainable_slopes:
                value = nn.Parameter(torch.full((), value, **factory))
            setattr(self, name, value)

    @property
    def trainable_slopes(self) -> bool:
        """Whether ``c_plus`` and ``c_minus`` are parameters."""
        return isinstance(self.c_plus, nn.Parameter)

    def laws(self) -> dict[str, Law]:
        """Return the start values of trainable slopes as laws."""
        if not self.trainable_slopes:
            return {}
        return {name: constant(value) for name, value in self.start.items()}

    def slopes(self) -> tuple[Gain, Gain]:
        """Return s_+ and s_-: numbers, or Tensors if they are trained."""
        root = math.sqrt(self.width)
        return 1.0 + self.c_plus / root, 1.0 + self.c_minus / root

    def output_scale(self) -> Gain:
        """Return sqrt(c_n): a number, or a Tensor if the slopes are trained."""
        s_plus, s_minus = self.slopes()
        return (2.0 / (s_plus**2 + s_minus**2)) ** 0.5

    def hidden(self, x: Tensor) -> Tensor:
        """Return ``sigma_s(x W_pre)``, (..., hidden)."""
        return shaped_relu(self.pre(x), *self.slopes())

    def extra_repr(self) -> str:
        """Return sizes and shape constants."""
        kind = " (trained)" if self.trainable_slopes else ""
        constants = ", ".join(f"{name}={value:g}{kind}" for name, value in self.start.items())
        return f"{super().extra_repr()}, {constants}"


def _hidden_width(width: int, mlp_ratio: float) -> int:
    hidden = check_positive("mlp_ratio", mlp_ratio) * width
    whole = round(hidden)
    if whole < 1 or abs(hidden - whole) > 1e-6 * hidden:
        raise ValueError(
            f"mlp_ratio times width = {width} must be a whole number, the hidden width, got "
            f"{mlp_ratio} x {width} = {hidden:g}. "
            f"Pass for example mlp_ratio={max(1, whole)}/{width}."
        )
    return whole
