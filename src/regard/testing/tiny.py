"""Tiny transformers models with random weights, for the contract of treatments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.errors import UnsupportedError

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def tiny_decoder(*, seed: int = 0) -> Any:
    """A Llama in float64: 3 layers, 4 heads over 2 key heads of width 8."""
    transformers = _library()
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2)
    return _built(transformers.LlamaForCausalLM, config, seed)


def tiny_encoder(*, seed: int = 0) -> Any:
    """A BERT in float64: 3 layers, 4 heads of width 8."""
    transformers = _library()
    config = transformers.BertConfig(**SHAPE)
    return _built(transformers.BertForMaskedLM, config, seed)


def prompt(length: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    """Random token ids (B, N)."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=source)


def _built(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).double().eval()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            "the contract of treatments",
            "transformers is missing: pip install regard[transformers]",
        ) from error
    return transformers
