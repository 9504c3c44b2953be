"""Checks of shape, batch, heads, lengths and storage."""

from __future__ import annotations

import io

import torch
from torch import nn

from regard.core.card import Card
from regard.core.weights import repeat_heads
from regard.testing.compare import close, finite, same
from regard.testing.subject import Subject


def shapes(card: Card) -> None:
    """Output shape, dtype and finiteness in every claimed pattern, in float64 and float32."""
    for pattern in card.patterns:
        for dtype in (torch.float64, torch.float32):
            subject = Subject(card, pattern, dtype=dtype)
            inputs = subject.inputs()
            out = subject.run(inputs)
            expected = (*inputs[0].shape[:-1], inputs[-1].shape[-1])
            assert out.shape == expected, f"{pattern}: {tuple(out.shape)}, expected {expected}"
            assert out.dtype == dtype, f"{pattern}: {out.dtype} from {dtype}"
            finite(out, pattern)


def batch_rows_independent(card: Card) -> None:
    """A row of the batch gives what it gives alone."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs(batch=3)
        whole = subject.run(inputs)
        for row in range(3):
            alone = subject.run([x[row : row + 1] for x in inputs])
            close(alone, whole[row : row + 1], f"{pattern}, row {row} alone", 1e-10)


def grouped_heads(card: Card) -> None:
    """Shared key and value heads give what repeated ones give."""
    for pattern in card.patterns:
        subject = Subject(card, pattern, kv_heads=card.example.heads // 2)
        q, k, v = subject.inputs()
        repeated = [q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])]
        close(subject.run([q, k, v]), subject.run(repeated), pattern, 1e-10)


def lengths(card: Card) -> None:
    """No token, one token, odd numbers of tokens; no key at all gives zeros in cross attention."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        for n in (0, 1, 2, 7, card.example.length + 1):
            inputs = subject.inputs(n)
            inputs = [x.requires_grad_() for x in inputs]
            out = subject.run(inputs, subject.call(grid=None))
            assert out.shape[-2] == n, f"{pattern}: {n} tokens became {out.shape[-2]}"
            finite(out, f"{pattern}, {n} tokens")
            if n:
                out.square().sum().backward()
                for x in inputs:
                    finite(x.grad, f"{pattern}, gradient at {n} tokens")
        if subject.cross and card.kind == "operator":
            out = subject.run(subject.inputs(3, 0), subject.call(grid=None))
            assert not out.any(), f"{pattern}: no keys, yet the output is not zero"


def strides(card: Card) -> None:
    """Non-contiguous input gives what its contiguous copy gives, and input is not written to."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        before = [x.clone() for x in inputs]
        expected = subject.run(inputs)
        for x, kept in zip(inputs, before, strict=True):
            same(x, kept, f"{pattern}: an input was modified")
        strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
        swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
        close(subject.run(strided), expected, f"{pattern}, strided", 1e-12)
        close(subject.run(swapped), expected, f"{pattern}, batch not outermost", 1e-12)


def state_dict(card: Card) -> None:
    """Saved and loaded parameters (weights only, no pickled code) give the same output."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        if not isinstance(subject.built, nn.Module):
            return
        buffer = io.BytesIO()
        torch.save(subject.built.state_dict(), buffer)
        buffer.seek(0)
        twin = Subject(card, pattern, randomise=False)
        twin.built.load_state_dict(torch.load(buffer, weights_only=True))
        inputs = subject.inputs()
        same(twin.run(inputs), subject.run(inputs), pattern)
