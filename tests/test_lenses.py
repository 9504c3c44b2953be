"""Saliency: relevance, NormGrad, gradient times attention, occlusion, agreement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.scene import Scene
from regard.lenses.activations import activations
from regard.lenses.agreement import mean_of_heads, pearson, spearman, standardised, top_overlap
from regard.lenses.gradient_attention import attention_of, gradient_attention, rolled
from regard.lenses.maps import product, unit_range
from regard.lenses.normgrad import class_sensitivity, saliency, stepped
from regard.lenses.occlusion import (
    divergence,
    frames_of,
    occlusion,
    one_by_one,
    segment_masks,
    segments,
)
from regard.lenses.relevance import relevance
from regard.lenses.salient import salient_relevance
from regard.tasks.needle import Needle
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder
from regard.treatments.head_gain import HeadGain

KERNELS = ("fused", "by hand")


class Block(nn.Module):
    """A block without biases: everything in it conserves relevance."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.first, self.second = nn.LayerNorm(8, bias=False), nn.RMSNorm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.up, self.gate = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down, self.act = nn.Linear(16, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (2, 4)).mT for z in self.qkv(self.first(x)).chunk(3, -1))
        q, k, v = (z.permute(0, 3, 1, 2) for z in (q, k, v))
        if self.kernel == "fused":
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = (q @ k.mT / 2).softmax(-1) @ v
        x = x + self.out(o.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


def blocks(kernel: str) -> nn.Module:
    return nn.Sequential(Block(kernel), Block(kernel), nn.Linear(8, 3, bias=False)).double().eval()


def images() -> nn.Module:
    """A convolutional network without biases, which norms and pools every way."""
    return (
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, stride=2, bias=False),
            nn.GroupNorm(2, 4, affine=False),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3, bias=False),
        )
        .double()
        .eval()
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_relevance_is_conserved_through_attention(kernel: str) -> None:
    model, x = blocks(kernel), torch.randn(3, 7, 8).double()

    def score(z: Tensor) -> Tensor:
        return model(z)[:, 4, 1]

    found = relevance(model, score, x)
    torch.testing.assert_close(found.sum((1, 2)), score(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["values", "all"])
def test_kernels_agree(attention: Any) -> None:
    model, x = blocks("fused"), torch.randn(2, 5, 8).double()
    by_hand = blocks("by hand")
    by_hand.load_state_dict(model.state_dict())
    found = [
        relevance(m, lambda z, m=m: m(z)[:, 0, 0], x, attention=attention) for m in (model, by_hand)
    ]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid", "cosformer", "hedgehog"])
def test_relevance_is_conserved_through_mechanisms(mechanism: str) -> None:
    model = regard.create(mechanism, dim=32, heads=4).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(0.0 if name.endswith("bias") else 1.0)
    x = torch.randn(2, 9, 32).double()
    found = relevance(model, lambda z: model(z)[:, 5, 3], x)
    torch.testing.assert_close(found.sum((1, 2)), model(x)[:, 5, 3], rtol=1e-9, atol=1e-12)


def test_relevance_is_conserved_through_images() -> None:
    model, x = images(), torch.randn(2, 2, 12, 12).double()
    found = relevance(model, lambda z: model(z)[:, 1], x)
    torch.testing.assert_close(found.sum((1, 2, 3)), model(x)[:, 1], rtol=1e-10, atol=1e-12)


def test_relevance_leaves_the_forward_and_the_model_as_they_were() -> None:
    model, x, seen = tiny_decoder(), prompt(9, batch=2), []
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    def score(z: Tensor) -> Tensor:
        seen.append(model(inputs_embeds=z).logits)
        return seen[-1][:, -1, 5]

    embedded = model.get_input_embeddings()(x)
    found = relevance(model, score, embedded)
    assert torch.equal(seen[0], model(inputs_embeds=embedded).logits)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with pytest.raises(ZeroDivisionError):
        relevance(model, lambda z: z / (1 // 0), embedded)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    # the norms of this model compute in float32
    torch.testing.assert_close(found.sum((1, 2)), seen[0][:, -1, 5], rtol=1e-5, atol=1e-6)


def test_relevance_under_a_plan() -> None:
    model = tiny_decoder()
    x = model.get_input_embeddings()(prompt(9)).detach()
    with Scene.of(model, ()).treated(HeadGain(0.5)):
        found = relevance(model, lambda z: model(inputs_embeds=z).logits[:, -1, 5], x)
        treated = model(inputs_embeds=x).logits[:, -1, 5]
    torch.testing.assert_close(found.sum((1, 2)), treated, rtol=1e-5, atol=1e-6)


def test_padding_has_no_relevance() -> None:
    model, ids = tiny_decoder(), prompt(8)
    embed = model.get_input_embeddings()
    alone = relevance(model, lambda z: model(inputs_embeds=z).logits[:, -1, 5], embed(ids))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 3).long()[None]
    found = relevance(
        model,
        lambda z: model(inputs_embeds=z, attention_mask=mask).logits[:, -1, 5],
        embed(padded),
    )
    assert not found[:, :3].any()
    torch.testing.assert_close(found[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_rules_of_one_linear_layer() -> None:
    layer = nn.Linear(4, 3).double().eval()
    x, w, b = torch.rand(2, 4).double(), layer.weight, layer.bias
    one = relevance(layer, lambda z: layer(z)[:, 1], x)
    torch.testing.assert_close(one, x * w[1])
    y = layer(x)[:, 1:2]
    damped = relevance(layer, lambda z: layer(z)[:, 1], x, epsilon=0.5)
    torch.testing.assert_close(damped, x * w[1] * y / (y + 0.5 * y.sign()))
    up = w.clamp(min=0)
    every = relevance(layer, lambda z: layer(z).sum(-1), x, linear="positive")
    torch.testing.assert_close(every, x * ((layer(x) / (x @ up.mT)) @ up))
    torch.testing.assert_close(every.sum(1), (x @ w.mT + b).sum(1))
    signed = x - 0.5
    parts = (w * signed[:, None]).clamp(min=0)  # what each input gives each output, (B,3,4)
    found = relevance(layer, lambda z: layer(z)[:, 2], signed, linear="positive")
    share = parts[:, 2] / parts[:, 2].sum(-1, keepdim=True)
    torch.testing.assert_close(found, share * layer(signed)[:, 2:])


def test_positive_rule_conserves_and_equals_gradient_times_input_where_all_is_positive() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(5, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 2),
    )
    model, x = model.double().eval(), torch.rand(3, 1, 10, 10).double()

    def score(z: Tensor) -> Tensor:
        return model(z)[:, 0]

    found = relevance(model, score, x, linear="positive")
    torch.testing.assert_close(found.sum((1, 2, 3)), score(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p.abs() if name.endswith("weight") else torch.zeros_like(p))
    plain = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(plain).sum(), plain)
    positive = relevance(model, score, x, linear="positive")
    torch.testing.assert_close(positive, x * gradient)
    torch.testing.assert_close(positive, relevance(model, score, x))


def test_relevance_of_parts() -> None:
    """An identity passes it, a maximum hands it to the largest, a residual sum splits it, an
    activation passes it, attention weighs it.
    """
    x = torch.tensor([[1.0, 3.0, -2.0, 5.0]], dtype=torch.float64)
    identity = nn.Identity().eval()
    torch.testing.assert_close(relevance(identity, lambda z: identity(z).sum(-1), x), x)
    largest = relevance(identity, lambda z: F.max_pool1d(z[:, None], 2)[:, 0].sum(-1), x)
    torch.testing.assert_close(largest, x * torch.tensor([0.0, 1, 0, 1]).double())
    split = relevance(identity, lambda z: (z + 3 * z).sum(-1), x)
    torch.testing.assert_close(split, 4 * x)
    passed = relevance(identity, lambda z: F.silu(z).sum(-1), x)
    torch.testing.assert_close(passed, F.silu(x))
    square = relevance(identity, lambda z: (z.pow(2) + z * z * z).sum(-1), x)
    torch.testing.assert_close(square, x**2 + x**3)
    shares = relevance(identity, lambda z: (z / z.norm(dim=-1, keepdim=True)).sum(-1), x)
    torch.testing.assert_close(shares, x / x.norm())
    weights = torch.rand(1, 4, 4).double().softmax(-1)
    weighed = relevance(identity, lambda z: (weights.log().softmax(-1) @ z[..., None])[:, 2, 0], x)
    torch.testing.assert_close(weighed, weights[:, 2] * x)


def test_relevance_finds_the_needle() -> None:
    model, _ = regard.pocket.language()
    question = next(iter(Needle(length=192, examples=8).questions("test", 8)))
    answer = question.answer[:, 0]

    def score(z: Tensor) -> Tensor:
        return model(inputs_embeds=z).logits[torch.arange(8), -1, answer]

    embedded = model.get_input_embeddings()(question.prompt)
    for attention in ("values", "all"):
        found = relevance(model, score, embedded, attention=attention).sum(-1)
        assert torch.equal(found.argmax(-1), question.place)
    calls = gradient_attention(
        model, lambda: model(question.prompt).logits[torch.arange(8), -1, answer]
    )
    drawn = rolled(calls)[:, -1, :-1]  # of others than itself
    assert torch.equal(drawn.argmax(-1), question.place)


class WrittenGELU(nn.Module):
    """An activation written out by hand, as in many published models."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.0447 * torch.pow(x, 3))))


def test_activations_written_by_hand_pass_relevance() -> None:
    model, x = WrittenGELU().eval(), torch.randn(2, 5).double()
    torch.testing.assert_close(relevance(model, lambda z: model(z).sum(-1), x), model(x))


class Sealed(torch.autograd.Function):
    """A kernel that nothing sees into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class SealedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sealed.apply(x)


def test_relevance_refuses() -> None:
    x = torch.randn(2, 4)
    model = nn.Linear(4, 3)
    with pytest.raises(ArgumentError, match="evaluation mode"):
        relevance(model, lambda z: model(z)[:, 0], x)
    model.eval()
    with pytest.raises(ArgumentError, match="epsilon"):
        relevance(model, lambda z: model(z)[:, 0], x, epsilon=-1.0)
    for constant in (lambda z: model(z).softmax(-1)[:, 0], lambda z: model(x)[:, 0]):
        with pytest.raises(ArgumentError, match="score"):
            relevance(model, constant, x)
    hidden = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    with pytest.raises(UnsupportedError, match="multi_head_attention"):
        relevance(hidden, lambda z: hidden(z, z, z)[0].sum((1, 2)), x[None])
    sealed = nn.Sequential(SealedAttention()).eval()
    with pytest.raises(UnsupportedError, match="cannot see into"):
        relevance(sealed, lambda z: sealed(z).sum(-1), x)


def test_salient_relevance() -> None:
    noise = torch.rand(1, 40, 48, dtype=torch.float64) * 0.02
    spot = noise.clone()
    spot[0, 20:26, 30:36] += torch.rand(6, 6).double()
    found = salient_relevance(-3 * spot)
    row, column = divmod(int(found.argmax()), 48)
    assert 17 <= row < 29
    assert 27 <= column < 39
    assert found[0, :10, :10].max() < found.max() / 10
    torch.testing.assert_close(found, salient_relevance(spot))
    torch.testing.assert_close(found, salient_relevance(spot[:, None].expand(1, 3, 40, 48)))
    both = salient_relevance(torch.cat([spot, noise]))
    torch.testing.assert_close(both[:1], found)
    assert not salient_relevance(torch.full((2, 9, 9), 4.0)).any()
    for wrong in (torch.zeros(9, 9), torch.zeros(1, 5, 9)):
        with pytest.raises(ArgumentError, match="relevance"):
            salient_relevance(wrong)
    with pytest.raises(ArgumentError, match="patch"):
        salient_relevance(spot, patch=4)


def test_like_things_are_more_salient_together() -> None:
    near, far = torch.zeros(2, 1, 64, 64, dtype=torch.float64).unbind()
    for image, column in ((near, 30), (far, 52)):
        image[0, 30:34, 18:22] = image[0, 30:34, column : column + 4] = 1.0
    together, apart = (salient_relevance(x, neighbours=4).max() for x in (near, far))
    assert together > apart * 1.02


def spelled_out(x: Tensor, g: Tensor, layer: str) -> Tensor:
    """All gradients of the virtual layer, (B,K,H,W), with the matrices formed."""
    around = F.unfold(x, 3, padding=1).view(len(x), -1, 9, *x.shape[2:])
    return {
        "scaling": lambda: x * g,
        "bias": lambda: g,
        "conv1x1": lambda: torch.einsum("bchw,bdhw->bcdhw", x, g).flatten(1, 2),
        "conv3x3": lambda: torch.einsum("bcshw,bdhw->bcsdhw", around, g).flatten(1, 3),
        "depthwise": lambda: (around * g[:, :, None]).flatten(1, 2),
    }[layer]()


@pytest.mark.parametrize("layer", ["scaling", "bias", "conv1x1", "conv3x3", "depthwise"])
def test_normgrad_is_what_the_matrices_give(layer: Any) -> None:
    x, g = torch.randn(2, 2, 5, 4, 3).double().unbind()
    terms = spelled_out(x, g, layer)
    expected = {
        "sum": terms.sum(1),
        "max": terms.amax(1),
        "norm": terms.norm(dim=1),
        "positive_norm": terms.clamp(min=0).norm(dim=1),
    }
    tokens, gradient = (F.pad(z.flatten(2).mT, (0, 0, 1, 0)) for z in (x, g))  # one token before
    for summary, wanted in expected.items():
        torch.testing.assert_close(saliency(x, g, layer, summary), wanted)
        found = saliency(tokens, gradient, layer, summary, grid=(4, 3))
        torch.testing.assert_close(found, wanted)
    if layer in ("scaling", "bias", "conv1x1"):
        found = saliency(tokens, gradient, layer)
        torch.testing.assert_close(found[:, 1:], expected["norm"].flatten(1))
    else:
        with pytest.raises(ArgumentError, match="grid"):
            saliency(tokens, gradient, layer)


def test_normgrad_of_a_network() -> None:
    model = images()
    x = torch.randn(2, 2, 12, 12).double()
    kept = activations(model, lambda: model(x)[:, 1], ["0", "3"])
    maps = [saliency(a.value, a.gradient) for a in kept.values()]
    joint = product(maps, (12, 12))
    assert joint.shape == (2, 12, 12)
    assert 0 <= joint.min() <= joint.max() <= 1
    first = kept["0"]  # whose output the ReLU changes in place
    assert (first.value < 0).any()
    assert torch.equal(first.value, model[0](x))
    gradient_times_input = (first.value * first.gradient).sum(1)
    torch.testing.assert_close(
        saliency(first.value, first.gradient, "scaling", "sum"), gradient_times_input
    )


def test_bias_is_constant_before_global_pooling() -> None:
    g = torch.randn(1, 5, 1, 1).expand(1, 5, 4, 4)
    found = saliency(torch.randn(1, 5, 4, 4), g, "bias", "sum")
    assert torch.equal(found, found[:, :1, :1].expand(1, 4, 4))
    assert not unit_range(found).any()


def test_class_sensitivity() -> None:
    x = torch.randn(3, 4, 5, 5).double()
    towards = torch.randn(4).double()

    def opposite(classes: Tensor) -> Tensor:
        sign = torch.where(classes == 0, 1.0, -1.0).double()
        return torch.einsum("bchw,c->bhw", x, towards) * sign[:, None, None]

    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(class_sensitivity(opposite, logits), -torch.ones(3).double())
    same = class_sensitivity(lambda classes: x.norm(dim=1), logits)
    torch.testing.assert_close(same, torch.ones(3).double())


def test_meta_step_is_taken_back() -> None:
    model, x = images(), torch.randn(4, 2, 12, 12).double()
    label = torch.tensor([0, 1, 2, 0])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    loss = F.cross_entropy(model(x), label)
    with stepped(model, loss, 0.01):
        assert F.cross_entropy(model(x), label) < loss
    after = model.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    with pytest.raises(KeyError), stepped(model, F.cross_entropy(model(x), label), 0.01):
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], p) for name, p in before.items())


