r"""Slimming: a finished model with fewer heads, feed-forward units, layers or channels, as a
smaller model of transformers that saves, loads and runs without this library.

    zero what goes in the large model = leave it out of the small one, exactly

A configuration names one number of heads and of units for all layers, so every layer must keep as
many; of grouped keys, every group that stays must keep as many query heads. Channels of the
residual stream can go where a norm divides by the root mean square over C of them: with C' left,
its weight grows by sqrt(C / C') and its epsilon by C / C', and the result is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.hosting import host_of
from regard.core.linears import BlockLinears, blocks_of, norm_readers, paths
from regard.searchers.configuring import UNITS, configured
from regard.searchers.cuts import Cuts

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What stays of a model, as rising numbers from 0: heads and units for each of its layers
    (those of a layer that goes are not looked at), layers and channels (None: all).
    """

    heads: tuple[Indices, ...]
    units: tuple[Indices, ...]
    layers: Indices | None = None
    channels: Indices | None = None


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller model, what was kept of the large one, and the parameters of both."""

    model: Any
    kept: Kept
    parameters: int
    parameters_before: int

    @property
    def ratio(self) -> float:
        """The part of the parameters that went."""
        return 1 - self.parameters / self.parameters_before


def everything(model: Any) -> Kept:
    """All of a model."""
    blocks = blocks_of(model)
    return Kept(
        tuple(tuple(range(one.site.heads)) for one in blocks),
        tuple(tuple(range(one.width)) for one in blocks),
    )


def pruned(model: Any, kept: Kept, *, into: type | None = None) -> Pruned:
    """`slim` with the account of it."""
    small = slim(model, kept, into=into)
    return Pruned(small, kept, parameters_of(small), parameters_of(model))


def parameters_of(model: nn.Module) -> int:
    """Number of a model's parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def slim(model: Any, kept: Kept, *, into: type | None = None) -> Any:
    """A new, smaller model with copies of what is kept; `model` stays as it is. into: another class
    of transformers whose parameters have the same names and meaning, for where the model's own
    refuses the numbers (a Llama wants heads that divide its width, which a Mistral does not).

    Raises:
        ArgumentError: numbers out of range, repeated or not rising.
        UnsupportedError: parts of unknown kinds; numbers that differ between layers or groups, or
            that the configuration refuses.
    """
    blocks = blocks_of(model)
    layers = _checked(kept, blocks, model)
    staying = [blocks[layer] for layer in layers]
    cuts = Cuts(paths(model))
    changes: dict[str, Any] = {}
    if len(staying) < len(blocks):
        changes["num_hidden_layers"] = len(staying)
    changes |= _heads(cuts, kept, staying) | _units(cuts, kept, staying)
    if kept.channels is not None:
        changes |= _channels(cuts, kept.channels, staying, model)
    small = (into or type(model))(configured(model, changes, layers, into))
    _fill(small, model, cuts, {blocks[i].path: b.path for i, b in enumerate(staying)})
    return small


def _checked(kept: Kept, blocks: Sequence[BlockLinears], model: Any) -> Indices:
    """The numbers of the layers that stay, once all numbers are in order."""
    depth = len(blocks)
    for name in ("heads", "units"):
        if len(getattr(kept, name)) != depth:
            raise ArgumentError(name, f"one entry for each of {depth} layers", getattr(kept, name))
    layers = tuple(range(depth)) if kept.layers is None else kept.layers
    _rising("layers", layers, depth)
    for layer in layers:
        _rising(f"heads[{layer}]", kept.heads[layer], blocks[layer].site.heads)
        _rising(f"units[{layer}]", kept.units[layer], blocks[layer].width)
    if kept.channels is not None:
        _rising("channels", kept.channels, model.config.hidden_size)
    return layers


def _rising(name: str, numbers: Indices, size: int) -> None:
    wanted = f"rising numbers below {size}, at least one"
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ArgumentError(name, wanted, numbers)
    if numbers[0] < 0 or numbers[-1] >= size:
        raise ArgumentError(name, wanted, numbers)


