r"""The recipe of DuoAttention's gates: which key heads of a frozen model need all of the past.

    loss = mean over supervised tokens and channels of (h_full - h_gated)^2 + 0.05 mean |alpha|

h are the hidden states after the last norm, once of the untouched model and once with every key
head blended as `treatments.duo` says. Gates alpha (layers, key heads) start at 1 and are the only
parameters; AdamW without weight decay, clamped to [0, 1] before each step. The published blend
mixes the streaming output of the gated branch's own states with the full output of the untouched
branch, which carries no gradient; "self" takes both from the gated branch's own states.

The data must ask for what lies far back, at positions that are supervised:
`regard.tasks.needle.Needle(1024, facts=10, asked=10).batches("train", 4)` for the pocket model.
`regard.recipes.duo_plan` makes a plan of the gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.hosting import Host, host_of
from regard.core.incoming import Chosen
from regard.core.moment import Moment, Site
from regard.core.treatment import Treatment
from regard.recipes.losses import of_task, targets_of
from regard.recipes.training import Progress, frozen, trained
from regard.tasks.task import IGNORED, Batch
from regard.treatments.duo import check_stream, gated

Blend = Literal["published", "self"]
RATE, WARM_UP, LEAST = 0.02, 0.2, 0.1  # learning rate; share of steps up, and down; its floor
PENALTY = 0.05  # weight of mean |alpha|


@dataclass(frozen=True)
class DuoGate(Treatment):
    """Blend full and streaming attention, differentiable in alpha (layers, key heads). full: other
    full outputs (B,h,N,E) by site, in place of the branch's own.
    """

    alpha: Tensor
    sinks: int
    recent: int
    full: Mapping[str, Tensor] | None = None

    def attention(self, at: Moment) -> Tensor:
        full = None if self.full is None else self.full[at.site.name]
        return gated(at, self.alpha, self.sinks, self.recent, full)


@dataclass(frozen=True)
class Recorded(Treatment):
    """Leave what every head returns in `outputs`, by site."""

    outputs: dict[str, Tensor]

    def output(self, output: Tensor, at: Moment) -> Tensor:
        self.outputs[at.site.name] = output.detach().clone()
        return output


@dataclass(frozen=True)
class Moves:
    """One step of training: its number, the distance of the hidden states, mean |alpha|."""

    done: int
    distance: float
    open: float


class GateTraining(nn.Module):
    """Gates of a model under training, as a lesson.

    Raises:
        ArgumentError: sinks or recent out of range, a blend of another name.
        UnsupportedError: a model that is not of transformers.
    """

    def __init__(
        self, model: Any, *, sinks: int = 128, recent: int = 256, blend: Blend = "published"
    ) -> None:
        super().__init__()
        check_stream(sinks, recent)
        if blend not in ("published", "self"):
            raise ArgumentError("blend", "'published' or 'self'", blend)
        self.model, self.blend = model, blend
        self.sinks, self.recent = sinks, recent
        self.host: Host = host_of(model)
        if self.host.name != "transformers":
            lacks = "its last hidden states are known of transformers models alone"
            raise UnsupportedError(f"gates of {type(model).__name__}", lacks)
        self.sites: list[Site] = [s for s in self.host.sites(model) if s.causal and not s.cross]
        if not self.sites:
            raise ArgumentError("model", "causal self-attention", type(model).__name__)
        first = self.sites[0]
        device = next(model.parameters()).device
        self.alpha = nn.Parameter(torch.ones(first.layers, first.kv_heads, device=device))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The distance of the states on a batch of `of_task`, and the penalty of open gates."""
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        distance = self.distance(batch["input_ids"], targets_of(batch), self.alpha)
        return {"distance": distance, "open": PENALTY * self.alpha.abs().mean()}

    def distance(self, inputs: Tensor, targets: Tensor, gates: Tensor) -> Tensor:
        """Mean square difference of the last hidden states under gates (layers, key heads), at the
        tokens of inputs (B,N) whose targets (B,N) supervise.
        """
        asked = targets != IGNORED
        outputs: dict[str, Tensor] = {}
        with torch.no_grad():
            wanted = self._hidden(inputs, Recorded(outputs))[asked]
        full = outputs if self.blend == "published" else None
        treatment = DuoGate(gates, self.sinks, self.recent, full)
        found = self._hidden(inputs, treatment)[asked]
        precise = torch.promote_types(found.dtype, torch.float32)
        return (found.to(precise) - wanted.to(precise)).square().mean()

    def _hidden(self, ids: Tensor, treatment: Treatment) -> Tensor:
        """Hidden states (B,N,C) after the last norm, under a treatment of every head."""
        phases = frozenset(("prefill", "decode"))
        steps = {
            s.name: [Chosen(0, treatment, tuple(range(s.heads)), phases)]  # type: ignore[arg-type]
            for s in self.sites
        }
        with self.host.run(self.model, steps):
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def run(
        self,
        batches: Iterator[Batch],
        steps: int,
        watch: Callable[[Moves], None] = lambda _: None,
    ) -> Tensor:
        """Train for some steps; the gates (layers, key heads), clamped to [0, 1].

        Raises:
            ArgumentError: no steps, too few batches, or one that asks nothing.
            UnsupportedError: accelerate is missing.
        """

        def told(moved: Progress) -> None:
            losses = moved.losses
            watch(Moves(moved.done, losses["distance"], losses["open"] / PENALTY))

        given = of_task(batches)
        with frozen(self.model):
            trained(self, given, steps, rate=RATE, clip=math.inf, schedule=_factor, watch=told)
        return self.alpha.detach().clamp(0, 1)


def _factor(done: int, steps: int) -> float:
    """What the learning rate is multiplied by: up, level, down."""
    ramp = max(1, int(steps * WARM_UP))
    return min(1.0, max((done + 1) / ramp, LEAST), max((steps - done) / ramp, LEAST))
