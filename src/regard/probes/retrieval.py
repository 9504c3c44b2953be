r"""Retrieval: heads that look at a fact while the model says it.

    g_h = { j in needle : while some token x is generated, h attends most to j, and token j is x }
    score_h = |g_h| / |needle|

The model answers each passage greedily, with as many tokens as the passage's `answer`; where it
says no more than `recall` of them right there is nothing to measure. The needle is the role of the
tokens that are the answer in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core.answers import real_tokens_of
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene, chosen
from regard.core.some_rows import weights_of_rows
from regard.core.treatment import Treatment
from regard.importance.retrieval import Count, retrieval_score

BOTH = ("prefill", "decode")


@dataclass(frozen=True, eq=False)
class _Most(Treatment):
    """Notes the key that the newest query of each head attends to most; changes nothing."""

    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def attention(self, at: Moment) -> None:
        last = torch.full((len(at.q), 1), at.q.shape[2] - 1, device=at.q.device)
        most = weights_of_rows(at, last)[:, :, 0].argmax(-1)
        self.seen.setdefault(at.site.name, []).append(most)


@dataclass(frozen=True)
class Retrieval:
    """count: every copied token once (set), or every time it is copied (events). recall: share of
    the answer that must be said. role: of the tokens that are the answer in the prompt.
    """

    count: Count = "set"
    recall: float = 0.5
    role: str = "needle"

    def __post_init__(self) -> None:
        if not 0 <= self.recall < 1:
            raise ArgumentError("recall", "a share from 0 to below 1", self.recall)

    @torch.no_grad()
    def run(self, scene: Scene) -> Iterator[tuple[Passage, Site, Finding]]:
        sites, answered = _decoder(scene), False
        for passage in scene.passages:
            tokens, answer, needle = _asked(passage, self.role)
            watch = _Most()
            said = _said(scene, sites, passage, answer.shape[1], watch)
            good = (said == answer).float().mean(-1) > self.recall
            answered = answered or bool(good.any())
            for site in sites:
                most = torch.stack(watch.seen[site.name], 1)
                score = retrieval_score(most, tokens, said, needle, self.count).double()
                score = score.masked_fill(~good[:, None], torch.nan)
                yield passage, site, Finding({"retrieval": score})
        if not answered:
            raise ArgumentError("passages", f"one answered to more than {self.recall:.0%}", 0)


def _decoder(scene: Scene) -> Sequence[Site]:
    """The heads of a model that generates.

    Raises:
        UnsupportedError: it does not, or not from the prompt alone.
    """
    if not callable(getattr(scene.model, "generate", None)):
        raise UnsupportedError("retrieval", "the model does not generate")
    if any(site.cross for site in scene.sites) or not scene.chain[0].causal:
        raise UnsupportedError("retrieval", "the model is no decoder that reads its prompt itself")
    return scene.chain


def _asked(passage: Passage, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt (B,N), answer (B,T) and where it stands in the prompt (B,N).

    Raises:
        UnsupportedError: one of them is missing.
        ArgumentError: the prompt is padded on the right.
    """
    real = real_tokens_of(passage)
    if passage.tokens is None or passage.answer is None or role not in passage.roles:
        raise UnsupportedError("retrieval", f"the passages have no `answer` or no role {role!r}")
    if not bool(real[:, -1].all()):
        raise ArgumentError("attention_mask", "padding on the left, for a model to go on", "right")
    return passage.tokens, passage.answer, passage.roles[role]


def _said(
    scene: Scene, sites: Sequence[Site], passage: Passage, length: int, watch: _Most
) -> Tensor:
    """What the model says next (B,T), greedily, while its heads are watched."""
    inputs = dict(passage.inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    steps = {s.name: [chosen(watch, range(s.heads), phases=BOTH)] for s in sites}
    with scene.run(steps):
        said = scene.model.generate(
            **inputs,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
    return said[:, inputs["input_ids"].shape[1] :]


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' score, which counts every copy of one sample."""
    config, given = case["config"], case["inputs"]
    most = torch.stack([weights.argmax(-1) for weights in given["attentions"]])
    places = torch.arange(len(given["prompt_ids"]))
    needle = (places >= config["needle_start"]) & (places < config["needle_end"])
    prompt, said = given["prompt_ids"][None], given["generated"][None]
    return {"score": retrieval_score(most[None], prompt, said, needle[None], "events")[0]}


CARD = ProbeCard(
    name="retrieval",
    build=Retrieval,
    metrics={"retrieval": "share of a fact that the head looks at while the model says it"},
    papers=(
        Paper(
            "2404.15574",
            "Retrieval Head Mechanistically Explains Long-Context Factuality",
            2024,
        ),
    ),
    claim=Claim("a few heads retrieve; without them facts are not found", "regard atlas"),
    goldens=(
        Golden(
            "147_retrieval_score.pt",
            replay,
            "https://github.com/nightdessert/Retrieval_Head",
            "3ac171a6f7",
        ),
    ),
)
