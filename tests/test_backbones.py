"""Backbones: padding, decoding, crossing and refusals, whatever mechanism is plugged in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.backbones.encoder_decoder import EncoderDecoder
from regard.backbones.language import Language
from regard.backbones.vision import Vision
from regard.core.call import Call
from regard.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.core.mask import Causal
from regard.features.causal_conv import ImplicitTaps, LearnedTaps, causal_conv
from regard.layers.base_conv import BaseConv
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward
from regard.tasks.catalog import task

HYBRID = ["softmax", ("sliding_window", {"window": 4, "sinks": 0}), "base_conv"]


def language(layers: Any = HYBRID, **options: Any) -> Language:
    torch.manual_seed(0)
    model = Language(20, 16, layers, **{"heads": 2, "hidden": 24, "max_length": 32, **options})
    return model.double().eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_language_padding_never_matters(causal: bool, side: str) -> None:
    model = language(HYBRID[:2], causal=causal)
    tokens, junk = ids(2, 9), torch.full((2, 3), -7)
    real = torch.ones(2, 9, dtype=torch.bool)
    parts, flags = ([junk, tokens], [~real[:, :3], real])
    if side == "right":
        parts, flags = parts[::-1], flags[::-1]
    padding = torch.cat(flags, 1)
    out = model(torch.cat(parts, 1), padding)[padding].view(2, 9, -1)
    torch.testing.assert_close(out, model(tokens))


def test_language_does_not_see_the_future() -> None:
    model = language()
    tokens = ids(2, 10)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 20
    assert torch.equal(model(tokens)[:, :6], model(changed)[:, :6])
    both_ways = language(HYBRID[:2], causal=False)
    assert not torch.allclose(both_ways(tokens)[:, 0], both_ways(changed)[:, 0])


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6]])
@pytest.mark.parametrize("conv", [0, 3])
def test_language_steps_equal_forward(pieces: list[int], conv: int) -> None:
    model = language(conv=conv)
    tokens = ids(2, 12)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :4] = False
    state, outputs = None, []
    for part, real in zip(tokens.split(pieces, 1), padding.split(pieces, 1), strict=True):
        out, state = model.step(part, state, real)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1)[padding], model(tokens, padding)[padding])


def test_state_bytes_are_measured() -> None:
    full, window = language(["softmax"]), language([HYBRID[1]])
    few, many = full.state_bytes(8), full.state_bytes(32)
    assert few is not None
    assert many is not None
    assert many - few == 24 * (2 * 16 * 8 + 9)  # k and v in float64, a position and a flag
    assert window.state_bytes(8) == window.state_bytes(32) != few
    assert language(["softmax"], causal=False).state_bytes(8) is None


def test_notes_are_collected() -> None:
    class Noted(nn.Module):
        def forward(self, x: Tensor, call: Call) -> Tensor:
            call.note("layer", (call.layer, call.layers))
            return x

    model = language()
    for block in model.blocks:
        block.mixer = Noted()
    notes: dict[str, list[Any]] = {}
    model(ids(1, 4), notes=notes)
    assert notes == {"layer": [(0, 3), (1, 3), (2, 3)]}


def test_language_learns_to_recall() -> None:
    recall = task("recall", vocab=32, length=16, pairs=2)
    torch.manual_seed(0)
    model = Language(32, 32, ["softmax", "softmax"], heads=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _, batch in zip(range(120), recall.batches("train", 64), strict=False):
        asked = batch.targets != -100
        loss = F.cross_entropy(
            model.logits(model.encode(batch.inputs)[asked]), batch.targets[asked]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch = next(recall.batches("test", 512))
    asked = batch.targets != -100
    right = (model(batch.inputs).argmax(-1) == batch.targets)[asked].float().mean()
    assert right > 0.98


def crossing(**options: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    layers = ["softmax", "softmax"]
    model = EncoderDecoder(20, 16, layers[:1], layers, layers, heads=2, hidden=24, **options)
    return model.double().eval()


def test_encoder_decoder_crosses() -> None:
    model = crossing(conv=3, max_length=16)
    source, target = ids(2, 7), ids(2, 5, seed=2)
    out = model(source, target)
    assert out.shape == (2, 5, 20)
    assert not torch.allclose(out, model((source + 1) % 20, target))
    later = target.clone()
    later[:, 3:] = (later[:, 3:] + 1) % 20
    assert torch.equal(out[:, :3], model(source, later)[:, :3])


def test_encoder_decoder_padding_never_matters() -> None:
    model = crossing(max_length=16)
    source, target = ids(2, 7), ids(2, 5, seed=2)
    wide = torch.cat([torch.full((2, 2), -1), source], 1)
    tall = torch.cat([target, torch.full((2, 1), 99)], 1)
    out = model(wide, tall, torch.arange(9).expand(2, -1) > 1, torch.arange(6).expand(2, -1) < 5)
    torch.testing.assert_close(out[:, :5], model(source, target))


@pytest.mark.parametrize(("cls", "patch"), [(False, 2), (True, 2), (False, 1)])
def test_vision_runs_on_digits(cls: bool, patch: int) -> None:
    images = task("digits")
    assert images.grid is not None
    torch.manual_seed(0)
    layers = ["softmax", "softmax"]
    model = Vision(images.grid, images.channels, images.classes, 16, layers, patch=patch, cls=cls)
    batch = next(images.batches("train", 6))
    out = model(batch.inputs)
    assert out.shape == (6, 10)
    F.cross_entropy(out, batch.targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_vision_patches_are_squares_of_the_grid() -> None:
    model = Vision((4, 6), 2, 3, 8, ["softmax"], patch=2)
    pixels = torch.arange(48.0).view(1, 24, 2)
    image = pixels.view(4, 6, 2)
    patches = model._patches(pixels)
    assert patches.shape == (1, 6, 8)
    assert torch.equal(patches[0, 4], image[2:4, 2:4].flatten())


def test_block_wirings() -> None:
    torch.manual_seed(0)
    x, call = torch.randn(2, 13, 8), Call(grid=(3, 4), prefix=1)

    class Doubled(nn.Module):
        def forward(self, x: Tensor, call: Call) -> Tensor:
            return 2 * x

    feed = FeedForward(8, 16, gated=True, conv=3)
    one = Block(8, Doubled(), feed, single_residual=True)
    inner = feed(one.norm2(2 * one.norm1(x)), call)  # pyright: ignore[reportOptionalCall]
    torch.testing.assert_close(one(x, call), x + inner)

    two = Block(8, Doubled(), feed, cpe_first=3, cpe_second=3, layer_scale=0.5, norm=nn.RMSNorm)
    assert two.cpe_first is not None
    assert two.cpe_second is not None
    assert two.norm2 is not None
    y = two.cpe_first(x, call)
    assert torch.equal(y[:, 0], x[:, 0])
    image = x[:, 1:].mT.view(2, 8, 3, 4)
    torch.testing.assert_close(y[:, 1:], x[:, 1:] + two.cpe_first.conv(image).flatten(2).mT)
    y = y + 0.5 * 2 * two.norm1(y)
    y = two.cpe_second(y, call)
    torch.testing.assert_close(two(x, call), y + 0.5 * feed(two.norm2(y), call))


def test_block_ignores_padded_content_in_gradients() -> None:
    block = Block(8, BaseConv(8), FeedForward(8, 16))
    x = torch.randn(2, 6, 8)
    x[:, 4:] = float("nan")
    padding = torch.arange(6).expand(2, -1) < 4
    block(x, Call(mask=Causal(), padding=padding))[padding].sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("build", [LearnedTaps, ImplicitTaps])
def test_long_filters_mean_what_short_ones_do(build: Any) -> None:
    torch.manual_seed(0)
    taps = build(3, 90).double()
    x = torch.randn(2, 70, 3, dtype=torch.float64)
    filters, bias = taps.first(70)
    expected = torch.zeros_like(x)
    for j in range(70):
        expected[:, j:] += filters[:, j] * x[:, : 70 - j]
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(causal_conv(x, taps), expected)


def test_base_conv_with_a_long_filter_decodes() -> None:
    torch.manual_seed(0)
    layer = BaseConv(4, kernel=70, implicit=True).double()
    x = torch.randn(2, 75, 4, dtype=torch.float64)
    first, state = layer.step(x[:, :60], None)
    second, state = layer.step(x[:, 60:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), layer(x))
    assert state.tokens.shape == (2, 69, 4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="noncausal self"):
        language(["base_conv"], causal=False)
    with pytest.raises(UnsupportedError, match="noncausal cross"):
        EncoderDecoder(20, 16, ["softmax"], ["softmax"], ["base_conv"])
    with pytest.raises(UnsupportedError, match="grid of 2 axes"):
        Vision((4, 4), 1, 2, 8, ["sliding_window"])
    with pytest.raises(UnknownNameError):
        language(["softmaks"])
    with pytest.raises(UnknownNameError, match="window"):
        language([("sliding_window", {"windows": 3})])
    with pytest.raises(ArgumentError, match="at most 32"):
        language()(ids(1, 33))
    with pytest.raises(ArgumentError, match="tokens"):
        language()(ids(4))
    with pytest.raises(ArgumentError, match="cross"):
        EncoderDecoder(20, 16, ["softmax"], ["softmax"], [])
    with pytest.raises(ArgumentError, match="patch"):
        Vision((4, 4), 1, 2, 8, ["softmax"], patch=3)
    with pytest.raises(ArgumentError, match="pixels"):
        Vision((4, 4), 1, 2, 8, ["softmax"])(torch.randn(1, 15, 1))
    with pytest.raises(UnsupportedError, match="decode"):
        language(["softmax"], causal=False).step(ids(1, 1))
    with pytest.raises(UnsupportedError, match="later tokens"):
        Block(8, BaseConv(8), cpe_first=3).step(torch.randn(1, 1, 8), None, Call(mask=Causal()))
    with pytest.raises(UnsupportedError, match="decoding step"):
        Block(8, nn.Identity()).step(torch.randn(1, 1, 8), None, Call(mask=Causal()))
