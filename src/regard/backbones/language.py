r"""A language model around any mechanism: embed, mix, predict.

    x = E[token] (+ P[position])        x = x + mechanism(conv(norm(x)))        logits = norm(x) E^T

Layers are pre-norm residual blocks, with a feed-forward network on request. The short causal
convolution (a BaseConv) in front of each mechanism tells a token its predecessors, which saves the
layer that recall would spend on that (Zoology, 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.backbones.spec import Spec, card_of, mechanism
from regard.core.call import Call
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal
from regard.core.state import Decoding, arrivals, state_bytes
from regard.layers.block import Block
from regard.layers.convolved import Convolved
from regard.layers.feedforward import FeedForward


class Language(nn.Module):
    """Tokens (B,N) -> logits (B,N,vocab).

    Args:
        vocab: token ids. dim: width. layers: one mechanism per layer, a name or (name, options).
            heads: of every mechanism. conv: taps of the convolution before each mechanism, 0 =
            none. hidden: width of the feed-forward networks, 0 = none. max_length: learned position
            embeddings for that many tokens, 0 = none. causal: predict from the past; otherwise
            every token sees all (the convolution still looks back only).

    Raises:
        UnsupportedError: a mechanism without the pattern that `causal` asks for.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: Sequence[Spec],
        *,
        heads: int = 4,
        conv: int = 3,
        hidden: int = 0,
        max_length: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.specs, self.causal, self.max_length = tuple(layers), causal, max_length
        self.embedding = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(max_length, dim) if max_length else None
        self.blocks: Any = nn.ModuleList()
        for spec in self.specs:
            mixer = mechanism(spec, dim, heads, "causal self" if causal else "noncausal self")
            feed_forward = FeedForward(dim, hidden) if hidden else None
            self.blocks.append(Block(dim, Convolved(dim, conv, mixer), feed_forward))
        self.norm = nn.LayerNorm(dim)
        for table in (self.embedding, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    @property
    def decodes(self) -> bool:
        """Whether every layer decodes token by token."""
        return self.causal and all(card_of(spec).cost.state != "none" for spec in self.specs)

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        notes: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Logits (B,N,vocab) of tokens (B,N). padding: (B,N), True = real token. notes: collects
        what the mechanisms leave (auxiliary losses, gates).
        """
        return self.logits(self.encode(tokens, padding, notes))

    def encode(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        notes: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """The last layer's output (B,N,dim), before norm and prediction."""
        x, call, _ = self.entered(tokens, padding)
        call = call.but(notes=notes)
        for layer, block in enumerate(self.blocks):
            x = block(x, call.but(layer=layer))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Predictions (…,vocab) from `encode`'s rows (…,dim), all or some."""
        return self.norm(x) @ self.embedding.weight.T

    def entered(
        self, tokens: Tensor, padding: Tensor | None, seen: Tensor | None = None
    ) -> tuple[Tensor, Call, Tensor]:
        """What enters the first layer: x (B,N,dim) of tokens that follow `seen` (B,) earlier ones,
        the call of all layers, and the count seen afterwards.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ArgumentError("tokens", "integers (B, N)", (tokens.dtype, tuple(tokens.shape)))
        mask = Causal() if self.causal else None
        call = Call(mask=mask, padding=padding, layers=len(self.specs))
        if padding is not None:
            tokens = tokens.masked_fill(~padding, 0)
        x = self.embedding(tokens)
        places, _, after = arrivals(x, call, seen)
        if self.positions is not None:
            if tokens.numel() and int(after.max()) > self.max_length:
                raise ArgumentError("tokens", f"at most {self.max_length} in all", int(after.max()))
            x = x + self.positions(places)
        return x, call.but(embeddings=x), after

    def step(
        self, tokens: Tensor, state: Decoding | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Decoding]:
        """Logits (B,T,vocab) of new tokens (B,T) after `state` (None at the start), and the state
        after them.

        Raises:
            UnsupportedError: a layer cannot decode (see `decodes`).
        """
        if not self.decodes:
            raise UnsupportedError("Language", "a layer has no decode state, or is not causal")
        x, call, seen = self.entered(tokens, padding, None if state is None else state.seen)
        before = (None,) * len(self.blocks) if state is None else state.inner
        after = []
        for layer, (block, carried) in enumerate(zip(self.blocks, before, strict=True)):
            x, carried = block.step(x, carried, call.but(layer=layer))
            after.append(carried)
        return self.logits(x), Decoding(seen, tuple(after))

    def state_bytes(self, n: int) -> int | None:
        """Bytes of decode state of one sequence after n tokens, measured by decoding them; None if
        it does not decode.
        """
        if n < 1:
            raise ArgumentError("n", "at least 1 token", n)
        if not self.decodes:
            return None
        tokens = torch.zeros(1, n, dtype=torch.long, device=self.embedding.weight.device)
        state = None
        with torch.no_grad():
            for part in tokens.split([n - 1, 1] if n > 1 else 1, 1):
                _, state = self.step(part, state)
        return state_bytes(state)
