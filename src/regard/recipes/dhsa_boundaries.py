r"""The recipe of DHSA's boundary predictor: to tell from keys alone where attention turns.

    label_t = sigmoid(4 log(ratio_t / 2))        ratio: regard.importance.boundaries, of the model
    loss    = mean of (1 - p_t)^2 BCE(logit_t, label_t)        p_t: what the logit gives its label

One predictor serves every layer of a frozen model; each step sums the losses of all layers over a
batch. Adam, learning rate 1e-4, positive labels weigh 1.3; gaps within 2 w tokens of an end are
left out. A logit of 0 so means a ratio of 2, the default threshold of the treatment `dhsa`.

    predictor = BoundaryPredictor(width)        # of the model: key heads times their width
    train_predictor(predictor, model, batches, steps=2000)
    save_predictor(predictor, "boundaries.safetensors")    # {"predictor": "boundaries.safetensors"}

Differs from the published code: labels are not rounded, and keys are those after rotation, which is
what the treatment sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment
from regard.core.scene import Scene
from regard.core.treatment import Treatment
from regard.importance.boundaries import boundary_ratio, soft_labels
from regard.importance.boundary_predictor import BoundaryPredictor

RATE = 1e-4
SHARPNESS, TURN = 4.0, 2.0  # of labels: slope, and the ratio whose label is one half
FOCUS, POSITIVE = 2.0, 1.3  # exponent on what is still wrong; weight of positive labels


@dataclass(frozen=True)
class Turns(Treatment):
    """Changes nothing; notes of every module its keys (B,H_k,L,D) and boundary ratios (B,L)."""

    window: int
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def weights(self, weights: Tensor, at: Moment) -> Tensor:
        if not bool(at.query_real.all()):
            raise UnsupportedError("dhsa_boundaries", "sequences of a batch are of one length")
        ratio = boundary_ratio(weights.detach().mean(1), self.window)
        self.found.append((at.k.detach(), ratio))
        return weights


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over gaps of the cross-entropy with soft labels, less where it is nearly right."""
    weight = torch.as_tensor(POSITIVE, device=logits.device)
    wrong = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")
    said = torch.sigmoid(logits)
    right = said * labels + (1 - said) * (1 - labels)
    return ((1 - right) ** FOCUS * wrong).mean()


def layer_loss(predictor: BoundaryPredictor, keys: Tensor, ratio: Tensor) -> Tensor:
    """Loss of one layer's keys (B,H_k,L,D) and ratios (B,L).

    Raises:
        ArgumentError: no gap is far enough from the ends.
    """
    w = predictor.window
    inner = slice(2 * w - 1, keys.shape[2] - 2 * w)
    if inner.stop <= inner.start:
        raise ArgumentError("batches", f"more than {4 * w - 1} tokens", keys.shape[2])
    labels = soft_labels(ratio.clamp_min(1.0), SHARPNESS, TURN).to(predictor.dtype)
    logits = predictor(keys.to(predictor.dtype))
    return focal_loss(logits[:, inner], labels[:, inner])


def train_predictor(
    predictor: BoundaryPredictor,
    model: Any,
    batches: Iterator[Tensor],
    steps: int,
    *,
    rate: float = RATE,
    watch: Callable[[int, float], None] = lambda done, loss: None,
) -> BoundaryPredictor:
    """Train on token ids (B,L) of `batches`, as the model's self-attention reads them; `watch`
    hears the number of each step and its loss per layer.
    """
    optimiser = torch.optim.Adam(predictor.requires_grad_(True).parameters(), rate)
    scene = Scene.of(model, ())
    for done in range(steps):
        turns = Turns(predictor.window)
        with torch.no_grad(), scene.treated(turns, *scene.own):
            model(next(batches), use_cache=False)
        losses = [layer_loss(predictor, keys, ratio) for keys, ratio in turns.found]
        total = torch.stack(losses).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        watch(done + 1, total.item() / len(losses))
    return predictor.requires_grad_(False)
