"""Shaped attention in Hugging Face models: `apply_shaped_attention`.

Importing this package registers an attention function and its mask function under the name
`ATTENTION` and makes `transformers` build every model whose config was written by
`configure_shaped_attention`, or saved from a shaped model, with shaped attention.
"""

try:
    import transformers

    version = transformers.__version__
except ImportError:
    version = "none"
if version == "none" or tuple(map(int, version.split(".")[:2])) < (5, 8):
    raise ImportError(
        "shaped_attn.integrations.transformers needs transformers 5.8 or later, got "
        f"{version}. Install it with: pip install 'shaped-attn[transformers]'."
    )

from .attention import ATTENTION, shaped_attention_forward, shaped_attention_mask
from .conversion import (
    apply_shaped_attention,
    configure_shaped_attention,
    register,
    remove_shaped_attention,
)

__all__ = [
    "ATTENTION",
    "apply_shaped_attention",
    "configure_shaped_attention",
    "remove_shaped_attention",
    "shaped_attention_forward",
    "shaped_attention_mask",
]

register()
