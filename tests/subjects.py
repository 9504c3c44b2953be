"""Small models for tests of plans from the command line, and models that answer by rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from regard.tasks.vocabulary import SIZE, Vocabulary

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": None,
}
KEY_BYTES = 2 * 3 * 2 * 8 * 4
"""Bytes of one token in a dense cache: keys and values, layers, key heads, width, float32."""


def small_llama(vocabulary: int = SIZE, positions: int = 2048) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **SHAPE)
    return LlamaForCausalLM(config).eval()


def small_pocket() -> tuple[Any, Vocabulary]:
    """What `regard.pocket.language()` gives, untrained."""
    return small_llama(), Vocabulary()


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, after a token that begins the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def saved_model(folder: Path) -> Path:
    """A folder with a small Llama and its tokenizer."""
    small_llama(257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Rule:
    """A model that says what a rule makes of all it has read: ids (N,) -> the next id. Its cache is
    what it has read.
    """

    device = torch.device("cpu")

    def __init__(self, rule: Callable[[Tensor], int], vocabulary: int = SIZE) -> None:
        self.rule, self.vocabulary = rule, vocabulary

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        read = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        said = torch.tensor([self.rule(row) for row in read])
        logits = torch.nn.functional.one_hot(said, self.vocabulary).float()[:, None]
        return SimpleNamespace(logits=logits, past_key_values=read)

    __call__ = forward