def test_activations_refuse() -> None:
    model, x = images(), torch.randn(1, 2, 12, 12).double()
    for names in ([], ["nowhere"]):
        with pytest.raises(ArgumentError, match="modules"):
            activations(model, lambda: model(x)[:, 0], names)
    with pytest.raises(ArgumentError, match="modules"):
        activations(model, lambda: model[:3](x).sum((1, 2, 3)), ["8"])
    encoder = tiny_encoder()
    with pytest.raises(ArgumentError, match="tensor"):
        activations(encoder, lambda: encoder(prompt(4)).logits[:, 0, 0], ["bert.encoder"])


@pytest.mark.parametrize("build", [tiny_decoder, tiny_encoder])
def test_gradient_attention_changes_nothing_and_is_the_gradient(build: Any) -> None:
    model, ids = build(), prompt(7, batch=2)
    plain = model(ids).logits
    calls = attention_of(model, lambda: torch.testing.assert_close(model(ids).logits, plain))
    assert [call.site.layer for call in calls] == [0, 1, 2]
    for call in calls:
        torch.testing.assert_close(call.weights.sum(-1), torch.ones(2, 4, 7).double())
    found = gradient_attention(model, lambda: model(ids).logits[:, -1, 3])
    torch.testing.assert_close(found[1].weights, calls[1].weights.detach())
    # the last layer's weights times their gradient, summed over keys, is what its heads add
    output = {}

    class Seen(HeadGain):
        def output(self, output_: Tensor, at: Any) -> Tensor:
            output["z"] = output_.detach().requires_grad_()
            return output["z"]

    with Scene.of(model, ()).treated(Seen(), found[-1].site):
        score = model(ids).logits[:, -1, 3]
    (gradient,) = torch.autograd.grad(score.sum(), output["z"])
    torch.testing.assert_close(found[-1].product.sum(-1), (output["z"] * gradient).sum(-1))
    assert rolled(found).shape == (2, 7, 7)
    assert (rolled(found).diagonal(dim1=1, dim2=2) >= 1).all()


