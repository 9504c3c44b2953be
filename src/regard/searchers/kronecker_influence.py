r"""Kronecker influence: how much a training step on a sample lowers the loss on a reference set.

    J(z) = sum_W < (A_W (x) S_W + lam)^{-1} G_ref, G_z >        I(z) = J(z) / mean over ref of J

W: the linear maps of self-attention, or of all of its layers; G: gradients by W of losses summed
over tokens; factors A and S (importance/kronecker.py) are means over the reference's real tokens. I
is 1 for a sample that helps as much as the reference's own sequences do, and below 0 for one that
does harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.core.answers import real_or_all
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.importance.kronecker import Factors, second_moment
from regard.searchers.judging import predicted, whole

Maps = Literal["attention", "layers"]
"""Maps of self-attention alone, or also of what stands beside it in its layers."""


class KroneckerInfluence:
    """Influence of samples on a scene's passages, through the linear maps of its self-attention.

    Raises:
        ArgumentError: a scene without passages; other maps.
        UnsupportedError: self-attention without linear maps that learn.
    """

    def __init__(self, scene: Scene, damping: float, maps: Maps = "attention") -> None:
        self.scene, self.maps = scene, linear_maps(scene, maps)
        if not scene.passages:
            raise ArgumentError("passages", "a reference of one or more", 0)
        inputs, outputs, gradients = ({n: torch.zeros(()) for n in self.maps} for _ in range(3))
        tokens = sequences = 0
        for passage in map(whole, scene.passages):
            with _watched(self.maps) as passed:
                found = self.gradients(passage)
            for name, (x, d) in passed.items():
                real = real_or_all(passage, x)
                inputs[name] = inputs[name] + second_moment(x[real])
                outputs[name] = outputs[name] + second_moment(d[real])
                gradients[name] = gradients[name] + found[name]
            real = real_or_all(passage, next(iter(passed.values()))[0])
            tokens, sequences = tokens + int(real.sum()), sequences + len(real)
        self.wanted = {
            name: _solved(Factors(inputs[name] / tokens, outputs[name] / tokens), g, damping)
            for name, g in gradients.items()
        }
        self.scale = self._product(gradients) / sequences

    def gradients(self, passage: Passage) -> dict[str, Tensor]:
        """Gradients (O,I) of a passage's loss, summed over its tokens, by each map's weight."""
        with torch.enable_grad():
            found = predicted(self.scene.model, passage)
            loss = (found.losses() * found.counted.sum(-1)).nansum()
            weights = [module.weight for module in self.maps.values()]
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        return dict(zip(self.maps, gradients, strict=True))

    def of(self, passage: Passage) -> float:
        """How much a step on this passage lowers the loss on the reference, in parts of what one of
        the reference's sequences does; 0 if that is nothing.
        """
        return self._product(self.gradients(passage)) / self.scale if self.scale else 0.0

    def _product(self, gradients: dict[str, Tensor]) -> float:
        return sum(float((self.wanted[n] * x.double()).sum()) for n, x in gradients.items())


def _solved(factors: Factors, gradient: Tensor, damping: float) -> Tensor:
    """The scaled gradient (O,I); zeros for a map on which the loss does not depend."""
    lam = factors.damping(damping)
    return factors.solved(gradient, lam) if lam > 0 else torch.zeros_like(gradient).double()


def linear_maps(scene: Scene, maps: Maps = "attention") -> dict[str, nn.Linear]:
    """The linear maps of the scene's chain of self-attention, or of its layers, by name.

    Raises:
        ArgumentError: other maps.
        UnsupportedError: there are none, or their weights learn nothing.
    """
    if maps not in get_args(Maps):
        raise ArgumentError("maps", f"one of {get_args(Maps)}", maps)
    layers = [site.name.rpartition(".")[0] or site.name for site in scene.chain]
    found = {
        f"{place}.{name}" if name else place: module
        for place in ([site.name for site in scene.chain] if maps == "attention" else layers)
        for name, module in scene.model.get_submodule(place).named_modules()
        if isinstance(module, nn.Linear)
    }
    if not found or not all(module.weight.requires_grad for module in found.values()):
        raise UnsupportedError("diverse_influence", "attention has no linear maps that learn")
    return found


@contextmanager
def _watched(maps: dict[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """A context at whose end a backward pass has left, by name, the inputs (…,I) of every map and
    the loss's gradients (…,O) by its outputs.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in maps.items():

        def leave(m: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            given = args[0].detach()
            output.register_hook(lambda d: found.update({name: (given, d.detach())}))

        handles.append(module.register_forward_hook(leave))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
