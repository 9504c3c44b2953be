"""A subject: one mechanism in one pattern, ready to be run on random input, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card, Pattern
from regard.core.mask import Causal
from regard.layers.attention import bind_card


@dataclass
class Subject:
    """A mechanism built from its card's example, in float64 with every parameter randomised.

    Token tensors have shape (…, tokens, width): q, k, v for operators, x (and a context) for
    layers. `size` is the grid, or (length,) for 1-D input.
    """

    card: Card
    pattern: Pattern
    size: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    kv_heads: int | None = None
    randomise: bool = True

    def __post_init__(self) -> None:
        """Build the mechanism."""
        example = self.card.example
        self.size = self.size or example.grid or (example.length,)
        chosen = {
            **example.options,
            **(example.sized(self.size) if example.sized else {}),
            **self.options,
        }
        torch.manual_seed(0)
        if self.card.kind == "operator":
            self.built = bind_card(self.card, example.heads, example.dim // example.heads, chosen)
        else:
            self.built = self.card.build(dim=example.dim, heads=example.heads, **chosen)
        if isinstance(self.built, nn.Module):
            self.built = self.built.to(self.dtype).eval()
            if self.randomise:
                shake(self.built)

    @property
    def tokens(self) -> int:
        """Tokens of a full input."""
        total = 1
        for side in self.size:
            total *= side
        return total + self.card.example.prefix

    @property
    def causal(self) -> bool:
        """Whether the pattern is causal."""
        return self.pattern.startswith("causal")

    @property
    def cross(self) -> bool:
        """Whether keys come from elsewhere."""
        return self.pattern.endswith("cross")

    def inputs(
        self, n: int | None = None, m: int | None = None, batch: int = 2, seed: int = 1
    ) -> list[Tensor]:
        """Random input: [q, k, v] or [x] or [x, context]; cross patterns have more keys than
        queries.
        """
        n = self.tokens if n is None else n
        m = (n + 3 if self.cross else n) if m is None else m
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        example = self.card.example
        if self.card.kind == "layer":
            own = draw(batch, n, example.dim)
            return [own, draw(batch, m, example.dim)] if self.cross else [own]
        width, heads = example.dim // example.heads, example.heads
        shared = self.kv_heads or heads
        return [
            draw(batch, heads, n, width),
            draw(batch, shared, m, width),
            draw(batch, shared, m, width),
        ]

    def call(self, **changes: Any) -> Call:
        """The pattern's call: causal or not, with the grid where there is one."""
        grid = self.size if len(self.size) > 1 or 1 not in self.card.grids else None
        base = Call(
            mask=Causal() if self.causal else None, grid=grid, prefix=self.card.example.prefix
        )
        return base.but(**changes)

    def padded_call(self, padding: Tensor) -> Call:
        """A call with key padding; in self-attention the same tokens are padded queries."""
        return self.call(padding=padding, query_padding=None if self.cross else padding)

    def run(self, inputs: list[Tensor], call: Call | None = None) -> Tensor:
        """Output (…, tokens, width)."""
        call = self.call() if call is None else call
        if self.card.kind == "operator":
            return self.built(*inputs, call).output
        if self.cross:
            return self.built(inputs[0], call, context=inputs[1])
        return self.built(inputs[0], call)

    def sources(self, inputs: list[Tensor]) -> list[int]:
        """Indices of the inputs that hold keys and values."""
        if self.card.kind == "operator":
            return [1, 2]
        return [1] if self.cross else [0]


def shake(module: nn.Module) -> None:
    """Add noise to every parameter, so that zero initial values cannot hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * noise.to(parameter.dtype)
