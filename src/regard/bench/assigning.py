"""What a fitted plan gave every key head, beside what the atlas says that its query heads do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from regard.atlases.survey import atlas
from regard.bench.fitting import Assigned
from regard.bench.subject import Subject
from regard.core.passage import Passage
from regard.searchers.fitting import Fitted, Sensitivity, decoder_sites

METRICS = ("induction", "sink_first", "local", "previous_token")
"""Of the atlas, to tell what a key head's queries do."""


def assigned(
    found: Sensitivity, best: Fitted, examples: Sequence[Passage], subject: Subject
) -> Iterator[Assigned]:
    """What every key head got, and what its query heads do."""
    site = decoder_sites(subject.model)[0]
    seen = _metrics(subject, examples[:1], site.tower)
    for g, group in enumerate(found.groups):
        rule = found.rules[int(best.choice[g])]
        heads = slice(group.kv_head * site.group, (group.kv_head + 1) * site.group)
        yield Assigned(
            layer=group.layer,
            kv_head=group.kv_head,
            rule=rule.label,
            share=rule.share,
            rises=tuple(found.rises[g].tolist()),
            metrics={name: float(x[group.layer, heads].max()) for name, x in seen.items()},
        )


def _metrics(
    subject: Subject, examples: Sequence[Passage], tower: str
) -> Mapping[str, torch.Tensor]:
    """The metrics of the atlas that tell what heads do, (L,H) each."""
    found = atlas(subject.model, examples, ("copying", "sinks", "distance"), examples=0)
    return {
        name: found.map(name, tower).nan_to_num(0.0) for name in METRICS if name in found.metrics
    }
