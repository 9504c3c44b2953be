r"""The recipe of the pocket language model: copies at varying lags first, then facts in text, then
longer contexts.

    python -m regard.recipes.pocket_language --out DIR [--seed 0]

The model is a Llama of four layers. Loss of a step: mean cross-entropy of the tasks' answers, plus
that of the next byte wherever the next token is a byte. Copies come first because they make a model
look for the earlier occurrence of the token it reads, which facts alone teach far later. Lengths
take turns because a model trained at one length fails at shorter ones too. At last, heads drop out
at random, so that a few missing ones do no harm unless they are those that retrieve.

A run writes DIR/checkpoint.pt as it goes, and the same command resumes it; one seed, one Python and
one PyTorch on one kind of processor give the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.recipes.llama import random_llama
from regard.recipes.pocket_card import save_with_card
from regard.recipes.pocket_phases import POCKET, Recipe, examples
from regard.tasks.task import IGNORED, stream_seed
from regard.tasks.vocabulary import BYTES

RATE = 3e-3  # learning rate
EVERY = 100  # steps between two checkpoints


@dataclass(frozen=True)
class Moment:
    """Where a run stands: steps done, the phase's name, mean losses of answers and of text."""

    done: int
    phase: str
    answers: float
    text: float


Watch = Callable[[Moment], None]


def losses(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers, and of the next bytes where nothing is asked (0 where
    there are none).
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    known = targets != IGNORED
    following = inputs[:, 1:]
    text = (following < BYTES) & ~known[:, :-1]
    return (
        F.cross_entropy(logits[known], targets[known]),
        F.cross_entropy(logits[:, :-1][text], following[text], reduction="sum")
        / text.sum().clamp(min=1),
    )


@contextmanager
def heads_dropped(model: Any, share: float, random: torch.Generator) -> Iterator[None]:
    """Drop the output of this share of all heads, drawn anew for every layer and example."""
    heads = model.config.num_attention_heads

    def drop(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        outputs = inputs[0].unflatten(-1, (heads, -1))  # (B,N,H,D)
        kept = torch.rand(len(outputs), 1, heads, 1, generator=random) >= share
        return ((outputs * kept).flatten(-2),)

    places = [layer.self_attn.o_proj for layer in model.model.layers] if share else []
    hooks = [place.register_forward_pre_hook(drop) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Run:
    """A training run in a folder.

    Raises:
        ArgumentError: the folder's checkpoint is of another recipe or seed.
        UnsupportedError: transformers is missing.
    """

    def __init__(self, out: Path, seed: int, recipe: Recipe) -> None:
        self.seed, self.recipe, self.done, self.path = seed, recipe, 0, out / "checkpoint.pt"
        self.label = repr((recipe.shape, recipe.phases, seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = random_llama(recipe.shape)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.1
        )
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            if saved["recipe"] != self.label:
                raise ArgumentError("out", "a folder without another recipe's checkpoint", out)
            self.model.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.done = saved["done"]

    def train(self, watch: Watch) -> None:
        """Take the steps that are left."""
        self.model.train()
        while self.done < self.recipe.steps:
            watch(self._step())
            if self.done % EVERY == 0 or self.done == self.recipe.steps:
                self._save()
        self.model.eval()

    def _step(self) -> Moment:
        phase, factor = self.recipe.phase_at(self.done)
        random = torch.Generator().manual_seed(stream_seed("train", self.seed, self.done))
        drawn = examples(phase, self.done, self.seed * self.recipe.steps + self.done)
        with heads_dropped(self.model, phase.drop, random):
            answers, text = losses(self.model, *drawn)
        self.optimiser.param_groups[0]["lr"] = RATE * factor
        self.optimiser.zero_grad()
        (answers + phase.text * text).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        return Moment(self.done, phase.name, answers.item(), text.item())

    def _save(self) -> None:
        state = {
            "recipe": self.label,
            "done": self.done,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        new = self.path.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.path)


@contextmanager
def progress_on_stderr(steps: int) -> Iterator[Watch]:
    """A bar with the losses of the last step on a terminal, else a line per checkpoint."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps)

        def watch(moment: Moment) -> None:
            words = f"{moment.phase} loss {moment.answers:.3f} text {moment.text:.3f}"
            bar.update(task, completed=moment.done, description=words)
            if not console.is_terminal and moment.done % EVERY == 0:
                console.print(f"{moment.done}/{steps} {words}")

        yield watch


def main() -> None:
    """Train, measure and write the model with its card."""
    parser = argparse.ArgumentParser(prog="python -m regard.recipes.pocket_language")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and its model")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    run = Run(given.out, given.seed, POCKET)
    with progress_on_stderr(POCKET.steps) as watch:
        run.train(watch)
    steps = {phase.name: phase.steps for phase in POCKET.phases}
    save_with_card(run.model, given.out / "language", {"seed": given.seed, "steps": steps})


if __name__ == "__main__":
    main()
