"""The linear maps of a model's blocks: what reads the residual stream, what writes to it, and what
stands between.

Blocks are known by the names that libraries give their parts: q_proj, k_proj, v_proj and the
projection of the heads; gate_proj and up_proj, fc1 or c_fc, then down_proj, fc2 or c_proj.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.core.hosting import Host, host_of
from regard.core.moment import Site
from regard.core.passing import block_of

HEADS = ("q_proj", "k_proj", "v_proj")
UNITS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("c_fc",), "c_proj"))


@dataclass(frozen=True, eq=False)
class BlockLinears:
    """One block. path, block: where it stands. heads: the maps to queries, keys and values, (); if
    they are not apart. joined: the projection of the heads. units: the maps to the units of the
    feed-forward part; back: from them.
    """

    site: Site
    path: str
    block: nn.Module
    heads: tuple[nn.Module, ...]
    joined: nn.Module
    units: tuple[nn.Module, ...]
    back: nn.Module

    @property
    def width(self) -> int:
        """Units of the feed-forward part."""
        return sides(self.back)[0]

    @property
    def all(self) -> tuple[nn.Module, ...]:
        """Every one, in the order of a forward."""
        return (*self.heads, self.joined, *self.units, self.back)


def blocks_of(model: Any) -> tuple[BlockLinears, ...]:
    """The blocks of a model with one tower of self-attention.

    Raises:
        UnsupportedError: several towers, cross-attention, or parts of unknown names.
    """
    host, who = host_of(model), type(model).__name__
    sites = host.sites(model)
    if len({site.tower for site in sites}) != 1 or any(site.cross for site in sites):
        raise UnsupportedError("blocks", f"{who} has not one tower of self-attention")
    return tuple(_block(model, host, site) for site in sites)


def _block(model: Any, host: Host, site: Site) -> BlockLinears:
    attention = model.get_submodule(site.name)
    heads = tuple(m for name in HEADS if (m := getattr(attention, name, None)) is not None)
    path = block_of(site)
    block = model.get_submodule(path)
    units, back = _feed_forward(block, path)
    return BlockLinears(
        site,
        path,
        block,
        heads if len(heads) == len(HEADS) else (),
        host.projection(model, site),
        units,
        back,
    )


def _feed_forward(block: nn.Module, path: str) -> tuple[tuple[nn.Module, ...], nn.Module]:
    for holder in (block, *block.children()):
        for first, last in UNITS:
            found = [getattr(holder, name, None) for name in (*first, last)]
            if all(isinstance(m, nn.Module) for m in found):
                *units, back = (m for m in found if m is not None)
                return tuple(units), back
    raise UnsupportedError("blocks", f"no feed-forward part of a known kind in {path}")


def turned(module: nn.Module) -> bool:
    """Whether a linear module's weight is (in, out), as GPT-2's are, and not (out, in)."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """The weight (out, in) of a linear module, a view of it."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedError("blocks", f"{type(module).__name__} is no linear map")
    return weight.mT if turned(module) else weight


def sides(module: nn.Module) -> tuple[int, int]:
    """How many numbers a linear module takes and gives."""
    given, taken = weight_of(module).shape
    return taken, given


def paths(model: nn.Module) -> dict[nn.Module, str]:
    """Where each module of a model stands."""
    return {module: name for name, module in model.named_modules()}


def norm_readers(one: BlockLinears) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """The norms of a block that normalises what each part reads, and the maps that read them.

    Raises:
        UnsupportedError: norms of other names, or more of them on the stream.
    """
    norms = {
        name: m for name, m in one.block.named_children() if "norm" in type(m).__name__.lower()
    }
    if set(norms) != {"input_layernorm", "post_attention_layernorm"} or not one.heads:
        raise UnsupportedError(
            "blocks", f"{one.path} does not normalise what its two parts read and nothing else"
        )
    yield norms["input_layernorm"], one.heads
    yield norms["post_attention_layernorm"], one.units


@torch.no_grad()
def root_mean_square(norm: nn.Module, width: int) -> bool:
    """Whether a norm of some width is its weight times x over the root mean square of x."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (width,):
        return False
    if getattr(norm, "bias", None) is not None:
        return False
    x = torch.linspace(-1.0, 2.0, width, dtype=weight.dtype, device=weight.device) * 100
    wanted = weight * x / x.square().mean().sqrt()
    return torch.allclose(norm(x), wanted, rtol=0.02, atol=0.02 * float(weight.abs().max()))