def test_gradient_attention_refuses() -> None:
    model, ids = tiny_decoder(), prompt(5)
    with pytest.raises(ArgumentError, match="sites"):
        attention_of(model, lambda: model(ids), ["nowhere"])
    with pytest.raises(ArgumentError, match="score"):
        gradient_attention(model, lambda: torch.zeros(1))
    with pytest.raises(ArgumentError, match="calls"):
        rolled([])
    with pytest.raises(ArgumentError, match="gradient"):
        rolled(attention_of(model, lambda: model(ids)))
    with pytest.raises(UnsupportedError):
        attention_of(images(), lambda: None)


def test_agreement() -> None:
    a = torch.rand(2, 6, 9).double()
    scale, shift = torch.rand(2, 2, 6, 1).double().unbind()
    ones = torch.ones(2).double()
    torch.testing.assert_close(pearson(a, a * (scale + 0.1) + shift), ones)
    torch.testing.assert_close(pearson(a, -a), -ones)
    torch.testing.assert_close(spearman(a, a.exp() * (scale + 0.1)), ones)
    torch.testing.assert_close(top_overlap(a, a**3, 4), ones)
    b = torch.rand(2, 6, 9).double()
    rows = (a - a.mean(-1, keepdim=True)) / a.std(-1, keepdim=True)
    others = (b - b.mean(-1, keepdim=True)) / b.std(-1, keepdim=True)
    known = torch.stack([torch.stack([x, y]) for x, y in zip(rows, others, strict=True)])
    known = torch.stack([torch.corrcoef(pair.flatten(1))[0, 1] for pair in known])
    torch.testing.assert_close(pearson(a, b), known)
    heads = torch.rand(3, 4, 6, 9).double()
    every = pearson(heads, a[0])
    torch.testing.assert_close(every[1, 2], pearson(heads[1, 2], a[0]))
    torch.testing.assert_close(mean_of_heads(heads, [(1, 2)]), heads[1, 2])
    torch.testing.assert_close(mean_of_heads(heads), heads.mean((0, 1)))


