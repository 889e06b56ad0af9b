"""A small byte-level decoder whose attention is one call of ``shaped_attn.shaped_attention``."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shaped_attn import shaped_attention

from ..train.corpus import BYTE_VALUES


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder. ``attention`` is ``"shaped"`` or ``"plain"``; nothing else differs."""

    attention: str = "shaped"
    layers: int = 4
    width: int = 128
    heads: int = 4
    length: int = 128
    mlp_ratio: int = 4
    branch: float = 0.35
    rotary_base: float = 1000.0

    def __post_init__(self) -> None:
        if self.attention not in ("shaped", "plain"):
            raise ValueError(
                f'attention must be "shaped" or "plain", got {self.attention!r}; choose one'
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                "width must be a multiple of 2 * heads (rotary positions turn pairs), got "
                f"width={self.width}, heads={self.heads}; change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads

    @property
    def skip(self) -> float:
        """Weight of the skip path: ``skip^2 + branch^2 = 1`` keeps the variance of the stream."""
        return math.sqrt(1.0 - self.branch**2)


class Attention(nn.Module):
    """Causal self-attention; the gains are what distinguishes shaped from plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        if config.attention == "shaped":
            self.identity_gain = nn.Parameter(torch.ones(heads))
            self.softmax_gain = nn.Parameter(torch.ones(heads))
            self.center_gain = nn.Parameter(torch.ones(heads))

    def gains(self) -> dict[str, Tensor | float]:
        """The gains and the scale, by the names of the operator's arguments."""
        scale = self.config.head_dim**-0.5
        if self.config.attention == "plain":
            return {"identity_gain": 0.0, "softmax_gain": 1.0, "center_gain": 0.0, "scale": scale}
        return {
            "identity_gain": self.identity_gain,
            "softmax_gain": self.softmax_gain,
            "center_gain": self.center_gain,
            "scale": scale,
        }

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (with rotary positions) and values, ``(B, H, T, D)``."""
        batch, length, width = x.shape
        heads = self.config.heads
        projected = self.query_key_value(x).view(batch, length, 3, heads, width // heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        return _rotate(q, self.config.rotary_base), _rotate(k, self.config.rotary_base), v

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to ``(B, T, width)``."""
        q, k, v = self.project(x)
        out = shaped_attention(q, k, v, is_causal=True, **self.gains())
        return self.out_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions: pair (d, d + D/2) turned by an angle proportional to the position."""
    length, head_dim = x.shape[-2:]
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(length, device=x.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and MLP, each mixed in as ``skip * x + branch * f(norm(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.skip, self.branch = config.skip, config.branch
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_ratio * config.width, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * config.width, config.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to ``(B, T, width)``."""
        x = self.skip * x + self.branch * self.attention(self.attention_norm(x))
        return self.skip * x + self.branch * self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTE_VALUES, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, BYTE_VALUES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # Logits start at zero, as in arXiv 2311.01906: shaped attention is then the identity, and
        # plain attention the average over the past.
        for block in self.blocks:
            nn.init.zeros_(block.attention.query_key_value.weight[: config.width])
        # Small, so that the first loss is the log of 256 rather than that of a confident guess.
        nn.init.normal_(self.head.weight, std=0.1 * config.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, T)`` int64 bytes to ``(B, T, 256)`` logits."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, window: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy, in nats, of the last T bytes of ``(B, T + 1)`` given those before them."""
        logits = self(window[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor) -> Tensor:
        """The combined attention matrices, ``(layers, heads, T, T)``, of one text ``(T,)``.

        They are not rebuilt from a formula: the values handed to the operator are the identity
        matrix, so what comes out *is* the matrix by which the operator multiplies values.
        """
        x = self.embedding(tokens[None])
        maps = []
        for block in self.blocks:
            attention = block.attention
            q, k, _ = attention.project(block.attention_norm(x))
            identity = torch.eye(tokens.numel(), dtype=q.dtype, device=q.device)
            values = identity.expand(*k.shape[:2], -1, -1)
            maps.append(shaped_attention(q, k, values, is_causal=True, **attention.gains())[0])
            x = block(x)
        return torch.stack(maps).float().cpu()

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, count: int, generator: torch.Generator, temperature: float = 0.8
    ) -> bytes:
        """Continue ``prompt`` (bytes, ``(T,)``) by ``count`` sampled bytes."""
        tokens = prompt.long()
        for _ in range(count):
            context = tokens[-self.config.length :].to(self.head.weight.device)
            logits = self(context[None])[0, -1].float().cpu() / temperature
            if not logits.isfinite().all():  # training diverged
                break
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, drawn))
        return bytes(tokens[prompt.numel() :].tolist())

    def learned_gains(self) -> list[dict[str, list[float]]]:
        """Per layer the gains of each head; empty for plain attention, which has none."""
        if self.config.attention == "plain":
            return []
        names = ("identity_gain", "softmax_gain", "center_gain")
        return [
            {name: getattr(block.attention, name).detach().cpu().tolist() for name in names}
            for block in self.blocks
        ]
