"""Checks of decoding: token by token equals all at once, and the state is what it claims to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Card
from regard.core.mask import Causal
from regard.core.state import state_bytes
from regard.layers.attention import Attention
from regard.testing.compare import close
from regard.testing.subject import Subject, shake


def _layer(card: Card) -> Any:
    """The mechanism as a layer, in float64."""
    if card.kind == "layer":
        return Subject(card, "causal self").built
    example = card.example
    sized = example.sized((example.length,)) if example.sized else {}
    torch.manual_seed(0)
    layer = Attention(
        example.dim,
        example.heads,
        card.name,
        {**example.options, **sized},
        kv_heads=example.heads // 2,
        rope="half",
    )
    shake(layer.double().eval())
    return layer


def _pieces(layer: Any, x: Tensor, sizes: list[int], padding: Tensor | None = None) -> Tensor:
    state, outputs, start = None, [], 0
    for size in sizes:
        part = slice(start, start + size)
        call = Call(mask=Causal(), padding=None if padding is None else padding[:, part])
        out, state = layer.step(x[:, part], state, call)
        outputs.append(out)
        start += size
    return torch.cat(outputs, 1)


def decode(card: Card) -> None:
    """Steps of one token, and of several, give the rows of one full forward."""
    layer = _layer(card)
    n = card.example.length
    x = torch.randn(
        2, n, card.example.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    full = layer(x, Call(mask=Causal()))
    close(_pieces(layer, x, [1] * n), full, "one token at a time")
    close(_pieces(layer, x, [5, 1, 1, n - 7]), full, "several tokens at a time")


def decode_padding(card: Card) -> None:
    """A left-padded prompt decodes like the same prompt alone."""
    layer = _layer(card)
    n = card.example.length
    x = torch.randn(
        2, n + 3, card.example.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    padding = torch.ones(2, n + 3, dtype=torch.bool)
    padding[0, :3] = False
    out = _pieces(
        layer, x.masked_fill(~padding[..., None], float("nan")), [6] + [1] * (n - 3), padding
    )
    close(out[:1, 3:], layer(x[:1, 3:], Call(mask=Causal())), "left-padded row")
    close(out[1:], layer(x[1:], Call(mask=Causal())), "row without padding")


def state_size(card: Card) -> None:
    """A "constant" state stops growing; a "keys" state does not pretend to."""
    layer = _layer(card)
    long = 12 * card.example.length
    x = torch.randn(1, long, card.example.dim, dtype=torch.float64)
    state, sizes = None, []
    for t in range(long):
        _, state = layer.step(x[:, t : t + 1], state, Call(mask=Causal()))
        sizes.append(state_bytes(state))
    half, whole = max(sizes[: long // 2]), max(sizes)
    if card.cost.state == "constant":
        assert whole <= half, f"state grew from {half} to {whole} bytes, claimed constant"
    else:
        assert whole > half, f"state stays at {whole} bytes; claim it as constant"


def bottom_right(card: Card) -> None:
    """Fewer queries than keys: causal means that the last query sees the last key."""
    subject = Subject(card, "causal self")
    q, k, v = subject.inputs()
    full = subject.run([q, k, v])
    for n in (1, 2, 5):
        close(subject.run([q[:, :, -n:], k, v]), full[:, :, -n:], f"last {n} queries", 1e-10)
    assert replace(subject.call()).mask == Causal()
