r"""Diverse influence: training samples that lower the loss on a reference set, from many clusters.

    J(z) = sum_W < (A_W (x) S_W + lam)^{-1} G_ref, G_z >        I(z) = J(z) / mean over ref of J
    draw from the cluster with the largest upper confidence bound of mean I; keep those with I > tau

W are the linear maps of the model's self-attention, or of its layers (`maps`); their factors A and
S are those of the reference set (kronecker_influence.py). Only samples that are drawn cost a
backward pass. lam is `damping` times the mean eigenvalue of A (x) S. Drawing stops at `count`
samples, or when every cluster is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.scene import Scene
from regard.core.searcher import SearcherCard
from regard.searchers.bandit import ClusterBandit
from regard.searchers.kronecker_influence import KroneckerInfluence, Maps
from regard.searchers.series import Told


@dataclass(frozen=True, eq=False)
class Diverse:
    """What was found: numbers of the samples kept, in the order in which they were drawn; the
    influence of every sample that was drawn; and draws from each cluster.
    """

    kept: tuple[int, ...]
    influence: dict[int, float]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class DiverseInfluence:
    """count: samples to keep. batch: samples per draw. threshold: tau. alpha, decay: of the bandit.
    damping, maps: see above.
    """

    count: int
    batch: int = 4
    threshold: float = 0.0
    alpha: float = 1.0
    decay: float = 1.0
    damping: float = 0.1
    maps: Maps = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1 or not self.damping > 0:
            raise ArgumentError("count, batch, damping", "at least 1, 1, above 0", self)

    def run(
        self,
        scene: Scene,
        samples: Sequence[Passage],
        clusters: Sequence[int],
        progress: Told | None = None,
    ) -> Diverse:
        """Choose among samples, of one sequence each, in clusters numbered from 0, for the scene's
        passages as the reference.

        Raises:
            ArgumentError: no sample, or clusters of other samples.
            UnsupportedError: self-attention without linear maps.
        """
        if not samples or len(clusters) != len(samples) or min(clusters) < 0:
            raise ArgumentError("clusters", f"a number for each of {len(samples)}", len(clusters))
        influence = KroneckerInfluence(scene, self.damping, self.maps)
        left = self._shuffled(clusters)
        bandit = ClusterBandit(len(left), alpha=self.alpha, decay=self.decay)
        kept: list[int] = []
        found: dict[int, float] = {}
        while len(kept) < self.count and any(left):
            cluster = bandit.next([i for i, numbers in enumerate(left) if numbers])
            drawn, left[cluster] = left[cluster][: self.batch], left[cluster][self.batch :]
            found.update({i: influence.of(samples[i]) for i in drawn})
            bandit.told(cluster, [found[i] for i in drawn])
            kept += [i for i in drawn if found[i] > self.threshold][: self.count - len(kept)]
            if progress is not None:
                progress(len(found) / len(samples), f"cluster {cluster}: {len(kept)} kept")
        if progress is not None:
            progress(1.0, "")
        return Diverse(tuple(kept), found, tuple(bandit.draws))

    def _shuffled(self, clusters: Sequence[int]) -> list[list[int]]:
        """Numbers of the samples of each cluster, in the order in which they are drawn."""
        source = torch.Generator().manual_seed(self.seed)
        left: list[list[int]] = [[] for _ in range(max(clusters) + 1)]
        for i in torch.randperm(len(clusters), generator=source).tolist():
            left[clusters[i]].append(i)
        return left


CARD = SearcherCard(
    name="diverse_influence",
    build=DiverseInfluence,
    finds="samples",
    papers=(
        Paper(
            "2409.16986",
            "Harnessing Diversity for Important Data Selection in Pretraining Large Language "
            "Models",
            2024,
        ),
    ),
    claim=Claim(
        "few samples need a backward pass to find texts that help more than chance, and more kinds "
        "of text than the highest influence alone",
        "regard study diverse_samples",
    ),
)