def test_rows_are_standardised() -> None:
    a, real = torch.rand(2, 3, 7).double(), torch.ones(2, 3, 7, dtype=torch.bool)
    real[1, :, 4:] = False
    found = standardised(a, real)
    for row, length in ((a[0], 7), (a[1], 4)):
        part = row[:, :length]
        wanted = (part - part.mean(-1, keepdim=True)) / part.std(-1, keepdim=True)
        torch.testing.assert_close(found[0 if length == 7 else 1, :, :length], wanted)
    assert not found[1, :, 4:].any()


def test_agreement_of_ties_and_constants() -> None:
    a = torch.tensor([[1.0, 2.0, 2.0, 5.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 3.0, 9.0, 9.0]], dtype=torch.float64)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5
    torch.testing.assert_close(spearman(a, b), torch.tensor(3.75 / 4.5).double())
    assert top_overlap(a, b, 2) == 0.5
    flat = torch.full((3, 4), 0.1, dtype=torch.float64)
    assert pearson(flat, torch.rand(3, 4).double()) == 0
    assert spearman(flat, flat) == 0
    assert torch.isfinite(top_overlap(flat, flat, 1))


def test_agreement_ignores_padding() -> None:
    a, b = torch.rand(2, 1, 3, 5).double().unbind()
    wide = F.pad(a, (0, 4, 0, 2), value=torch.nan), F.pad(b, (0, 4, 0, 2), value=7.0)
    real = F.pad(torch.ones(1, 3, 5, dtype=torch.bool), (0, 4, 0, 2))
    torch.testing.assert_close(pearson(*wide, real), pearson(a, b))
    torch.testing.assert_close(spearman(*wide, real), spearman(a, b))
    torch.testing.assert_close(top_overlap(*wide, 2, real), top_overlap(a, b, 2))
    with pytest.raises(ArgumentError, match="maps"):
        pearson(a, b[..., :3])
    with pytest.raises(ArgumentError, match="k"):
        top_overlap(a, b, 6)


