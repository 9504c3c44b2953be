r"""A small vision transformer that learns to fill in masked patches of handwritten digits, for
studies of what its frozen tokens know.

    x = W patches + P        masked patches: one learned token + P        loss: mean square at them

An image of 8 x 8 pixels is 4 x 4 patches. The last norm has no parameters, so tokens keep length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.study import Progress
from regard.layers.attention import Attention
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward
from regard.lenses.attentive_probe import Labelled
from regard.tasks.digits import Digits
from regard.tasks.task import Split

SIDE, PATCH = 8, 2
PLACES = (SIDE // PATCH) ** 2
"""Patches of an image."""
SIZES: dict[Split, int] = {"train": 1285, "valid": 256, "test": 256}


def patches(images: Tensor) -> Tensor:
    """Images (n,64,1) as patches (n,16,4), row-major, their pixels at about mean 0, variance 1."""
    side = SIDE // PATCH
    return (
        ((images - 0.3) / 0.37)
        .view(-1, side, PATCH, side, PATCH)
        .transpose(2, 3)
        .reshape(-1, PLACES, PATCH**2)
    )


class Filling(nn.Module):
    """A vision transformer (n,16,4) -> (n,16,4) that fills in masked patches."""

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.output = nn.Linear(PATCH**2, dim), nn.Linear(dim, PATCH**2)
        self.masked = nn.Parameter(torch.zeros(dim))
        self.places = nn.Parameter(0.02 * torch.randn(PLACES, dim))
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, heads), FeedForward(dim, 2 * dim)) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def tokens(self, x: Tensor, gone: Tensor | None = None) -> Tensor:
        """Tokens (n,16,dim) of patches, those gone (n,16) unseen."""
        x = self.embedding(x)
        if gone is not None:
            x = torch.where(gone[..., None], self.masked, x)
        x = x + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, x: Tensor, gone: Tensor) -> Tensor:
        """Mean squared error at masked patches."""
        return F.mse_loss(self.output(self.tokens(x, gone))[gone], x[gone])


@dataclass(frozen=True)
class Pretraining:
    """dim, layers, heads: of the model; masked: share of patches it does not see; steps, rate: of
    AdamW, the rate falling to zero along a cosine.
    """

    dim: int = 48
    layers: int = 2
    heads: int = 4
    masked: float = 0.5
    steps: int = 1000
    rate: float = 2e-3

    def run(self, seed: int, progress: Progress) -> Filling:
        """A model that fills in masked digits."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Filling(self.dim, self.layers, self.heads)
        draw = torch.Generator().manual_seed(seed)
        images = Digits().batches("train", 128, seed)
        optimiser = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        for step in range(self.steps):
            x = patches(next(images).inputs)
            order = torch.rand(x.shape[:2], generator=draw).argsort(-1)
            optimiser.zero_grad()
            model.loss(x, order < int(self.masked * PLACES)).backward()
            optimiser.step()
            schedule.step()
            progress((step + 1) / self.steps)
        return model.eval()


@torch.no_grad()
def frozen(model: Filling, *splits: Split) -> Labelled:
    """Tokens and labels of whole splits of the digits."""
    parts = [next(Digits().batches(split, SIZES[split])) for split in splits]
    images, labels = torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts])
    return Labelled(model.tokens(patches(images)), labels)
