r"""Information gates: noisy factors on what a model's parts give, learned with it, that say which
parts it can do without.

    x <- z x        z = mu + eps sigma, eps ~ N(0,1) drawn for each sequence
    information = sum 1/2 log(1 + mu^2 / sigma^2)        R = log(sigma^2 / mu^2)
    open: R < 0        once trained: z = mu if open, else 0        how open: sigmoid(-10 R)

Families: `heads` (one gate per key head and the query heads that share it) and `units`, on what
enters the projections back to the stream; `channels`, one vector for the stream, on everything that
is written to it, the embedding included; `layers`, on what a layer's two parts write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.linears import BlockLinears, sides
from regard.probes.vtrans import START, Gate

FAMILIES = ("heads", "units", "channels", "layers")
SPREAD = 0.01  # of mu and log sigma^2 before the first step
SHARP = 10.0


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors by family, with a leading axis of sequences or of 1: heads (B,L,G), units (B,L,I),
    channels (B,C), layers (B,L).
    """

    heads: Tensor
    units: Tensor
    channels: Tensor
    layers: Tensor


class InformationGates(nn.Module):
    """Gates of some families over a model's blocks; those of the others are open for good.

    Each family has parameters mu and log sigma^2, drawn near open gates without noise.

    Raises:
        ArgumentError: unknown families, or none.
    """

    def __init__(
        self, model: Any, blocks: Sequence[BlockLinears], families: Sequence[str], seed: int = 0
    ) -> None:
        super().__init__()
        if not families or not set(families) <= set(FAMILIES):
            raise ArgumentError("families", f"some of {', '.join(FAMILIES)}", families)
        depth, site = len(blocks), blocks[0].site
        self.shapes: dict[str, tuple[int, ...]] = {
            "heads": (depth, site.kv_heads),
            "units": (depth, blocks[0].width),
            "channels": (model.config.hidden_size,),
            "layers": (depth,),
        }
        self.families = tuple(families)
        self.mu, self.log_noise = nn.ParameterDict(), nn.ParameterDict()
        self.random = torch.Generator().manual_seed(seed)
        like = next(model.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        for name in self.families:
            for store, middle in ((self.mu, START[0]), (self.log_noise, START[1])):
                drawn = torch.randn(self.shapes[name], generator=self.random) * SPREAD + middle
                store[name] = nn.Parameter(drawn.to(device=like.device, dtype=wide))

    def gate(self, family: str) -> Gate:
        """The gates of a family."""
        return Gate(self.mu[family], self.log_noise[family])

    def information(self, weights: Mapping[str, float]) -> Tensor:
        """Sum over families of their information, in nats, times their weights."""
        return torch.stack(
            [weights[name] * self.gate(name).information() for name in self.families]
        ).sum()

    def drawn(self, batch: int) -> Factors:
        """Noisy factors, anew for each sequence."""
        found = {}
        for name in self.families:
            gate = self.gate(name)
            noise = torch.randn(batch, *self.shapes[name], generator=self.random).to(gate.mu)
            found[name] = gate.mu + noise * (gate.log_noise / 2).exp()
        return self._factors(found)

    def means(self) -> Factors:
        """mu of all gates, open or shut; the leading axis is 1."""
        return self._factors({name: self.gate(name).mu.detach()[None] for name in self.families})

    def soft(self) -> Factors:
        """How open gates are, 0 to 1, differentiable."""
        found = {n: torch.sigmoid(-SHARP * self.ratios(n))[None] for n in self.families}
        return self._factors(found)

    def ratios(self, family: str) -> Tensor:
        """R of a family's gates; far below 0 of a family that has none."""
        if family in self.families:
            return self.gate(family).noise_to_signal()
        return torch.full(self.shapes[family], START[1])

    def _factors(self, found: Mapping[str, Tensor]) -> Factors:
        like = next(iter(self.mu.values()))
        ones = {n: like.new_ones(1, *shape) for n, shape in self.shapes.items() if n not in found}
        return Factors(**found, **ones)


@contextmanager
def multiplied(model: Any, blocks: Sequence[BlockLinears], factors: Factors) -> Iterator[None]:
    """A context in which factors act on a model."""

    def scaled(x: Any, by: Tensor) -> Any:
        """x (B,N,C) times by (B or 1, C)."""
        return x * by[:, None].to(x.dtype)

    with ExitStack() as hooks:
        hooks.callback(
            model.get_input_embeddings()
            .register_forward_hook(lambda _, args, output: scaled(output, factors.channels))
            .remove
        )
        for layer, one in enumerate(blocks):
            width = sides(one.joined)[0] // one.site.kv_heads
            written = factors.channels * factors.layers[:, layer, None]
            entering = factors.heads[:, layer].repeat_interleave(width, -1), factors.units[:, layer]
            for module, by in zip((one.joined, one.back), entering, strict=True):

                def enter(_: Any, args: Any, by: Tensor = by) -> Any:
                    return (scaled(args[0], by), *args[1:])

                def leave(_: Any, args: Any, output: Any, by: Tensor = written) -> Any:
                    return scaled(output, by)

                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield
