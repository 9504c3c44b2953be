r"""A small decoder to train from scratch and look into, for studies.

    x = E[token] + P[position]        x = x + attention(norm(x))        x = x + mlp(norm(x))
    logits = U norm(x)        x: (B,N,C)

E and P start normal with variance 1, and U is not tied to E. That matters for findings about the
first token: tied and started small, the same decoder parked nothing there in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.mask import Causal
from regard.core.study import Progress
from regard.layers.attention import Attention
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward


class Look(NamedTuple):
    """What a layer did: values (B,H,N,D), weights (B,H,N,N), and what left its block (B,N,C)."""

    values: Tensor
    weights: Tensor
    residual: Tensor


class Watched(Attention):
    """Attention that notes the outputs (B,H,N,D) of its heads as "heads"."""

    def heads_out(self, o: Tensor, x: Tensor, call: Call) -> Tensor:
        """Output (B,N,C)."""
        call.note("heads", o)
        return super().heads_out(o, x, call)

    def look(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Values and weights for the layer's input x (B,N,C)."""
        q, k, v = self.heads_in(x, x, call)
        unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
        return v, self.inner(q, k, unit, call).output


class Decoder(nn.Module):
    """Tokens (B,N) -> logits (B,N,vocab).

    Args:
        vocab: token ids. length: most tokens. dim: width. layers, heads: how many. operator: name
            of its card, with `options`.
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        dim: int,
        *,
        layers: int = 1,
        heads: int = 1,
        operator: str = "softmax",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks: Any = nn.ModuleList()
        for _ in range(layers):
            attention = Watched(dim, heads, operator, options)
            self.blocks.append(Block(dim, attention, FeedForward(dim, 4 * dim, bias=False)))
        self.norm, self.output = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor, notes: dict[str, list[Any]] | None = None) -> Tensor:
        """Logits (B,N,vocab); notes collects the head outputs of each layer under "heads"."""
        x, call = self.embedded(tokens), Call(mask=Causal(), notes=notes)
        for block in self.blocks:
            x = block(x, call)
        return self.output(self.norm(x))

    def embedded(self, tokens: Tensor) -> Tensor:
        """What enters the first block, (B,N,C)."""
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    @torch.no_grad()
    def looks(self, tokens: Tensor) -> list[Look]:
        """A look into every layer."""
        x, call, found = self.embedded(tokens), Call(mask=Causal()), []
        for block in self.blocks:
            values, weights = block.mixer.look(block.norm1(x), call)
            x = block(x, call)
            found.append(Look(values, weights, x))
        return found


@dataclass
class Steps:
    """Counts the steps of several trainings towards one progress."""

    total: int
    progress: Progress
    done: int = 0

    def take(self) -> None:
        """One more."""
        self.done += 1
        self.progress(self.done / self.total)


def train(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float, count: Steps
) -> Iterator[int]:
    """Take steps of AdamW (0.9, 0.99; decay 1e-4) on a loss that draws its own batches; after each,
    its number, from 1.
    """
    optimiser = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=1e-4)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        count.take()
        yield step
