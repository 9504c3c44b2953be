r"""Duo: retrieval heads see everything, streaming heads the first and the newest tokens, and a gate
per key head blends the two.

    o = alpha full + (1 - alpha) streaming        alpha: (layers, key heads), clamped to [0, 1]
    streaming_ij = softmax over j <= i with j < sinks or i - j < recent

Gates are learned on a frozen model by `regard.recipes.duo_gates`; `regard.recipes.duo_plan` turns
them into a plan whose streaming heads really save their cache. Here the gates act as they do in
training: both branches are computed, and the cache stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.frame import Frame
from regard.core.mask import Causal
from regard.core.model_scores import attend_through
from regard.core.moment import Moment, Site
from regard.core.scored import attend
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.core.weights import Scored
from regard.operators.sliding_window import window_with_sinks


@dataclass(frozen=True)
class Duo(Treatment):
    """gates: alpha by layer and key head. sinks, recent: what a streaming head sees."""

    gates: tuple[tuple[float, ...], ...]
    sinks: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        check_stream(self.sinks, self.recent)

    @property
    def neutral(self) -> bool:
        return all(gate >= 1 for row in self.gates for gate in row)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if not site.causal:
            raise UnsupportedError("duo", f"{site.name} is not causal self-attention")
        widths = {len(row) for row in self.gates}
        if len(self.gates) != site.layers or widths != {site.kv_heads}:
            got = f"{len(self.gates)} rows of {sorted(widths)}"
            raise ArgumentError("gates", f"{site.layers} rows of {site.kv_heads}", got)

    def attention(self, at: Moment) -> Tensor:
        gates = torch.tensor(self.gates, dtype=at.q.dtype, device=at.q.device)
        return gated(at, gates, self.sinks, self.recent)


def check_stream(sinks: int, recent: int) -> None:
    """Raise ArgumentError unless these make a window with sinks."""
    if sinks < 0 or recent < 1:
        raise ArgumentError("sinks, recent", "sinks >= 0 and recent >= 1", (sinks, recent))


def gated(at: Moment, gates: Tensor, sinks: int, recent: int, full: Tensor | None = None) -> Tensor:
    """The blend (B,h,N,E) at a moment, differentiable in the gates (layers, key heads). full:
    another output (B,h,N,E) in place of this moment's own full attention.

    Raises:
        UnsupportedError: keys were evicted, so that nothing full is left to blend with.
    """
    if at.call is None:
        raise UnsupportedError("duo", "its keys were evicted; let it act on other heads")
    if full is None:
        full = attend_through(at, at.call)
    streaming = attend_through(at, at.call, window_with_sinks(recent, sinks))
    rows = [head // at.site.group for head in at.heads]
    return blended(full, streaming, gates[at.site.layer, rows])


def blended(full: Tensor, streaming: Tensor, alpha: Tensor) -> Tensor:
    """alpha (h,), clamped to [0, 1], of full and the rest of streaming, both (B,h,N,E)."""
    share = alpha.clamp(0, 1).to(full.dtype)[:, None, None]
    return share * full + (1 - share) * streaming


MASKS = ((16, 2, 4), (24, 1, 5), (24, 4, 24))
"""N, sinks and recent of the masks that every case of the golden file holds; its outputs are those
of the first.
"""


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' masks and blend of one golden case; their tensors are (B,N,H,D)."""
    q, k, v = (case["inputs"][name].transpose(1, 2) for name in ("q", "k", "v"))
    masks = [Causal() & window_with_sinks(recent, sinks) for _, sinks, recent in MASKS]
    full = attend(q, k, v, Call(mask=Causal()), Scored()).output
    streaming = attend(q, k, v, Call(mask=masks[0]), Scored()).output
    alpha = case["inputs"]["alpha"].repeat_interleave(q.shape[1] // k.shape[1])
    ranges = [torch.arange(n)[None] for n, _, _ in MASKS]
    frames = [Frame(1, 1, positions, positions) for positions in ranges]
    return {
        "masks": [mask.dense(frame)[0, 0] for mask, frame in zip(masks, frames, strict=True)],
        "streaming": streaming.transpose(1, 2),
        "full": full.transpose(1, 2),
        "blend": blended(full, streaming, alpha).transpose(1, 2),
    }


CARD = TreatmentCard(
    name="duo",
    build=Duo,
    papers=(
        Paper(
            "2410.10819",
            "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
            2024,
        ),
    ),
    claim=Claim(
        "half the key heads need only sinks and recent tokens, and retrieval stays intact",
        "regard evaluate --plan duo.json --task needle,recall",
    ),
    example=Trial({"gates": [[0.3, 1.0], [0.0, 0.6], [1.2, 0.1]], "sinks": 2, "recent": 6}),
    neutral={"gates": [[1.0, 1.2]] * 3},
    limits=(
        Coincides({"gates": [[0.3, 0.6]] * 3, "recent": 10_000}),
        Coincides(
            {"gates": [[0.0, 0.0]] * 3, "sinks": 2, "recent": 6},
            "stream",
            {"sinks": 2, "recent": 6, "window": True},
        ),
    ),
    goldens=(
        Golden(
            "142_duoattention.pt",
            replay,
            "https://github.com/mit-han-lab/duo-attention",
            "fe93c314ae",
        ),
    ),
)
