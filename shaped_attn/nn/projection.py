"""A linear map without bias, whose product takes the residual in its own epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Gain
from ..functional import is_autocast
from ..validation import check_residual_gain
from .initialization import Initialized, Law, gaussian


class Projection(Initialized, nn.Linear):
    r"""Linear map without bias, mixed with a residual in the epilogue of the product.

    For x (..., in) and the weight W (out, in):

        forward(x, residual) = skip_gain * residual + branch_gain * x W^T

    W may be replaced by a stack (networks, out, in), one matrix per network; x is then
    (networks, ..., in).

    | parameter  | shape     | initial law |
    | --- | --- | --- |
    | ``weight`` | (out, in) | ``law``; by default N(0, 1/in), independent |

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of the result.
        law: of the initial weight, such as `gaussian` (the default) or `orthogonal`.
        device, dtype: of the weight. Default: those of torch.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; covariance-sde.md (1), (2).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        law: Law = gaussian,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.law = law  # before Linear.__init__, which draws the weight
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def laws(self) -> dict[str, Law]:
        """Return the law of the weight."""
        return {"weight": self.law}

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        skip_gain: Gain = 1.0,
        branch_gain: Gain = 1.0,
    ) -> Tensor:
        """Return ``skip_gain * residual + branch_gain * x W^T``.

        One ``addmm`` (``baddbmm`` for a stack) if both gains are numbers, the dtypes agree and no
        autocast is active. Otherwise the product is computed first and added in the wider dtype:
        autocast would narrow the residual to its own dtype.

        Args:
            x: (..., in), or (networks, ..., in) for a stack of weights, dtype of the weight unless
                under autocast.
            residual: of the shape of the result; may be of a wider dtype, then the result has it.
                Default None: no such term.
            skip_gain: number or Tensor of shape (), weight of ``residual``. Default 1.0, the only
                value without a residual.
            branch_gain: number or Tensor of shape (), weight of the product. Default 1.0.

        Raises:
            ValueError: the residual has another shape than the result, or is missing for a
                ``skip_gain``; x does not have one entry per network.
        """
        if self.weight.ndim == 3 and (x.ndim < 2 or x.shape[0] != self.weight.shape[0]):
            raise ValueError(
                f"x must have shape (networks, ..., in) with networks = {self.weight.shape[0]}, "
                f"got shape {tuple(x.shape)}. "
                "Give each network of the stack its own input; expand one that they share."
            )
        check_residual_gain(skip_gain, residual)
        if residual is None:
            product = self._product(x)
            return product if _is_one(branch_gain) else product * branch_gain
        shape = (*x.shape[:-1], self.weight.shape[-2])
        if tuple(residual.shape) != tuple(shape):
            raise ValueError(
                f"residual must have the shape of the result, {tuple(shape)}, got shape "
                f"{tuple(residual.shape)}. Expand it to that shape."
            )
        has_tensor_gain = isinstance(skip_gain, Tensor) or isinstance(branch_gain, Tensor)
        if residual.dtype == x.dtype and not has_tensor_gain and not is_autocast(x):
            return self._mixed_product(x, residual, skip_gain, branch_gain)
        product = self._product(x)
        skip = residual.to(torch.promote_types(product.dtype, residual.dtype))
        skip = skip if _is_one(skip_gain) else skip * skip_gain
        if isinstance(branch_gain, Tensor):
            return skip + product.to(skip.dtype) * branch_gain
        return torch.add(skip, product, alpha=branch_gain)

    def _product(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return F.linear(x, self.weight)
        product = torch.bmm(self._rows(x), self.weight.mT)
        return product.view(*x.shape[:-1], self.weight.shape[-2])

    def _mixed_product(self, x: Tensor, residual: Tensor, skip: float, branch: float) -> Tensor:
        mix = torch.addmm if self.weight.ndim == 2 else torch.baddbmm
        rows, skip_rows = self._rows(x), self._rows(residual)
        return mix(skip_rows, rows, self.weight.mT, beta=skip, alpha=branch).view(residual.shape)

    def _rows(self, x: Tensor) -> Tensor:
        """(..., size) to (rows, size), and for a stack to (networks, rows, size)."""
        return x.reshape(*self.weight.shape[:-2], -1, x.shape[-1])

    def extra_repr(self) -> str:
        """Return the sizes, the law, and the number of networks of a stack."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        if self.weight.ndim == 3:
            text += f", networks={self.weight.shape[0]}"
        return f"{text}, law={self.law.__name__}"


def _is_one(gain: Gain) -> bool:
    return not isinstance(gain, Tensor) and gain == 1.0
