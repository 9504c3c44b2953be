"""Parts of a model beside its attention, found by the names libraries give them: what mixes the
heads back into the stream, the feed-forward part of a block, what reads the stream out.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from regard.core.errors import UnsupportedError
from regard.core.moment import Site

PROJECTIONS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "proj",
    "to_out",
    "out_lin",
    "dense",
    "Wo",
    "wo",
    "o",
)
FEED_FORWARD = re.compile(r"^(mlp|feed_forward|ffn|block_sparse_moe)$")
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")


class Parts:
    """How every host finds them."""

    def projection(self, model: Any, site: Site) -> nn.Module:
        """The module that maps a site's concatenated heads (B,N,H*E) to the stream: a child of the
        attention module, or `output.dense` beside it.

        Raises:
            UnsupportedError: none is found.
        """
        module = model.get_submodule(site.name)
        found = next((m for n in PROJECTIONS if (m := getattr(module, n, None)) is not None), None)
        if isinstance(found, nn.ModuleList):
            found = found[0]
        if found is None:
            beside = getattr(model.get_submodule(_above(site.name)), "output", None)
            found = getattr(beside, "dense", None)
        if not isinstance(found, nn.Module):
            raise UnsupportedError("output projection", f"none is found in {site.name}")
        return found

    def feed_forward(self, model: Any, site: Site) -> nn.Module:
        """The feed-forward module of the block in which a site stands.

        Raises:
            UnsupportedError: there is none of a known name.
        """
        block = _above(site.name)
        for child, module in model.get_submodule(block).named_children():
            if FEED_FORWARD.match(child):
                return module
        raise UnsupportedError("plan", f"{block} has no feed-forward module beside its attention")

    def readout(self, model: Any) -> tuple[nn.Module, nn.Module]:
        """The final norm and the unembedding, which turn the stream (B,N,C) into logits (B,N,V).

        Raises:
            UnsupportedError: the model has no unembedding, or no final norm of a known name.
        """
        give = getattr(model, "get_output_embeddings", None)
        unembedding = give() if callable(give) else None
        if not isinstance(unembedding, nn.Module):
            raise UnsupportedError("readout", f"{type(model).__name__} has no unembedding")
        base = getattr(model, "base_model", model)
        first = (getattr(base, name, None) for name in ("decoder", "language_model"))
        for holder in (*first, base, *base.children()):
            for name in NORMS:
                norm = getattr(holder, name, None)
                if isinstance(norm, nn.Module):
                    return norm, unembedding
        raise UnsupportedError(
            "readout", f"{type(model).__name__} has no final norm of a known name"
        )


def _above(name: str) -> str:
    """The path of the module in which one stands."""
    return name.rpartition(".")[0]
