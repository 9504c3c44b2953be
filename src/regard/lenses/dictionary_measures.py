r"""How good a dictionary is, and what its features do, in the model it was made for.

    L0 = mean number of features of a token         dead share: features that never fired
    loss recovered = (CE_zero - CE_coded) / (CE_zero - CE)

CE_coded: the heads of the layer replaced by their reconstruction; CE_zero: silenced. All of it
acts where the heads' outputs leave a layer, before the output projection.

    x = head_outputs(model, site, lambda: model(ids))                    # (B,N,H E)
    recovered(model, site, dictionary, lambda: loss_of(model(ids)))
    with pinned(model, site, dictionary, feature=3, value=0.0): model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError
from regard.core.moment import Moment, Site
from regard.core.scene import Scene
from regard.core.treatment import Treatment
from regard.lenses.dictionary import Dictionary, joined, parted


@dataclass(frozen=True)
class Output(Treatment):
    """What the heads of a layer give, (B,N,H E), becomes change(of it)."""

    change: Callable[[Tensor], Tensor]

    def output(self, output: Tensor, at: Moment) -> Tensor:
        return parted(self.change(joined(output)).to(output.dtype), output.shape[1])


@dataclass(frozen=True)
class Sparsity:
    """Of a code: mean features per token, and the share of features that never fired."""

    l0: float
    dead: float


@dataclass(frozen=True)
class Recovered:
    """Loss as the model is, with the reconstruction, and with the layer's heads silenced."""

    plain: float
    coded: float
    silenced: float

    @property
    def share(self) -> float:
        """Share of the layer's worth that the reconstruction keeps; 0 where it is worth nothing."""
        worth = self.silenced - self.plain
        return (self.silenced - self.coded) / worth if worth else 0.0


def head_outputs(model: nn.Module, site: str, forward: Callable[[], Any]) -> Tensor:
    """What the heads of one attention module give in a forward, (B,N,H E).

    Raises:
        ArgumentError: no such module, or it did not run.
        UnsupportedError: no attention is reached.
    """
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x.detach())
        return x

    with torch.no_grad(), changed_outputs(model, site, keep):
        forward()
    if not found:
        raise ArgumentError("site", "a module that the forward runs", site)
    return found[-1]


@torch.no_grad()
def sparsity(dictionary: Dictionary, x: Tensor) -> Sparsity:
    """L0 and dead share over tokens x (T,H E).

    Raises:
        ArgumentError: no token.
    """
    if not len(x):
        raise ArgumentError("x", "one token or more", tuple(x.shape))
    fires = dictionary(x).features > 0
    alive = fires.flatten(0, -2).any(0)
    return Sparsity(float(fires.sum(-1).double().mean()), float((~alive).double().mean()))


@torch.no_grad()
def recovered(
    model: nn.Module, site: str, dictionary: Dictionary, loss: Callable[[], Tensor]
) -> Recovered:
    """What a dictionary keeps of a layer's worth to the loss (a scalar).

    Raises:
        ArgumentError: no such module, or one of another shape.
        UnsupportedError: no attention is reached.
    """
    plain = float(loss())
    with changed_outputs(model, site, lambda x: _coded(dictionary, x).reconstruction):
        coded = float(loss())
    with changed_outputs(model, site, torch.zeros_like):
        silenced = float(loss())
    return Recovered(plain, coded, silenced)


@contextmanager
def pinned(
    model: nn.Module, site: str, dictionary: Dictionary, feature: int, value: float
) -> Iterator[None]:
    """Inside, one feature has this value at every token; 0 takes it away. What the dictionary does
    not explain stays as it is.

    Raises:
        ArgumentError: no such feature or module.
        UnsupportedError: no attention is reached.
    """
    if not 0 <= feature < dictionary.features:
        raise ArgumentError("feature", f"0 to {dictionary.features - 1}", feature)

    def pin(x: Tensor) -> Tensor:
        missing = value - _coded(dictionary, x).features[..., feature, None]
        return x + missing * dictionary.decoder[feature]

    with changed_outputs(model, site, pin):
        yield


def _coded(dictionary: Dictionary, x: Tensor) -> Any:
    """The code of what a model's heads give.

    Raises:
        ArgumentError: they are not of the dictionary's width.
    """
    if x.shape[-1] != len(dictionary.encoder):
        raise ArgumentError("dictionary", f"one of width {x.shape[-1]}", len(dictionary.encoder))
    return dictionary(x.to(dictionary.encoder.dtype))


@contextmanager
def changed_outputs(
    model: nn.Module, site: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside, the heads of one attention module give change(x) for x (B,N,H E), padded tokens too.
    A plan in force on the model does not act on it meanwhile.

    Raises:
        ArgumentError: no such module.
        UnsupportedError: no attention is reached.
    """
    scene = Scene.of(model, ())
    with scene.treated(Output(change), _site(scene, site)):
        yield


def _site(scene: Scene, name: str) -> Site:
    for site in scene.sites:
        if site.name == name:
            return site
    raise ArgumentError("site", f"one of {[s.name for s in scene.sites]}", name)
