r"""Mutual information: how much of where a head looks depends on who is asking.

    nmi = I(q; k) / sqrt(H(q) H(k))        I = H(k) - mean_i H(A_i)        p(k) = mean_i A_ik

H(q) = ln n with n queries; logarithms are natural, 0/0 = 0. A head that looks at its own place has
1, one whose map has equal rows 0. In vision transformers 0.06 to 0.12 is a mixture of near and far,
more is local, less is global. In an image the tokens before the grid are left out, as queries and
as keys, and each row is weighed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_columns, add_rows, measured, zeros
from regard.importance.map_distillation import map_divergence


@dataclass(frozen=True)
class MutualInformation:
    """Normalised mutual information between queries and the keys they look at."""

    def begin(self, look: Look) -> _Information:
        look.same_sequence("mutual_information")
        return _Information(look)


class _Information:
    def __init__(self, look: Look) -> None:
        n, m = look.queries.shape[1], look.keys.shape[1]
        self.look = look
        self.mass, self.entropy = zeros(look, m), zeros(look, n)
        place = torch.arange(m, device=look.keys.device)
        self.kept = place >= look.prefix
        self.asking = look.real_queries & self.kept[m - n :]

    def add(self, seen: Seen) -> None:
        asking = self.asking[seen.batch, None, seen.rows]
        if not self.look.prefix:
            add_columns(self.mass, seen, seen.mass)
            add_rows(self.entropy, seen, -seen.logs[0])
            return
        kept = self.kept[seen.keys]
        weights = seen.weights * (kept & asking[..., None])
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
        add_columns(self.mass, seen, weights.sum(-2))
        add_rows(self.entropy, seen, torch.special.entr(weights).sum(-1))

    def found(self) -> Finding:
        count = self.asking.sum(-1)[:, None].double()
        spread = torch.special.entr(self.mass / count[..., None]).sum(-1)
        own = self.entropy.masked_fill(~self.asking[:, None], 0.0).sum(-1) / count
        scale = (count.log() * spread).clamp_min(0.0).sqrt()
        nothing = scale < torch.finfo(torch.float32).eps
        nmi = (spread - own).clamp_min(0.0) / scale.masked_fill(nothing, 1.0)
        return Finding({"nmi": nmi.masked_fill(nothing, 0.0)})


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' mutual information, and their distillation loss."""
    given = case["inputs"]
    maps = {key[1:]: x for key, x in given.items() if key.startswith("A")}
    found = {
        f"nmi{index}": measured(MutualInformation(), x, causal=False).metrics["nmi"].float()
        for index, x in maps.items()
    }
    return {**found, "kd_KL": map_divergence(given["student_qk"], given["teacher_qk"])}


CARD = ProbeCard(
    name="mutual_information",
    build=MutualInformation,
    metrics={"nmi": "mutual information of query and key, normalised: 1 local, 0 global"},
    papers=(
        Paper(
            "2502.02257",
            "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
            2025,
        ),
    ),
    claim=Claim("local, mixed and global heads differ in it", "regard atlas"),
    goldens=(
        Golden(
            "225_nmi_distance_kd.pt",
            replay,
            "https://github.com/casiatao/UNIP",
            "9ce8728",
            leaves=dict.fromkeys(("dist0", "dist1"), "distances are read by the probe `rings`"),
        ),
    ),
)