def reader(weights: Tensor) -> Any:
    """Log-probabilities that fall, at output i, by weights[i,t] for each frame t that is gone."""
    base = torch.rand(len(weights), 5).double().log_softmax(-1)
    return lambda x: base - ((1 - x[..., 0]) @ weights.mT)[..., None]


def test_occlusion_finds_linear_attention() -> None:
    weights = torch.rand(4, 12).double().softmax(-1)
    frames = torch.ones(12, 3).double()
    exact = occlusion(reader(weights), frames, one_by_one((12,), (12,)))
    torch.testing.assert_close(exact, weights)
    torch.testing.assert_close(pearson(exact, weights), torch.tensor(1.0).double())
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * 12)
    found = occlusion(reader(weights), frames, every, batch=1000)
    others = weights.sum(-1, keepdim=True) - weights
    torch.testing.assert_close(found, weights + others / 2)
    torch.testing.assert_close(pearson(found, weights), torch.tensor(1.0).double())
    part = one_by_one((12,), (12,))[:5]
    assert not occlusion(reader(weights), frames, part)[:, 5:].any()


def test_segments_and_masks() -> None:
    assert segments((5,), (2,)).tolist() == [0, 0, 0, 1, 1]
    grid = segments((4, 6), (2, 3))
    assert grid.unique(return_counts=True)[1].tolist() == [4] * 6
    masks = segment_masks((4, 6), [(2, 3), (4, 1)], 400, seed=1)
    assert masks.shape == (400, 4, 6)
    assert 0.45 < masks.double().mean() < 0.55
    assert torch.equal(masks[0][grid == 2], masks[0][0, 4].expand(4))
    assert torch.equal(masks, segment_masks((4, 6), [(2, 3), (4, 1)], 400, seed=1))
    alone = one_by_one((4, 6), (2, 3))
    assert torch.equal((~alone).sum(0), torch.ones(4, 6, dtype=torch.long))
    for wrong in ((5,), (0, 3), (5, 3)):
        with pytest.raises(ArgumentError, match="cells"):
            segments((4, 6), wrong)
    with pytest.raises(ArgumentError, match="hidden"):
        segment_masks((4,), [(2,)], 3, hidden=1.0)
    with pytest.raises(ArgumentError, match="masks"):
        occlusion(lambda x: x, torch.zeros(4, 6), torch.ones(2, 5, 6, dtype=torch.bool))


def test_heat_by_frame_and_divergence() -> None:
    heat = torch.arange(12.0).view(1, 6, 2)
    assert frames_of(heat, 3, "mean").tolist() == [[1.5, 5.5, 9.5]]
    assert frames_of(heat, 3).tolist() == [[2.5, 6.5, 10.5]]
    assert torch.equal(frames_of(heat[..., 0], 6), heat[..., 0])
    with pytest.raises(ArgumentError, match="frames"):
        frames_of(heat, 7)
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log()
    expected = 0.5 * torch.tensor([2.0, 2 / 3]).log().sum()
    torch.testing.assert_close(divergence(p, q), expected)
    assert torch.isfinite(divergence(p, torch.tensor([1.0, 0.0, 0.0]).log()))
