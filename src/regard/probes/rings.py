r"""Rings: how far over an image a head looks, patch by patch.

    d_i = sum_j A_ij |x_i - x_j|        strength_i(k) = mean over j with |x_i - x_j|_max = k of A_ij

x: row and column of a patch; d in patches (Euclidean). Ring k is a square frame around the patch,
smaller at the edge of the image: strengths are means over the keys there are, and over the patches
that have such a ring. Tokens before the grid are left out, as queries and as keys, and each row is
weighed anew. A head on its own patch has strength(0) = 1, a uniform one 1/n at every k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, plain_look, zeros
from regard.core.shown import tile
from regard.core.tile_sums import along_keys


@dataclass(frozen=True)
class Rings:
    """rings: how many, from the patch itself on."""

    rings: int = 16

    def __post_init__(self) -> None:
        if self.rings < 1:
            raise ArgumentError("rings", "at least 1", self.rings)

    def begin(self, look: Look) -> _Frames:
        look.same_sequence("rings")
        if look.grid is None:
            raise UnsupportedError("rings", "nothing says which keys are patches of an image")
        if look.queries.shape != look.keys.shape:
            raise UnsupportedError("rings", "some patches do not ask")
        return _Frames(self, look, look.grid)


class _Frames:
    def __init__(self, probe: Rings, look: Look, grid: tuple[int, int]) -> None:
        self.look, self.grid = look, grid
        device = look.keys.device
        sides = (torch.arange(side, device=device) for side in grid)
        self.places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
        reach = torch.arange(probe.rings, device=device)[None, :, None]
        most = torch.tensor(grid, device=device)
        self.low = (self.places[:, None] - reach).clamp_min(0)  # (P,R,2)
        self.high = torch.minimum(self.places[:, None] + reach + 1, most)
        self.sizes = ring_of((self.high - self.low).prod(-1))  # (P,R)
        self.far = zeros(look, 1)[..., 0]
        self.strength = zeros(look, probe.rings)

    def add(self, seen: Seen) -> None:
        prefix, start = self.look.prefix, max(self.look.prefix, seen.rows.start)
        rows = slice(start - prefix, max(start, seen.rows.stop) - prefix)
        weights = seen.weights[:, :, start - seen.rows.start :]
        whole = weights.new_zeros(*weights.shape[:-1], self.look.keys.shape[1])
        whole[..., seen.keys] = weights
        patches = whole[..., prefix:]
        if prefix:
            total = patches.sum(-1, keepdim=True)
            patches = patches / total.clamp_min(torch.finfo(patches.dtype).tiny)
        gaps = torch.cdist(self.places[rows].to(patches), self.places.to(patches))
        part = (seen.batch, seen.heads)
        self.far[part] += along_keys(patches, gaps[None, None]).sum(-1)
        self.strength[part] += self.rings(patches, rows).sum(-2)

    def rings(self, patches: Tensor, rows: slice) -> Tensor:
        """Mean weight (b,h,n,R) of each ring around each patch; zero where it has none."""
        sums = patches.unflatten(-1, self.grid).cumsum(-1).cumsum(-2)
        sums = F.pad(sums, (1, 0, 1, 0)).flatten(-2)  # of all patches above and to the left
        low, high = self.low[rows], self.high[rows]

        def corner(row: Tensor, column: Tensor) -> Tensor:
            index = row[..., 0] * (self.grid[1] + 1) + column[..., 1]
            return sums.gather(-1, index.expand(*sums.shape[:2], -1, -1))

        square = corner(high, high) - corner(low, high) - corner(high, low) + corner(low, low)
        return ring_of(square) / self.sizes[rows].clamp_min(1)

    def found(self) -> Finding:
        real = self.look.real_queries[:, self.look.prefix :]
        having = (real[..., None] & (self.sizes > 0)).sum(1)[:, None]  # (B,1,R)
        return Finding(
            {"grid_distance": self.far / real.sum(-1)[:, None]},
            {"rings": self.strength / having},
        )


def ring_of(squares: Tensor) -> Tensor:
    """What each frame holds, from what growing squares (…,R) hold."""
    return squares.diff(dim=-1, prepend=torch.zeros_like(squares[..., :1]))


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' mean attention distance, in pixels."""
    found: dict[str, Tensor] = {}
    for name, maps in case["inputs"].items():
        if not name.startswith("A"):
            continue
        side = round(maps.shape[-1] ** 0.5)
        tally = Rings().begin(replace(plain_look(maps), grid=(side, side)))
        tally.add(tile(maps.double(), causal=False))
        distance = tally.found().metrics["grid_distance"]
        found[f"dist{name[1:]}"] = distance * case["config"]["patch_size"]
    return found


CARD = ProbeCard(
    name="rings",
    build=Rings,
    metrics={"grid_distance": "mean distance over the image to what is read, in patches"},
    profiles={"rings": "mean weight of a patch at 0, 1, 2, … steps over the image"},
    papers=(
        Paper("2303.13731", "How Does Attention Work in Vision Transformers?", 2023),
        Paper(
            "2502.02257",
            "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
            2025,
        ),
    ),
    claim=Claim("heads of early layers look near, later ones over the whole image", "regard atlas"),
    goldens=(
        Golden(
            "225_nmi_distance_kd.pt",
            replay,
            "https://github.com/naver-ai/cl-vs-mim",
            "HEAD",
            leaves=dict.fromkeys(
                ("nmi0", "nmi1", "kd_KL"), "replayed by the probe `mutual_information`"
            ),
        ),
    ),
)
