r"""NormGrad and its family: where the weights of a layer that changes nothing would learn from a
score. After activation x a virtual layer with the identity as weights is put; per place u, its
gradient is one term of

    scaling     x_u * g_u                        (C)         g = dS/dx
    bias        g_u                              (C)
    conv1x1     x_u g_u^T                        (C, C)
    conv3x3     x_v g_u^T, v around u            (9 C, C)
    depthwise   x_v * g_u, v around u            (9, C)

    sum, max, norm, positive_norm                of its entries; norm is the Euclidean one,
                                                 positive_norm that of the positive entries

NormGrad is conv1x1 and norm, |x_u| |g_u|; scaling and sum is gradient times input. What outer
products give follows from their factors alone: the matrices are never formed.

    found = activations(model, lambda: model(x)[:, label], ["layer3", "layer4"])
    maps = [saliency(a.value, a.gradient) for a in found.values()]
    product(maps, (224, 224))

S is the score itself. The published code takes the gradient of -S and turns the sign, which is the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.lenses.agreement import pearson

Layer = Literal["scaling", "bias", "conv1x1", "conv3x3", "depthwise"]
Summary = Literal["sum", "max", "norm", "positive_norm"]


def saliency(
    value: Tensor,
    gradient: Tensor,
    layer: Layer = "conv1x1",
    summary: Summary = "norm",
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Saliency of each place: maps (B,C,H,W) give (B,H,W), tokens (B,N,C) give (B,N).

    gradient: of the score with respect to `value`. grid: (h,w) of the last h w tokens, which the
    3 x 3 layers need; tokens before those are left out, and the result is (B,h,w).

    Raises:
        ArgumentError: other shapes, an unknown layer or summary, tokens without a grid for 3 x 3.
    """
    _check(value, gradient, layer, summary)
    maps = value.ndim == 4
    if not maps and grid is not None:
        value, gradient = (_on_grid(x, grid) for x in (value, gradient))
        maps = True
    around = layer in ("conv3x3", "depthwise")
    if around and not maps:
        raise ArgumentError("grid", f"(h,w) of the tokens, for {layer}", None)
    shape = value.shape[2:] if maps else value.shape[1:2]
    x, g = (z.flatten(2) if maps else z.mT for z in (value, gradient))  # (B,C,P)
    if around:
        x = F.unfold(value, 3, padding=1).unflatten(1, (x.shape[1], 9))  # (B,C,9,P)
    if layer in ("conv1x1", "conv3x3"):
        found = _of_outer(x.flatten(1, -2), g, summary)
    else:
        terms = g if layer == "bias" else x * (g[:, :, None] if around else g)
        found = _of_entries(terms.flatten(1, -2), summary)
    return found.unflatten(1, shape)


def _of_entries(terms: Tensor, summary: Summary) -> Tensor:
    """Summary (B,P) of terms (B,K,P)."""
    if summary == "sum":
        return terms.sum(1)
    if summary == "max":
        return terms.amax(1)
    return (terms if summary == "norm" else terms.clamp(min=0)).norm(dim=1)


def _of_outer(x: Tensor, g: Tensor, summary: Summary) -> Tensor:
    """Summary (B,P) of the outer products of x (B,K,P) and g (B,C,P)."""
    if summary == "sum":
        return x.sum(1) * g.sum(1)
    if summary == "max":  # a product is largest where both factors are at an end
        ends = [a * b for a in (x.amax(1), x.amin(1)) for b in (g.amax(1), g.amin(1))]
        return torch.stack(ends).amax(0)
    if summary == "norm":
        return x.norm(dim=1) * g.norm(dim=1)
    same = [a.clamp(min=0).norm(dim=1) * b.clamp(min=0).norm(dim=1) for a, b in ((x, g), (-x, -g))]
    return torch.hypot(*same)


def _on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last h w of tokens (B,N,C) as (B,C,h,w)."""
    count = grid[0] * grid[1]
    if not 0 < count <= tokens.shape[1]:
        raise ArgumentError("grid", f"(h,w) of at most {tokens.shape[1]} tokens", grid)
    return tokens[:, -count:].mT.unflatten(2, grid)


def _check(value: Tensor, gradient: Tensor, layer: str, summary: str) -> None:
    if value.ndim not in (3, 4) or value.shape != gradient.shape:
        shapes = tuple(value.shape), tuple(gradient.shape)
        raise ArgumentError("value and gradient", "both (B,C,H,W) or both (B,N,C)", shapes)
    for name, got, known in (("layer", layer, Layer), ("summary", summary, Summary)):
        if got not in known.__args__:
            raise ArgumentError(name, f"one of {', '.join(known.__args__)}", got)


def class_sensitivity(saliency_of: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Correlation (B,) between the maps of the likeliest and of the least likely class; a method
    that tells classes apart gives a low one. saliency_of: classes (B,) to maps (B,…). logits (B,K).
    """
    best, worst = (saliency_of(pick(-1)).flatten(1) for pick in (logits.argmax, logits.argmin))
    return pearson(best[:, None], worst[:, None])


@contextmanager
def stepped(model: nn.Module, loss: Tensor, rate: float) -> Iterator[None]:
    """Meta-saliency: inside, the model has taken one step of gradient descent on `loss`, so that
    any saliency computed here tells what mattered to learn this class. The parameters come back as
    they were, bit for bit. A negative rate shows what speaks against the class.

    The step itself is taken as given: maps are not differentiated through it.
    """
    wanted: Sequence[Tensor] = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    before = [p.detach().clone() for p in wanted]
    try:
        with torch.no_grad():
            for p, g in zip(wanted, gradients, strict=True):
                if g is not None:
                    p.sub_(g, alpha=rate)
        yield
    finally:
        with torch.no_grad():
            for p, former in zip(wanted, before, strict=True):
                p.copy_(former)
