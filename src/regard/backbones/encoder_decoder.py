r"""An encoder–decoder around any mechanisms: one sequence is read, another is written.

    m = encoder(source)        per layer: x = x + self(norm(x)),  x = x + cross(norm(x), m)

The decoder's own mechanism looks back only; the cross mechanism takes keys and values from all m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard.backbones.language import Language
from regard.backbones.spec import Spec, mechanism
from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward


class EncoderDecoder(nn.Module):
    """Source (B,M) and target (B,N) tokens -> logits (B,N,vocab).

    Args:
        vocab: token ids, shared. dim: width. encoder, decoder, cross: one mechanism per layer;
            decoder and cross have one length. heads, conv, hidden, max_length: as in Language.

    Raises:
        UnsupportedError: a mechanism that has not got the pattern of its place: noncausal self,
            causal self or noncausal cross.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        encoder: Sequence[Spec],
        decoder: Sequence[Spec],
        cross: Sequence[Spec],
        *,
        heads: int = 4,
        conv: int = 0,
        hidden: int = 0,
        max_length: int = 0,
    ) -> None:
        super().__init__()
        if len(cross) != len(decoder):
            raise ArgumentError("cross", f"{len(decoder)} mechanisms as decoder", len(cross))
        self.encoder = Language(
            vocab,
            dim,
            encoder,
            heads=heads,
            conv=conv,
            hidden=hidden,
            max_length=max_length,
            causal=False,
        )
        self.decoder = Language(vocab, dim, decoder, heads=heads, conv=conv, max_length=max_length)
        self.cross = nn.ModuleList(
            Block(
                dim,
                mechanism(spec, dim, heads, "noncausal cross"),
                FeedForward(dim, hidden) if hidden else None,
            )
            for spec in cross
        )

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
        notes: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Logits (B,N,vocab); paddings (B,M) and (B,N), True = real token."""
        memory = self.encoder.norm(self.encoder.encode(source, source_padding, notes))
        x, call, _ = self.decoder.entered(target, target_padding)
        reading = Call(padding=source_padding, query_padding=target_padding, layers=len(self.cross))
        for layer, (block, cross) in enumerate(zip(self.decoder.blocks, self.cross, strict=True)):
            x = block(x, call.but(layer=layer, notes=notes))
            x = cross(x, reading.but(layer=layer, notes=notes), memory)
        return self.decoder.logits(x)
