r"""The recipe of SeerAttention's gates: each layer's gate learns to predict, from pooled queries
and keys, where the frozen model's own attention is largest.

    loss = mean over entries of T (log T - log softmax G), rows of blocks after the first quarter
    T_ab = largest attention weight in block (a, b), rows normalised        G: the gate's logits

    python -m regard.recipes.seer_gate --model DIR --out gates.safetensors [--steps 500]

AdamW, learning rate 1e-3 falling along a cosine; the model learns nothing. As a programme it trains
on needles in text, in the vocabulary of the pocket language model; other models bring their own
token ids to `SeerTraining.run`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.hosting import host_of
from regard.core.incoming import Chosen
from regard.core.mask import Causal
from regard.core.moment import Moment
from regard.core.sequence import in_sequence
from regard.core.treatment import Treatment
from regard.features.block_gate import BlockGate, Pool
from regard.importance.block_maxima import block_maxima
from regard.importance.gate_file import save_gates
from regard.importance.gated_blocks import gate_logits

RATE = 1e-3
SKIPPED = 0.25  # of the rows of blocks, from the first, that teach nothing: they are nearly dense


@dataclass(frozen=True)
class GateLesson(Treatment):
    """Changes nothing; leaves each layer's loss in `losses`."""

    training: SeerTraining
    losses: list[Tensor] = field(default_factory=list)

    def attention(self, at: Moment) -> Tensor | None:
        gate = self.training.gate_of(at)
        call = (at.call or Call(mask=Causal())).of_self()
        q, k = at.q.detach(), at.k.detach()
        with torch.enable_grad():
            self.losses.append(gate_loss(gate, q, k, call, at.scale))
        return None


def gate_loss(gate: BlockGate, q: Tensor, k: Tensor, call: Call, scale: float) -> Tensor:
    """The loss of one layer's gate on q (B,H,N,D), k (B,H_k,N,D) of causal self-attention."""
    logits, count = gate_logits(gate, q, k, call)
    alignment, fringe = in_sequence(call, q, k).alignment, -k.shape[2] % gate.block
    ordered = [F.pad(alignment.front(x), (0, 0, 0, fringe)) for x in (q, k)]
    real = F.pad(alignment.padding, (0, fringe))
    target = block_maxima(ordered[0], ordered[1], real, gate.block, scale)
    row = torch.arange(logits.shape[2], device=q.device)
    taught = (row >= (count * SKIPPED).long()[:, None]) & (row < count[:, None])
    guess = logits.log_softmax(-1).masked_fill(target == 0, 0.0)  # where T is 0, T log T is too
    loss = F.kl_div(guess, target, reduction="none") * taught[:, None, :, None]
    entries = taught.sum() * logits.shape[1] * logits.shape[3] * (len(q) // len(taught))
    return loss.sum() / entries.clamp_min(1)


class SeerTraining:
    """Gates of a model's causal self-attention modules under training."""

    def __init__(
        self,
        model: Any,
        *,
        block: int = 64,
        width: int | None = None,
        keys: Sequence[Pool] = ("max", "min", "avg"),
        seed: int = 0,
    ) -> None:
        self.model, self.host = model, host_of(model)
        self.sites = [s for s in self.host.sites(model) if s.causal and not s.cross]
        if not self.sites:
            raise ArgumentError("model", "causal self-attention", type(model).__name__)
        self.block, self.width, self.keys = block, width, tuple(keys)
        self.gates: dict[str, BlockGate] = {}
        self.seed = seed

    def gate_of(self, at: Moment) -> BlockGate:
        """The gate of a layer, made when its width is first seen."""
        if at.site.name not in self.gates:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed * 4096 + at.site.layer)
                gate = BlockGate(
                    at.site.heads,
                    at.q.shape[-1],
                    kv_heads=at.site.kv_heads,
                    block=self.block,
                    width=self.width,
                    keys=self.keys,
                )
            self.gates[at.site.name] = gate.to(at.q)
        return self.gates[at.site.name]

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of all gates on token ids (B,N)."""
        lesson = GateLesson(self)
        phases = frozenset({"prefill"})
        steps = {
            s.name: [Chosen(0, lesson, tuple(range(s.heads)), phases)]  # type: ignore[arg-type]
            for s in self.sites
        }
        with torch.no_grad(), self.host.run(self.model, steps):
            self.model(input_ids=ids, use_cache=False)
        return torch.stack(lesson.losses).mean()

    def run(
        self,
        batches: Iterable[Tensor],
        steps: int,
        watch: Callable[[int, float], None] | None = None,
    ) -> dict[str, BlockGate]:
        """Train on batches of token ids (B,N); the gates, by module."""
        source = iter(batches)
        first = next(source)
        self.loss(first[:1])  # makes the gates
        optimiser = torch.optim.AdamW(
            [p for gate in self.gates.values() for p in gate.parameters()], RATE, weight_decay=0.0
        )
        for done in range(steps):
            loss = self.loss(first if done == 0 else next(source))
            optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done / steps)) / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if watch is not None:
                watch(done + 1, loss.item())
        return self.gates


def main() -> None:
    """Train gates of a local model and write them."""
    from transformers import AutoModelForCausalLM

    from regard.tasks.needle import Needle

    parser = argparse.ArgumentParser(description="Train SeerAttention gates of a frozen model.")
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    chosen = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(chosen.model, local_files_only=True).eval()
    needles = Needle(chosen.length, facts=10, asked=10).batches("train", 4)
    training = SeerTraining(model, block=chosen.block)
    save_gates(chosen.out, training.run((b.inputs for b in needles), chosen.steps))


if __name__ == "__main__":
    main()
