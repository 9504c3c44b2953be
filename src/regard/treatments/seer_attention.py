r"""SeerAttention: while they read the prompt, heads look only into blocks of keys that a learned
gate names; decoding is dense.

    P = softmax over blocks of G_ab        G: the gate of this layer, on pooled queries and keys

A gate file is safetensors as `regard.recipes.seer_gate` writes it: the gates of the attention
modules under their paths, and in its metadata the block length and poolings. Without a file the
gate is untrained: the product of block means. The gate sees queries and keys as the model's
attention gets them, which in models with rotary positions is after their rotation; a file trained
on others does not fit.

Differs from the paper: gates are trained on rotated queries and keys, not on plain ones with
rotated means; a block always reads itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.model_scores import attend_through
from regard.core.moment import Moment, Site
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.features.block_gate import BlockGate
from regard.importance.gate_file import load_gates
from regard.importance.gated_blocks import check_budget, chosen_blocks, gate_logits
from regard.masks.blocks import Blocks


@dataclass(frozen=True)
class SeerAttention(Treatment):
    """threshold: least P of a block that is read; or density: fraction of the causal blocks;
    exactly one. dense_rows: last rows of blocks that read everything. file: trained gates; None:
    untrained ones on blocks of `block` tokens.
    """

    threshold: float | None = None
    density: float | None = None
    dense_rows: int = 2
    file: str | None = None
    block: int = 64

    def __post_init__(self) -> None:
        check_budget(self.threshold, self.density, self.dense_rows)
        if self.block < 1:
            raise ArgumentError("block", "at least 1", self.block)
        if self.file is not None and not Path(self.file).is_file():
            raise ArgumentError("file", "a safetensors file", self.file)

    @property
    def neutral(self) -> bool:
        return self.density == 1.0

    @cached_property
    def gates(self) -> dict[str, BlockGate]:
        """The file's gates, by module."""
        return {} if self.file is None else load_gates(self.file)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if not site.causal:
            raise UnsupportedError("seer_attention", f"{site.name} is not causal self-attention")
        if self.file is None:
            return
        gate = self.gates.get(site.name)
        if gate is None or gate.heads != site.heads:
            got = None if gate is None else f"{gate.heads} heads"
            raise ArgumentError("file", f"a gate of {site.heads} heads for {site.name}", got)

    def attention(self, at: Moment) -> Tensor | None:
        if at.phase != "prefill":
            return None
        if at.call is None:
            raise UnsupportedError("seer_attention", "its keys were evicted")
        gate = self.gate_for(at)
        logits, count = gate_logits(gate, at.q, at.k, at.call.of_self(), heads=at.heads)
        keep = chosen_blocks(
            logits.softmax(-1),
            count,
            threshold=self.threshold,
            density=self.density,
            dense_rows=self.dense_rows,
        )
        return attend_through(at, at.call, Blocks(keep, gate.block))

    def gate_for(self, at: Moment) -> BlockGate:
        """The layer's gate, on the device of the call."""
        if self.file is None:
            width = at.q.shape[-1]
            gate = BlockGate(at.site.heads, width, block=self.block, keys=("avg",)).pool_only()
        else:
            gate = self.gates[at.site.name]
        return gate.to(at.q.device).requires_grad_(False)


CARD = TreatmentCard(
    name="seer_attention",
    build=SeerAttention,
    papers=(
        Paper(
            "2410.13276",
            "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
            2024,
        ),
    ),
    claim=Claim(
        "a trained gate keeps what the prompt is read for at half of its blocks",
        "regard evaluate --plan seer.json --task needle,perplexity",
    ),
    example=Trial({"density": 0.3, "dense_rows": 1, "block": 4}),
    neutral={"density": 1.0},
    limits=(Coincides({"threshold": -1.0, "block": 4}),),
    gaps={"decoding": "it acts on the prompt alone; decoding is dense"},
)
