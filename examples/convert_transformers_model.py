"""Convert a trained Hugging Face model to shaped attention, and back.

``python examples/convert_transformers_model.py`` trains a tiny Llama on the sources of Python's
standard library, byte by byte, in five phases of which only the second and the fourth move the
gains: plain, plain to shaped, shaped, shaped to plain, plain. Nothing jumps where the attention is
exchanged: the loss before and after is the same.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shaped_attn.integrations.transformers import apply_shaped_attention, remove_shaped_attention
from shaped_attn.nn import anneal_gains
from shaped_attn.train.corpus import BYTE_VALUES, Corpus, fixed_windows, sample_batch
from shaped_attn.train.data import load_standard_library


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BYTE_VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def validation_loss(model: PreTrainedModel, windows: Tensor) -> float:
    model.eval()
    return model(windows, labels=windows).loss.item()


class Training:
    """One optimizer over all phases. The weights stay the same tensors through the conversions."""

    def __init__(self, model: PreTrainedModel, corpus: Corpus, *, batch: int, length: int) -> None:
        self.model, self.data, self.size = model, corpus.train, (batch, length)
        self.windows = fixed_windows(corpus.validation, 16, length).long()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.generator = torch.Generator().manual_seed(0)
        self.losses: dict[str, float] = {}

    def phase(self, name: str, steps: int, start: float | None = None, end: float = 0.0) -> None:
        """Train; with ``start`` move the gains from there to ``end``; 0 is shaped, 1 plain."""
        for step in range(steps):
            if start is not None:
                anneal_gains(self.model, start + (end - start) * (step + 1) / steps)
            ids = sample_batch(self.data, *self.size, self.generator).long()
            self.model.train()
            loss = self.model(ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.record(name)

    def record(self, name: str) -> None:
        """Measure the validation loss."""
        self.losses[name] = validation_loss(self.model, self.windows)
        print(f"{name:28s} validation loss {self.losses[name]:.4f} nats per byte", flush=True)


def convert(model: PreTrainedModel, corpus: Corpus, steps: int, batch: int, length: int) -> dict:
    """Return the validation loss after each phase and each exchange, by name."""
    training = Training(model, corpus, batch=batch, length=length)
    training.phase("trained plain", steps)

    # scale="standard" keeps the model's own temperature, so that fraction 1 is the plain model.
    apply_shaped_attention(model, scale="standard", annealable=True)
    anneal_gains(model, 1.0)
    training.record("shaped attention put in")

    training.phase("annealed to shaped", steps, start=1.0, end=0.0)
    training.phase("trained shaped", steps)
    training.phase("annealed to plain", steps, start=0.0, end=1.0)

    remove_shaped_attention(model)  # what is saved now loads without shaped_attn
    training.record("shaped attention taken out")
    training.phase("trained plain again", steps)
    return training.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each phase")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    corpus = load_standard_library(max_bytes=1_000_000)
    convert(tiny_model(), corpus, arguments.steps, arguments.batch, arguments.length)


if __name__ == "__main__":
    main()
