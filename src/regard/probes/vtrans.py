r"""VTrans's gates: how much noise the model bears on a head's output before it predicts worse.

    o_h <- z_h o_h        z_h = mu_h + eps sigma_h, eps ~ N(0,1) drawn for each sequence
    minimise  L + beta sum_h 1/2 log(1 + mu_h^2 / sigma_h^2)        R_h = log(sigma_h^2 / mu_h^2)

The weights stay as they are; mu and sigma alone are learned, on all passages together. A head with
more noise than signal, R > 0, is one to prune. The authors draw the first mu and sigma at random
around the values that are taken here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.moment import Moment, Site
from regard.core.passage import Passage
from regard.core.predictions import Predictions
from regard.core.probe import Finding, ProbeCard
from regard.core.scene import Scene
from regard.core.treatment import Treatment

SMALL = 1e-8
START = (1.0, -9.0)
"""mu and log sigma^2 before the first step."""


@dataclass(frozen=True)
class Vtrans:
    """beta: weight of a head's information. steps: of Adam, each on all passages. rate: its step
    size. seed: of the noise.
    """

    beta: float = 2.56e-4
    steps: int = 60
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.beta, self.rate) <= 0 or self.steps < 1:
            raise ArgumentError("beta, rate, steps", "numbers above 0", self)

    def run(self, scene: Scene) -> Iterator[tuple[None, Site, Finding]]:
        total = sum(_sequences(passage) for passage in scene.passages)
        if not total:
            raise UnsupportedError("vtrans", "there are no next tokens or labels to predict")
        gates = {site.name: Gate.of(site, scene) for site in scene.sites}
        parameters = [x for gate in gates.values() for x in (gate.mu, gate.log_noise)]
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        random = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                for passage in scene.passages:
                    with scene.treated(_Gated(gates, _noise(gates, passage, random))):
                        found = Predictions.of(scene.model(**passage.inputs), passage).losses()
                    (found.nansum() / total).backward(inputs=parameters)
                information = torch.stack([gate.information() for gate in gates.values()]).sum()
                (self.beta * information).backward()
                optimizer.step()
        for site in scene.sites:
            yield None, site, Finding({"noise_to_signal": gates[site.name].ratio()[None]})


@dataclass(frozen=True, eq=False)
class Gate:
    """Mean (H,) and logarithm of the variance (H,) of the gates of a module's heads."""

    mu: Tensor
    log_noise: Tensor

    @classmethod
    def of(cls, site: Site, scene: Scene) -> Gate:
        """The gates of a site before the first step."""
        like = next(iter(scene.model.parameters()))
        wide = torch.promote_types(like.dtype, torch.float32)
        mu, log_noise = (like.new_full((site.heads,), x, dtype=wide) for x in START)
        return cls(mu.requires_grad_(), log_noise.requires_grad_())

    def information(self) -> Tensor:
        """Sum over heads of 1/2 log(1 + mu^2 / sigma^2), in nats."""
        return 0.5 * torch.log1p(self.mu**2 / (self.log_noise.exp() + SMALL)).sum()

    def noise_to_signal(self) -> Tensor:
        """log(sigma^2 / mu^2) of every head, with gradients."""
        return self.log_noise - (self.mu**2 + SMALL).log()

    def ratio(self) -> Tensor:
        """log(sigma^2 / mu^2) of every head, as a finding."""
        return self.noise_to_signal().detach().double()


@dataclass(frozen=True, eq=False)
class _Gated(Treatment):
    """Multiplies each head's output by its noisy gate."""

    gates: Mapping[str, Gate]
    noise: Mapping[str, Tensor] = field(default_factory=dict)

    def output(self, output: Tensor, at: Moment) -> Tensor:
        gate, noise = self.gates[at.site.name], self.noise[at.site.name]
        factor = gate.mu + noise * (gate.log_noise / 2).exp()
        return output * factor[:, list(at.heads), None, None].to(output.dtype)


def _noise(
    gates: Mapping[str, Gate], passage: Passage, random: torch.Generator
) -> dict[str, Tensor]:
    """Standard noise (B,H) by module, the same for a sequence however sequences are batched."""
    sizes = [len(gate.mu) for gate in gates.values()]
    rows = [torch.randn(sum(sizes), generator=random) for _ in range(_sequences(passage))]
    parts = torch.stack(rows).split(sizes, dim=-1)
    return {name: x.to(gates[name].mu) for name, x in zip(gates, parts, strict=True)}


def _sequences(passage: Passage) -> int:
    """How many sequences a passage holds."""
    given = passage.tokens if passage.labels is None else passage.labels
    return 0 if given is None else len(given)


CARD = ProbeCard(
    name="vtrans",
    build=Vtrans,
    metrics={
        "noise_to_signal": "log of the noise over the signal a learned gate leaves; above 0: prune",
    },
    papers=(
        Paper(
            "2406.05276",
            "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck "
            "based Pruning",
            2024,
        ),
    ),
    claim=Claim("heads that bear noise can be pruned", "regard atlas"),
)
