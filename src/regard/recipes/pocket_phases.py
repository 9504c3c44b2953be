"""What the pocket language model is and what it is shown, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.tasks.induction import Induction
from regard.tasks.needle import Needle
from regard.tasks.vocabulary import BEGIN, SIZE

WARM_UP = 100  # steps in which the learning rate is reached
SHAPE: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": BEGIN,
    "eos_token_id": None,
    "pad_token_id": None,
}

Mix = tuple[tuple[Needle | Induction, int], ...]  # tasks of one length, and how many rows of each


@dataclass(frozen=True)
class Phase:
    """Steps on mixes of tasks, which take turns.

    text: weight of the loss on text. last: the learning rate falls linearly to this fraction. drop:
    probability that a head's output is dropped from an example.
    """

    name: str
    steps: int
    mixes: tuple[Mix, ...]
    text: float = 1.0
    last: float = 1.0
    drop: float = 0.0


def facts_in_text(length: int) -> Mix:
    """About 2048 tokens: half the rows ask all of their many facts; the others ask one of a few, or
    repeat a segment.
    """
    rows, many = max(1, 2048 // length), min(length // 24, 32)
    few, segments = rows // 3 or rows // 2, rows // 4
    parts = (
        (Needle(length, facts=many, asked=many), rows - segments - few),
        (Needle(length, facts=4, value=4), few),
        (Induction(length, 4, min(length // 3, 64), fill="text"), segments),
    )
    return tuple((task, count) for task, count in parts if count)


COPIES = ((Induction(64, 4, 48), 32),)
LONG_COPIES = ((Induction(1024, 4, 64), 1), (Induction(1024, 4, 64, fill="text"), 1))
PHASES = (
    Phase("copies", 800, (COPIES,), text=0.0),
    Phase("facts", 400, tuple(map(facts_in_text, (96, 128, 192, 256)))),
    Phase("longer", 800, tuple(map(facts_in_text, (128, 256, 384, 512)))),
    Phase(
        "longest",
        1800,
        (*map(facts_in_text, (256, 512, 768, 1024, 2048)), LONG_COPIES),
        last=0.02,
        drop=0.2,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """A model's configuration, and the phases of its training."""

    shape: dict[str, Any]
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[Phase, float]:
        """The phase of a step, and its factor on the learning rate.

        Raises:
            ArgumentError: training is over at that step.
        """
        start = 0
        for phase in self.phases:
            if step < start + phase.steps:
                gone = (step - start) / phase.steps
                return phase, min(1, (step + 1) / WARM_UP) * (1 + gone * (phase.last - 1))
            start += phase.steps
        raise ArgumentError("step", f"below {self.steps}", step)


POCKET = Recipe(SHAPE, PHASES)


def examples(phase: Phase, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B,N), of one step; the seed alone says which, not earlier steps."""
    mix = phase.mixes[step % len(phase.mixes)]
    batches = [next(iter(task.batches("train", rows, seed))) for task, rows in mix]
    inputs = torch.cat([batch.inputs for batch in batches])
    return inputs, torch.cat([batch.targets for batch in batches])
