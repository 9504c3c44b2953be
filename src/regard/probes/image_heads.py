r"""Image heads: how much text looks at an image, and whether at sinks in it or beside them.

    m_i = sum_{j in I} A_ij        r_i = sum_{j in I, no sink} A_ij / m_i
    image-centric: m_i >= least and r_i >= rho

I are the image's keys, i the queries after the last of them. A sink is a token whose stream, as it
enters the layer, is massive in a few dimensions (importance/image_sinks.py): text looks at sinks
though they show nothing. Where the image holds none, r is 1.

Differs from the paper: it lists the dimensions of four models; unless `dims` says them, they are
those of a sequence's first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.observe import Seen
from regard.core.probe import Finding, Look, ProbeCard, add_rows, zeros
from regard.importance.image_sinks import given_back, looks_beside_sinks, sink_tokens

WHO = "image_heads"
IMAGE = "image"


@dataclass(frozen=True)
class ImageHeads:
    """tau: how massive a sink is, over the root mean square. dims: of the stream in which it is
    (None: as in the first token). rho: share of the weight beside sinks, least: weight on the
    image, from which a query is image-centric.
    """

    tau: float = 20.0
    dims: tuple[int, ...] | None = None
    rho: float = 0.5
    least: float = 0.2

    def __post_init__(self) -> None:
        if self.tau <= 0 or not 0 <= self.rho <= 1 or not 0 <= self.least <= 1:
            raise ArgumentError("ImageHeads", "tau > 0, rho and least from 0 to 1", self)

    def begin(self, look: Look) -> _Looks:
        look.same_sequence(WHO)
        image = look.role(IMAGE, WHO) & look.real_keys
        stream = look.stream
        if stream is None or stream.shape[:2] != look.keys.shape:
            raise UnsupportedError(WHO, "the stream that enters the layer is not at hand")
        dims = self.dims
        if dims is not None and not all(0 <= d < stream.shape[-1] for d in dims):
            raise ArgumentError("dims", f"of a stream of width {stream.shape[-1]}", dims)
        first = look.real_keys.int().argmax(-1)
        sinks = sink_tokens(stream.detach(), first, self.tau, dims) & look.real_keys
        return _Looks(self, look, image, sinks)


class _Looks:
    def __init__(self, probe: ImageHeads, look: Look, image: Tensor, sinks: Tensor) -> None:
        self.probe, self.look, self.image, self.sinks = probe, look, image, sinks
        self.features = torch.stack([image, image & ~sinks, sinks], -1)
        self.sums = zeros(look, look.queries.shape[1], 3)
        last = look.keys.masked_fill(~image, -1).amax(-1, keepdim=True)
        self.after = look.real_queries & (look.queries > last) & (last >= 0)

    def add(self, seen: Seen) -> None:
        features = self.features[seen.batch][:, seen.keys][:, None].to(seen.weights)
        add_rows(self.sums, seen, seen.weights @ features)

    def found(self) -> Finding:
        probe = self.probe
        mass, clear, sink = self.sums.unbind(-1)
        looking = (mass >= probe.least) & (mass > 0)
        share = clear / mass.masked_fill(~looking, 1.0)
        centric = looks_beside_sinks(mass, clear, probe.rho, probe.least) & looking
        metrics = {
            "image_mass": self._mean(mass),
            "image_clear": self._mean(share, looking),
            "image_centric": self._mean(centric.double()),
            "image_sink_mass": self._mean(sink),
        }
        counts = {"image_sinks": self.image & self.sinks, "text_sinks": ~self.image & self.sinks}
        return Finding(metrics, layers={name: x.sum(-1).double() for name, x in counts.items()})

    def _mean(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Mean of (B,H,N) over the queries after the image, (B,H); NaN where there is none."""
        kept = self.after[:, None] if where is None else self.after[:, None] & where
        return values.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1)


def replay(case: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' sinks, the rows they choose in decoding, and their weights after the edit."""
    config, found = case["config"], {}
    start = config["image_start"]
    end = start + config["image_len"]
    for name, layer in case["inputs"].items():
        hidden = layer["hidden_in"]
        batch, length = hidden.shape[:2]
        place = torch.arange(length + 1)
        image = ((place >= start) & (place < end)).expand(batch, -1)
        first = torch.zeros(batch, dtype=torch.long)
        sinks = sink_tokens(hidden, first, config["tau"], config["sink_dims"])
        mine: dict[str, Any] = {"sink_tokens": sinks[0].nonzero()[:, 0]}
        for phase in ("prefill", "decode"):
            weights = layer[f"attn_{phase}"]
            there = torch.cat([sinks, sinks.new_zeros(batch, weights.shape[-1] - length)], 1)
            rows = _chosen(config, weights, image[:, : weights.shape[-1]], there)
            if phase == "prefill":
                rows = rows & (place[:length] >= end)
            else:
                mine["decode_selected_bhq"] = rows.nonzero()
            own = image[:, : weights.shape[-1]]
            mine[f"attn_{phase}"] = given_back(weights, own, there, rows, config["p"])
        found[name] = mine
    return found


def _chosen(config: Mapping[str, Any], weights: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
    """The rows (B,H,N) that the published code chooses, whose rho is the share on sinks."""
    mass, clear = ((weights * x[:, None, None]).sum(-1) for x in (image, image & ~sinks))
    slack = 1e-6 * config["image_len"]
    rho, least = 1 - config["rho"], config["min_image_mass"]
    there = (image & sinks).any(-1)[:, None, None]
    return looks_beside_sinks(mass, clear, rho, least, slack) & there


CARD = ProbeCard(
    name="image_heads",
    build=ImageHeads,
    metrics={
        "image_mass": "weight on the image, of queries after it, 0 to 1",
        "image_clear": "share of that weight beside sinks, where it is enough, 0 to 1",
        "image_centric": "share of queries with enough weight on the image, and beside its sinks",
        "image_sink_mass": "weight on sinks of image and text, of queries after the image",
    },
    layers={
        "image_sinks": "tokens of the image that are sinks",
        "text_sinks": "other tokens that are",
    },
    papers=(
        Paper(
            "2503.03321",
            "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
            2025,
        ),
    ),
    claim=Claim(
        "few heads look at an image, and some of them at sinks in it",
        "regard atlas path/to/llava --probes image_heads",
    ),
    goldens=(Golden("14_var.pt", replay, "https://github.com/seilk/VisAttnSink", "98e62d6"),),
)
