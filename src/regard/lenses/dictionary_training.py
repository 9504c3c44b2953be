r"""Training a dictionary: Adam with unit decoder rows, warm-up along a cosine, dead features drawn
anew.

Each step takes away the part of the decoder's gradient that would lengthen its rows, and gives them
norm 1 again. A feature is dead if it fired for no more than `course.dead` of the tokens since the
last look; redrawn, Adam's moments of it become zero and the warm-up begins anew.

    training = DictionaryTraining(Dictionary(heads, head_dim, features), batch_of)
    training.run(20_000, Path("dictionary.safetensors"))     # goes on where that file stopped
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.lenses.dictionary import Dictionary, Loss
from regard.lenses.dictionary_course import Course
from regard.lenses.dictionary_redraw import redraw

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class DictionaryTraining:
    """A dictionary under training.

    batch_of: step number to activations (T,H E), the same for the same number, so that a run that
    was stopped goes on as if it had not been.
    """

    def __init__(
        self, dictionary: Dictionary, batch_of: Callable[[int], Tensor], course: Course = Course()
    ) -> None:
        self.dictionary = dictionary
        self.batch_of = batch_of
        self.course = course
        self.adam = torch.optim.Adam(dictionary.parameters(), lr=course.rate, betas=course.betas)
        self.step = 0
        self.warm = 0  # the step at which the present warm-up began
        self.fired = torch.zeros(dictionary.features, dtype=torch.long)
        self.tokens = 0

    def run(
        self,
        steps: int,
        file: Path | None = None,
        *,
        save_every: int = 1000,
        progress: Callable[[int, float], None] | None = None,
    ) -> Dictionary:
        """Train up to so many steps in all. file: where the state is kept and taken from, if it
        exists. progress: called after each step with its number and its loss.

        Raises:
            ArgumentError: the file is of another dictionary or course.
        """
        if file is not None and file.exists():
            self.load(file)
        while self.step < steps:
            loss = self.advance()
            if progress is not None:
                progress(self.step, loss.total.item())
            if file is not None and (self.step % save_every == 0 or self.step == steps):
                self.save(file)
        return self.dictionary

    def advance(self) -> Loss:
        """One step."""
        found, x = self.dictionary, self.batch_of(self.step)
        coded = found(x)
        loss = found.loss(x, coded, self.course.sparsity)
        self.adam.zero_grad()
        loss.total.backward()
        with torch.no_grad():
            gradient, rows = found.decoder.grad, found.decoder
            if gradient is not None:
                gradient -= (gradient * rows).sum(-1, keepdim=True) * rows
        self.adam.param_groups[0]["lr"] = self.course.rate_at(self.step - self.warm)
        self.adam.step()
        found.normalise()
        self.fired += (coded.features > 0).sum(0).cpu()
        self.tokens += len(x)
        self.step += 1
        if self.step % self.course.every == 0:
            self._look()
        return loss

    def _look(self) -> None:
        """Redraw dead features, if it is still time for that; count anew."""
        dead = (self.fired / max(self.tokens, 1) <= self.course.dead).nonzero()[:, 0]
        if len(dead) and self.step <= self.course.redraws * self.course.every:
            first = max(0, self.step - self.course.looked_at)
            inputs = torch.cat([self.batch_of(i) for i in range(first, self.step)])
            source = torch.Generator().manual_seed(self.course.seed + self.step)
            drawn = redraw(self.dictionary, dead, inputs, self.course.redrawn, source)
            self._forget(drawn)
            self.warm = self.step
        self.fired.zero_()
        self.tokens = 0

    def _forget(self, features: Tensor) -> None:
        """Set Adam's moments of some features to zero."""
        found = self.dictionary
        for parameter, axis in ((found.encoder, 1), (found.decoder, 0), (found.encoder_bias, 0)):
            for name in MOMENTS[:2]:
                self.adam.state[parameter][name].index_fill_(axis, features, 0.0)

    def save(self, file: Path) -> None:
        """Write weights, Adam's state and counts as safetensors, where they stand as JSON."""
        tensors = {name: p.detach() for name, p in self.dictionary.named_parameters()}
        for name, parameter in self.dictionary.named_parameters():
            for moment in MOMENTS:
                tensors[f"adam.{name}.{moment}"] = self.adam.state[parameter][moment]
        tensors["fired"] = self.fired
        beside = file.with_name(file.name + ".part")
        save_file({n: x.contiguous() for n, x in tensors.items()}, beside, self._standing())
        os.replace(beside, file)

    def load(self, file: Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            ArgumentError: it is of another dictionary or course.
        """
        with safe_open(file, "pt") as opened:
            standing: dict[str, Any] = json.loads((opened.metadata() or {}).get("training", "{}"))
            own = json.loads(self._standing()["training"])
            if any(standing.get(name) != own[name] for name in ("course", "shape")):
                raise ArgumentError("file", "the same dictionary and course", standing)
            with torch.no_grad():
                for name, parameter in self.dictionary.named_parameters():
                    parameter.copy_(opened.get_tensor(name))
                    self.adam.state[parameter] = {
                        moment: opened.get_tensor(f"adam.{name}.{moment}").to(
                            "cpu" if moment == "step" else parameter.device
                        )
                        for moment in MOMENTS
                    }
            self.fired = opened.get_tensor("fired")
        self.step, self.warm, self.tokens = (standing[n] for n in ("step", "warm", "tokens"))

    def _standing(self) -> dict[str, str]:
        counts = {"step": self.step, "warm": self.warm, "tokens": self.tokens}
        shape = [self.dictionary.heads, *self.dictionary.encoder.shape]
        course = asdict(self.course) | {"betas": list(self.course.betas)}
        return {"training": json.dumps({**counts, "shape": shape, "course": course})}
