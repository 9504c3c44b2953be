"""Rivals: a mechanism and scaled_dot_product_attention on the same input, ready to be timed.

An operator meets the bare function on the same q, k, v (B,H,N,D); a layer meets the standard
attention layer around it on the same x (B,N,H*D), projections included. Causal where the mechanism
is (on grids: not, cells have no past); a mechanism for grids alone gets a square one of about N
cells, and so does its rival.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from regard.bench.record import Record
from regard.bench.spec import Spec
from regard.bench.timing import Work
from regard.build import create
from regard.core.call import Call
from regard.core.card import Card
from regard.core.catalog import card
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal

Mode = Literal["forward", "backward"]  # "backward": a forward and the backward after it
Run = Callable[..., Tensor]
NOISE = 0.02  # on parameters: zero initial values would hide a mistake


class Setting(Record):
    """Shape of the input that all mechanisms share; layers are heads * head_dim wide."""

    batch: PositiveInt = 1
    heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    dtype: Literal["float32"] = "float32"

    @property
    def dim(self) -> int:
        """Width of a layer."""
        return self.heads * self.head_dim


@dataclass(frozen=True, eq=False)
class Rivals:
    """The mechanism and its rival; both take `inputs` (q, k, v or x). parameters: the mechanism's.

    size: (N,), or sides of a grid.
    """

    size: tuple[int, ...]
    causal: bool
    inputs: tuple[Tensor, ...]
    mechanism: Run
    baseline: Run
    parameters: tuple[Tensor, ...] = ()
    baseline_parameters: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return math.prod(self.size)

    def works(self, mode: Mode) -> tuple[Work, Work]:
        """What to time: one call of the mechanism, and one of its rival."""
        runs = (self.mechanism, self.parameters), (self.baseline, self.baseline_parameters)
        first, second = (work(run, self.inputs, own, mode) for run, own in runs)
        return first, second


def work(
    run: Run, inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...], mode: Mode
) -> Callable[[], tuple[Tensor, ...]]:
    """One call on the inputs: its output, and in mode "backward" the gradients of inputs and
    parameters under a fixed random upstream gradient.
    """
    if mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run(*inputs),)

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    wanted = [*leaves, *(p for p in parameters if p.requires_grad)]
    draw = torch.Generator().manual_seed(2)
    upstream = torch.randn(inputs[-1].shape, generator=draw).to(inputs[0].dtype)

    def backward() -> tuple[Tensor, ...]:
        for leaf in wanted:
            leaf.grad = None
        output = run(*leaves)
        output.backward(upstream)
        return output, *(torch.zeros_like(x) if x.grad is None else x.grad for x in wanted)

    return backward


def size_for(entry: Card, length: int) -> tuple[int, ...]:
    """Size of an input of about `length` tokens: a square grid, its sides even, for a mechanism
    made for grids, else the length.
    """
    if entry.example.grid is None and 1 in entry.grids:
        return (length,)
    side = max(2, 2 * round(math.sqrt(length) / 2))
    return (side,) * (2 if 2 in entry.grids else entry.grids[0])


def rivals(spec: Spec, size: tuple[int, ...], setting: Setting, *, truth: bool = False) -> Rivals:
    """A mechanism on random input; truth: in float64 and in the form that defines the others.

    Options that are not given keep their defaults; where these cannot serve the size (a layer made
    for a fixed length, say), the card's own options for that size are used.

    Raises:
        RegardError: no such mechanism or option, or one that cannot serve this size.
    """
    entry = card(spec.name)
    dtype = torch.float64 if truth else torch.float32
    inputs = _inputs(entry, math.prod(size), setting, dtype)
    call = Call(
        mask=Causal() if entry.causal and len(size) == 1 else None,
        grid=size if len(size) > 1 else None,
    )
    form = {entry.forms[0]: entry.forms[1][0]} if truth and entry.forms else {}
    run, parameters = _mechanism(entry, {**spec.options, **form}, setting, call, inputs)
    if truth:
        return Rivals(size, call.mask is not None, inputs, run, run, parameters, parameters)
    baseline, own = _baseline(entry, setting, call)
    return Rivals(size, call.mask is not None, inputs, run, baseline, parameters, own)


def _inputs(entry: Card, tokens: int, setting: Setting, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Standard normal numbers, the same for every dtype."""
    draw = torch.Generator().manual_seed(1)
    if entry.kind == "operator":
        shape = (3, setting.batch, setting.heads, tokens, setting.head_dim)
        return torch.randn(shape, generator=draw).to(dtype).unbind(0)
    return (torch.randn(setting.batch, tokens, setting.dim, generator=draw).to(dtype),)


def _mechanism(
    entry: Card, options: dict[str, Any], setting: Setting, call: Call, inputs: tuple[Tensor, ...]
) -> tuple[Run, tuple[Tensor, ...]]:
    """The mechanism with the first choice of options that serves the inputs."""
    size = call.grid or (inputs[0].shape[-2],)
    *first, last = option_choices(entry, options, size, setting)
    for chosen in first:
        try:
            run, parameters = _built(entry, chosen, setting, call, inputs)
            with torch.no_grad():
                run(*inputs)
            return run, parameters
        except (ArgumentError, UnsupportedError):
            continue
    return _built(entry, last, setting, call, inputs)


def option_choices(
    entry: Card, options: dict[str, Any], size: tuple[int, ...], setting: Setting
) -> list[dict[str, Any]]:
    """Options to try in turn: the defaults beside what is given, if nothing required is missing;
    then those the card has for inputs of this size, if it has any.
    """
    required = {name for name, p in entry.options.items() if p.default is p.empty}
    choices = [options] if required <= set(options) or entry.example.sized is None else []
    if entry.example.sized is not None:
        fitted = entry.example.sized(size).items()
        choices.append({**{name: _widened(value, setting) for name, value in fitted}, **options})
    return choices


def _widened(value: Any, setting: Setting) -> Any:
    """A tensor made for the width of the card's example, drawn anew for this one."""
    if not isinstance(value, Tensor):
        return value
    draw = torch.Generator().manual_seed(3)
    return torch.randn(*value.shape[:-1], setting.dim, generator=draw)


def _built(
    entry: Card, options: dict[str, Any], setting: Setting, call: Call, inputs: tuple[Tensor, ...]
) -> tuple[Run, tuple[Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: Any = create(entry.name, dim=setting.dim, heads=setting.heads, **options)
        chosen = layer if entry.kind == "layer" else layer.inner
        if not isinstance(chosen, nn.Module):
            return (lambda q, k, v: chosen(q, k, v, call).output), ()
        with torch.no_grad():
            for parameter in chosen.parameters():
                parameter += NOISE * torch.randn_like(parameter)
    module = chosen.to(inputs[0].dtype).eval()
    parameters = tuple(module.parameters())
    if entry.kind == "layer":
        return (lambda x: module(x, call)), parameters
    return (lambda q, k, v: module(q, k, v, call).output), parameters


def _baseline(entry: Card, setting: Setting, call: Call) -> tuple[Run, tuple[Tensor, ...]]:
    if entry.kind == "operator":
        causal = call.mask is not None
        return partial(F.scaled_dot_product_attention, is_causal=causal), ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = create("softmax", dim=setting.dim, heads=setting.heads).eval()
    return (lambda x: layer(x, call)), tuple(layer.parameters())
