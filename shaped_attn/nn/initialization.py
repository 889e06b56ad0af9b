"""Laws of the initial parameters, and how a whole tree of modules is drawn from them.

A law is a function ``(tensor, generator) -> None`` that fills a tensor in place. It concerns the
last dimensions; any dimensions before them are independent repetitions, so that a stack of weights
(networks, out, in) holds one draw per network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

Law = Callable[[Tensor, Generator | None], None]


def gaussian(weight: Tensor, generator: Generator | None = None) -> None:
    """Fill ``weight`` (..., out, in) with N(0, 1/in): the law of every matrix of the theory.

    The papers write entries N(0, 1) and an explicit 1/sqrt(in) in front of each product, which is
    the same (covariance-sde.md, section 1).
    """
    weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


def orthogonal(weight: Tensor, generator: Generator | None = None) -> None:
    """Fill ``weight`` (..., out, in) with an orthogonal matrix, uniform in the sense of Haar.

    It is the orthogonal factor of a Gaussian matrix, with the signs that make the diagonal of the
    triangular factor positive; without them the law would not be uniform. With fewer rows than
    columns the rows are orthonormal. With more, the columns are, times sqrt(out / in), so that the
    mean square of x and that of x W^T are the same (arXiv 2302.10322).
    """
    rows, columns = weight.shape[-2:]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shape = (*weight.shape[:-2], max(rows, columns), min(rows, columns))
    normal = torch.randn(shape, generator=generator, dtype=dtype, device=weight.device)
    q, r = torch.linalg.qr(normal)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    q = q * torch.ones_like(diagonal).copysign(diagonal).unsqueeze(-2)
    weight.copy_(q.mT if rows < columns else q * math.sqrt(rows / columns))


def gpt2(weight: Tensor, generator: Generator | None = None) -> None:
    """Fill ``weight`` with N(0, 0.02^2) whatever its size: the law of GPT-2 and Pre-LN blocks."""
    weight.normal_(0.0, 0.02, generator=generator)


def zero(weight: Tensor, generator: Generator | None = None) -> None:
    """Fill ``weight`` with 0: the law of queries whose logits start at 0."""
    weight.zero_()


WEIGHT_LAWS = {"gaussian": gaussian, "orthogonal": orthogonal, "gpt2": gpt2, "zero": zero}
"""Laws of matrices by the names that modules take."""


def normal(tensor: Tensor, generator: Generator | None = None) -> None:
    """Fill ``tensor`` with N(0, 1): the law of embeddings."""
    tensor.normal_(generator=generator)


def constant(value: float | Sequence[float]) -> Law:
    """Return the law of a constant: a number, or a sequence that fills the last dimension."""

    def fill(tensor: Tensor, generator: Generator | None = None) -> None:
        tensor.copy_(torch.as_tensor(value, dtype=torch.float64).to(tensor.device))

    return fill


_TORCH_LAWS = {
    nn.LayerNorm: {"weight": constant(1.0), "bias": constant(0.0)},
    nn.RMSNorm: {"weight": constant(1.0)},
    nn.Embedding: {"weight": normal},
}


def initializers(module: nn.Module) -> dict[str, Law]:
    """Return the laws of all parameters and buffers in a tree of modules, by their full names.

    They come from the modules of `shaped_attn.nn` in the tree, and for torch's LayerNorm, RMSNorm
    and Embedding are torch's own: weight 1 and bias 0, and N(0, 1). Tensors of other modules are
    left out. The order is that of ``module.named_modules()``.
    """
    found = {}
    for prefix, part in module.named_modules():
        own = part.laws() if isinstance(part, Initialized) else _TORCH_LAWS.get(type(part), {})
        for name, law in own.items():
            if getattr(part, name, None) is not None:
                found[f"{prefix}.{name}" if prefix else name] = law
    return found


class Initialized:
    """What all modules of `shaped_attn.nn` share: known laws of their initial parameters."""

    def laws(self) -> dict[str, Law]:
        """Return the laws of the tensors that this module holds itself, not in a submodule."""
        return {}

    def initializers(self) -> dict[str, Law]:
        """Return the laws of all parameters and buffers, by their dotted names: `initializers`."""
        return initializers(self)

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw every parameter anew and set every buffer to its initial value, in place.

        Args:
            generator: source of the draws, on the device of the parameters. Default None: torch's
                global one. Equal states of it give equal parameters.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, law in self.initializers().items():
            if name in tensors:  # all but the second name of a tensor that two modules share
                law(tensors[name], generator)
