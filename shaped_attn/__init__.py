"""Shaped attention in one fused pass.

For head h and query i, which sits at key position p(i) and sees the keys N_i:

    out_i = skip_gain * residual_i
          + branch_gain * ( identity_gain * v_p(i)
                          + softmax_gain * sum_j P_ij v_j
                          - center_gain * mean_j v_j )

    P_i. = softmax(scale * q_i . k_j)        softmax, sum and mean over the keys j in N_i

The Shaped Transformer (arXiv 2306.17759), the simplified blocks of arXiv 2311.01906, Value-SkipInit
(arXiv 2302.10322) and plain softmax attention are choices of the gains and of `scale`.

`shaped_attention` is the function to call; importing this package also registers the operator under
it, `torch.ops.shaped_attn.attention`. Only torch is needed for the import.
"""

from shaped_attn._checkout import import_sibling_kernels as _import_sibling_kernels

_import_sibling_kernels()  # before the first use of shaped_attn.kernels

from shaped_attn import ops as _ops  # noqa: F401 (registers torch.ops.shaped_attn)
from shaped_attn._version import __version__
from shaped_attn.functional import shaped_attention
from shaped_attn.priors import ESPA, USPA

__all__ = ["ESPA", "USPA", "__version__", "shaped_attention"]
