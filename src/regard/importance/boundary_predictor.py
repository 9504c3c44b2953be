r"""Boundary predictor: from the keys on both sides of a gap, whether a chunk should end there.

    y = LayerNorm(MHA(x))              x: the 2 w keys around a gap, all key heads side by side
    l, r = pool(y_1..w), pool(y_w+1..2w)
    logit = MLP(l, r, |l - r|, l * r, cos(l, r))

pool is the mean, or a learned average. Before the first and beyond the last token stand zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.errors import ArgumentError


class WindowEncoder(nn.Module):
    """Self-attention among the tokens of one window, normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(G,2w,C) -> (G,2w,C)."""
        return self.norm(self.mha(x, x, x, need_weights=False)[0])


class WindowPool(nn.Module):
    """A learned average of a window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(G,w,C) -> (G,C)."""
        return (self.gate(x).softmax(1) * x).sum(1)


class BoundaryPredictor(nn.Module):
    """width: key heads times their width. window: tokens on each side. Parameters are named as in
    the published code, whose weights load.
    """

    def __init__(
        self,
        width: int,
        *,
        window: int = 4,
        heads: int = 8,
        hidden: int = 256,
        learned_pool: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError("heads", f"a divisor of {width}", heads)
        self.width, self.window = width, window
        self.enc = WindowEncoder(width, heads)
        self.pool = WindowPool(width) if learned_pool else None
        self.mlp = nn.Sequential(nn.Linear(4 * width + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters."""
        return self.enc.norm.weight.dtype

    def forward(self, keys: Tensor) -> Tensor:
        """Keys (B,H_k,L,D) -> logits (B,L) of the gap after each token.

        Raises:
            ArgumentError: H_k times D is not the width.
        """
        x = keys.transpose(1, 2).flatten(2)
        if x.shape[2] != self.width:
            raise ArgumentError("keys", f"{self.width} numbers per token", x.shape[2])
        b, n, c = x.shape
        padded = F.pad(x, (0, 0, self.window - 1, self.window))
        around = padded.unfold(1, 2 * self.window, 1).transpose(2, 3)  # (B,L,2w,C)
        y = self.enc(around.reshape(b * n, 2 * self.window, c))
        sides = y[:, : self.window], y[:, self.window :]
        left, right = (s.mean(1) if self.pool is None else self.pool(s) for s in sides)
        likeness = F.cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        features = [left, right, (left - right).abs(), left * right, likeness]
        return self.mlp(torch.cat(features, -1)).view(b, n)


def saved_predictor(path: str) -> BoundaryPredictor:
    """A predictor from a safetensors file, as `save_predictor` wrote it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        kept = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    if not {"window", "heads"} <= set(kept):
        raise ArgumentError("predictor", "a file of a boundary predictor", path)
    predictor = BoundaryPredictor(
        weights["enc.norm.weight"].shape[0],
        window=int(kept["window"]),
        heads=int(kept["heads"]),
        hidden=weights["mlp.0.weight"].shape[0],
        learned_pool="pool.gate.weight" in weights,
    )
    predictor.load_state_dict(weights)
    return predictor.eval().requires_grad_(False)


def save_predictor(predictor: BoundaryPredictor, path: str) -> None:
    """Write a predictor as safetensors."""
    from safetensors.torch import save_file

    sizes = {"window": str(predictor.window), "heads": str(predictor.enc.mha.num_heads)}
    save_file({k: v.contiguous() for k, v in predictor.state_dict().items()}, path, sizes)
