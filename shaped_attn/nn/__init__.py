"""Modules of the shaped transformer on top of the fused operator.

`ShapedAttention` and `ShapedMLP` are the two halves of a `ShapedBlock`, and `ShapedTransformer` is
a stack of blocks between embeddings and a head, described by a `ShapedTransformerConfig`. Its
``method``, one of `METHODS`, may also be that of another paper or standard Pre-LN; their blocks are
`TransformerBlock`, with an `MLP`. Each docstring gives the equation and the initial law of every
parameter. `initializers` returns these laws for a tree of modules, `anneal_gains` moves the gains
of the "recover" scheme, and `parameter_groups` tells an optimizer what to decay.
`ShapedTransformer.generate` continues sequences, with a `KeyValueCache`.

Nothing but torch is needed. `import shaped_attn` does not import this package.
"""

from .attention import ShapedAttention
from .block import ShapedBlock, TransformerBlock
from .cache import KeyValueCache
from .config import ShapedTransformerConfig
from .gains import ShapingGains, anneal_gains
from .generation import pad_left
from .initialization import gaussian, initializers, orthogonal
from .methods import METHODS
from .mlp import MLP, ShapedMLP, shaped_relu
from .parameter_groups import parameter_groups
from .positions import rotary_table
from .projection import Projection
from .transformer import ShapedTransformer, ShapedTransformerOutput

__all__ = [
    "METHODS",
    "MLP",
    "KeyValueCache",
    "Projection",
    "ShapedAttention",
    "ShapedBlock",
    "ShapedMLP",
    "ShapedTransformer",
    "ShapedTransformerConfig",
    "ShapedTransformerOutput",
    "ShapingGains",
    "TransformerBlock",
    "anneal_gains",
    "gaussian",
    "initializers",
    "orthogonal",
    "pad_left",
    "parameter_groups",
    "rotary_table",
    "shaped_relu",
]
