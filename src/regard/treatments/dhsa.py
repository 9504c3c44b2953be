r"""DHSA: keys are cut into chunks of unequal length; a block of queries ranks chunks and reads
the tokens of the best.

    qbar = mean over heads and the queries of a block, times sqrt(queries)
    kbar_c = mean over heads and the keys of chunk c, times sqrt(keys)
    score_j = qbar . kbar_c(j)
    read = the last `local` keys the block may see and those of highest score, `tokens` in all, of
           which the first `sinks` in order give way to the first keys there are

All heads read the same. Queries of a prompt choose in blocks of `block`, later ones each for
themselves; the last `instruction` queries of the prompt read everything. Chunks start at the
positions `boundaries`, or where a trained `predictor` says (`regard.recipes.dhsa_boundaries`); from
the last start on, and without either, every `chunk` tokens. Sums over chunks are kept, so that a
decoded token costs as many products as there are chunks.

Differs from the paper: the predictor reads keys as a host shows them, after rotation; among equal
scores the latest key comes first (`ties="any"`: whichever, as published). Within a block of a
prompt the choice depends on all its queries, as published; attention itself is causal.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal, Given
from regard.core.moment import Moment, Site
from regard.core.scored import attend
from regard.core.treatment import Coincides, Treatment, TreatmentCard, Trial
from regard.core.weights import Scored
from regard.importance.boundaries import boundary_ratio, pick_gaps
from regard.importance.boundary_predictor import BoundaryPredictor, saved_predictor
from regard.importance.chunk_choice import ChunkChoice, Pooling, Ties
from regard.importance.chunks import ChunkSums, chunk_numbers, no_chunks
from regard.importance.query_blocks import query_blocks


@dataclass(frozen=True)
class Dhsa(Treatment):
    """tokens, local, sinks: keys read, see above. block: queries that choose together. chunk,
    boundaries, predictor: where chunks start. threshold, apart: logit above which the predictor's
    gap counts, and tokens between two at least. pooling: "max" takes the greatest query instead.
    """

    tokens: int = 2048
    local: int = 128
    sinks: int = 128
    block: int = 64
    instruction: int = 64
    chunk: int = 64
    boundaries: tuple[int, ...] = ()
    predictor: str | None = None
    threshold: float = 0.0
    apart: int = 8
    pooling: Pooling = "scaled_mean"
    ties: Ties = "latest"

    def __post_init__(self) -> None:
        if self.choice.local < 1 or min(self.block, self.chunk) < 1:
            raise ArgumentError("local, block, chunk", "at least 1 each", self)
        if min(self.instruction, self.apart) < 0:
            raise ArgumentError("instruction, apart", "0 or more", self)
        if list(self.boundaries) != sorted({b for b in self.boundaries if b > 0}):
            raise ArgumentError("boundaries", "positions above 0, ascending", self.boundaries)
        if self.boundaries and self.predictor is not None:
            raise ArgumentError("boundaries, predictor", "at most one of the two", self)

    @property
    def choice(self) -> ChunkChoice:
        """How chunks and their tokens are chosen."""
        return ChunkChoice(self.tokens, self.local, self.sinks, self.pooling, self.ties)

    @cached_property
    def trained(self) -> BoundaryPredictor | None:
        """The predictor, read once."""
        return None if self.predictor is None else saved_predictor(self.predictor)

    def check(self, site: Site, heads: tuple[int, ...]) -> None:
        if site.cross or not site.causal:
            raise UnsupportedError("dhsa", f"{site.name} is no causal self-attention")
        keys = len({head // site.group for head in heads})
        if self.trained is not None and self.trained.width % keys:
            raise ArgumentError("predictor", f"one for {keys} key heads", self.trained.width)

    def visible(self, at: Moment) -> Tensor | None:
        if at.key_positions.shape[1] > 1:
            raise UnsupportedError("dhsa", "heads hold different keys; nothing may be evicted")
        if at.heads != at.step_heads:
            raise UnsupportedError("dhsa", f"its heads choose together; cut down to {at.heads}")
        if int(at.length.amax()) <= self.tokens:
            return None
        prompt = at.phase == "prefill"
        blocks = query_blocks(at.query_positions, at.query_real, self.block if prompt else 1)
        numbers = chunk_numbers(self.starts(at), at.key_positions[:, 0], self.chunk)
        scores = self.choice.scores(at.q, blocks, self.chunks(at, numbers), numbers)
        allowed = blocks.last_rows(at.seen().any(1)) & at.real
        shown = blocks.spread(self.choice.read(scores, allowed)[:, None])
        if prompt:
            late = at.query_positions >= (at.length - self.instruction)[:, None]
            shown = shown | late[:, None, :, None]
        return shown

    def starts(self, at: Moment) -> Tensor:
        """Starts of chunks (B,C)."""
        name = f"starts for heads {at.heads}"
        if self.trained is None:
            first = [0, *self.boundaries]
            return torch.tensor(first, device=at.k.device).expand(len(at.k), -1)
        if name not in at.memory:
            at.memory[name] = self.predicted(at, self.trained.to(at.k.device))
        return at.memory[name]

    def predicted(self, at: Moment, predictor: BoundaryPredictor) -> Tensor:
        """What the predictor says of each sequence, its length the last start."""
        rows = []
        for keys, real in zip(at.k.detach(), at.real[:, 0], strict=True):
            logits = predictor(keys[None, :, real].to(predictor.dtype))[0]
            logits[: predictor.window - 1] = -torch.inf
            logits[len(logits) - predictor.window :] = -torch.inf
            most = len(logits) // self.chunk
            gaps = pick_gaps(logits, self.threshold, most, self.apart)
            rows.append([0, *(gap + 1 for gap in gaps), len(logits)])
        longest = max(len(row) for row in rows)
        rows = [row + [row[-1]] * (longest - len(row)) for row in rows]
        return torch.tensor(rows, device=at.k.device)

    def chunks(self, at: Moment, numbers: Tensor) -> ChunkSums:
        """Statistics of all keys; those of earlier calls are remembered."""
        name, n = f"chunks for heads {at.heads}", at.q.shape[2]
        known: ChunkSums | None = at.memory.get(name)
        up_to_date = known is not None and torch.equal(known.count() + n, at.length)
        new = n if up_to_date else at.k.shape[2]
        wide = torch.promote_types(at.k.dtype, torch.float32)
        keys, real = at.k[:, :, -new:].mean(1, dtype=wide), at.real[:, 0, -new:]
        if known is None or not up_to_date:
            known = no_chunks(keys)
        at.memory[name] = known.plus(keys, numbers[:, -new:], real)
        return at.memory[name]


POOLINGS: Mapping[str, Pooling] = {
    "avgpool": "mean",
    "avgpool_norm": "scaled_mean",
    "maxpool": "max",
}


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' token lists by pooling and window, boundary ratios, boundaries of the first
    sample, and the output with normalised pooling, of one golden case.
    """
    config, inputs = case["config"], case["inputs"]
    q, k, starts = inputs["q"], inputs["k"], inputs["boundaries"]
    heads, length = k.shape[1:3]
    place = torch.arange(length).expand(len(k), -1)
    blocks = query_blocks(place, None, config["block_size"])
    rows = -(-length // config["block_size"])
    numbers = chunk_numbers(starts, place, length)
    chunks = no_chunks(k.mean(1)).plus(k.mean(1), numbers, place >= 0)
    ends = blocks.greatest(place, 0)[..., None]
    choice = ChunkChoice(config["topk_tokens"], config["local_tokens"], 0, ties="any")
    found = {}
    for name in case["outputs"]["topk_indices"]:
        pooling, window = literal_eval(name)
        allowed = (place[:, None] <= ends) & (place[:, None] > ends - (window or length))
        asked = replace(choice, pooling=POOLINGS[pooling])
        read = asked.read(asked.scores(q, blocks, chunks, numbers), allowed)
        found[name] = _listed(read[:, :rows], choice.tokens)[:, None].expand(-1, heads, -1, -1)
    spliced = replace(choice, sinks=config["global_tokens"])
    read = spliced.read(spliced.scores(q, blocks, chunks, numbers), place[:, None] <= ends)
    shown = blocks.spread(read[:, None])[:, 0]
    mask = Causal() & Given(lambda b, h, query, key: shown[b, query, key])
    ratio = boundary_ratio(inputs["head_mean_attn"], config["boundary_window"])
    return {
        "topk_indices": found,
        "boundary_ratio": ratio,
        "boundaries_selected_sample0": pick_gaps(ratio[0], config["theta"], length, config["nms"]),
        "out": attend(q, k, inputs["v"], Call(mask=mask), Scored()).output,
    }


def _listed(read: Tensor, count: int) -> Tensor:
    """Booleans (B,T,M) as lists of keys (B,T,count), filled up with the last key."""
    last = read.shape[-1] - 1
    found = torch.where(read, torch.arange(last + 1), last).sort(-1).values[..., :count]
    return F.pad(found, (0, count - found.shape[-1]), value=last)


CARD = TreatmentCard(
    name="dhsa",
    build=Dhsa,
    papers=(
        Paper(
            "2510.24606",
            "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
            2025,
        ),
    ),
    claim=Claim(
        "chunks that end where attention turns need fewer tokens than equal ones",
        "regard evaluate --plan dhsa.json --task needle",
    ),
    example=Trial({"tokens": 10, "local": 3, "sinks": 2, "block": 1, "instruction": 0, "chunk": 4}),
    limits=(Coincides({"tokens": 10_000}),),
    goldens=(Golden("213_dhsa.pt", replay, "https://github.com/xiongsiheng/DHSA", "cc8e9c7451"),),
)