def _heads(cuts: Cuts, kept: Kept, staying: Sequence[BlockLinears]) -> dict[str, Any]:
    """Cut heads; the fields of the configuration that change."""
    if all(len(kept.heads[one.site.layer]) == one.site.heads for one in staying):
        return {}
    sizes = set()
    for one in staying:
        site, heads = one.site, kept.heads[one.site.layer]
        if not one.heads:
            raise UnsupportedError("slimming", f"{site.name} projects its heads together")
        members = [head // site.group for head in heads]
        groups = sorted(set(members))
        counts = {members.count(group) for group in groups}
        if len(counts) > 1:
            raise UnsupportedError(
                "slimming", f"groups of layer {site.layer} would keep {sorted(counts)} heads each"
            )
        sizes.add((len(heads), len(groups)))
        q, *others = one.heads
        cuts.rows(q, heads, site.heads)
        for other in others:
            cuts.rows(other, groups, site.kv_heads)
        cuts.columns(one.joined, heads, site.heads)
    heads, groups = _one(sizes, "heads and groups")
    return {"num_attention_heads": heads, "num_key_value_heads": groups}


def _units(cuts: Cuts, kept: Kept, staying: Sequence[BlockLinears]) -> dict[str, Any]:
    """Cut units of the feed-forward parts; the field that changes."""
    if all(len(kept.units[one.site.layer]) == one.width for one in staying):
        return {}
    for one in staying:
        units = kept.units[one.site.layer]
        for module in one.units:
            cuts.rows(module, units, one.width)
        cuts.columns(one.back, units, one.width)
    return {UNITS: _one({len(kept.units[one.site.layer]) for one in staying}, "units")}


def _one(sizes: set[Any], what: str) -> Any:
    if len(sizes) > 1:
        raise UnsupportedError(
            "slimming", f"layers would keep {sorted(sizes)} {what}; a configuration names one"
        )
    return next(iter(sizes))


def _channels(
    cuts: Cuts, channels: Indices, staying: Sequence[BlockLinears], model: Any
) -> dict[str, Any]:
    """Cut channels of the residual stream; the fields that change."""
    width = model.config.hidden_size
    norm, readout = host_of(model).readout(model)
    norms = [norm]
    for one in staying:
        for own, readers in norm_readers(one):
            norms.append(own)
            for reader in readers:
                cuts.columns(reader, channels, width)
        cuts.rows(one.joined, channels, width)
        cuts.rows(one.back, channels, width)
    for own in norms:
        cuts.norm(own, channels, width)
    cuts.columns(model.get_input_embeddings(), channels, width)
    cuts.columns(readout, channels, width)
    epsilon = model.config.rms_norm_eps * width / len(channels)
    return {"hidden_size": len(channels), "rms_norm_eps": epsilon}


def _fill(small: Any, model: Any, cuts: Cuts, places: Mapping[str, str]) -> None:
    """Give the small model its weights. places: path of each of its blocks -> path of that block in
    the large model.
    """
    given = model.state_dict()
    state = {}
    for name in small.state_dict():
        head = next((path for path in places if name.startswith(path + ".")), None)
        before = name if head is None else places[head] + name.removeprefix(head)
        if before not in given:
            raise UnsupportedError("slimming", f"{type(small).__name__} has {name} besides")
        state[name] = cuts.cut(before, given[before])
    wanted = {name: tuple(x.shape) for name, x in small.state_dict().items()}
    odd = [name for name, x in state.items() if tuple(x.shape) != wanted[name]]
    if odd:
        raise UnsupportedError(
            "slimming",
            f"the configuration of {type(small).__name__} gives {odd[0]} the shape "
            f"{wanted[odd[0]]}, not {tuple(state[odd[0]].shape)}",
        )
    small.load_state_dict(state, assign=True)
    small.tie_weights()
    small.to(next(model.parameters()).device).train(model.training)
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
