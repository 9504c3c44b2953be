r"""Bandit over clusters: which cluster to draw samples from next, and clusters of samples.

    next = argmax_i  mean_i + alpha sqrt(2 ln(sum_j T_j) / T_i)        T_i: draws from cluster i

A cluster that was never drawn from comes first; equal ones: the earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.importance.clusters import k_means_step, nearest, unit


class ClusterBandit:
    """Upper confidence bounds of the mean score of clusters. alpha: weight of what is not known;
    decay: what earlier scores count at each new draw, 1 for a plain mean.
    """

    def __init__(self, clusters: int, *, alpha: float = 1.0, decay: float = 1.0) -> None:
        if clusters < 1 or alpha < 0 or not 0 < decay <= 1:
            got = (clusters, alpha, decay)
            raise ArgumentError("clusters, alpha, decay", "at least 1, 0 or more, in (0, 1]", got)
        self.alpha, self.decay = alpha, decay
        self.draws = [0] * clusters
        self.weights = [0.0] * clusters
        self.totals = [0.0] * clusters

    def bound(self, cluster: int) -> float:
        """The optimistic score of a cluster."""
        if not self.draws[cluster]:
            return math.inf
        mean = self.totals[cluster] / self.weights[cluster]
        spread = 2 * math.log(sum(self.draws)) / self.draws[cluster]
        return mean + self.alpha * math.sqrt(spread)

    def next(self, open_: Sequence[int]) -> int:
        """The cluster to draw from, of those that are not used up.

        Raises:
            ArgumentError: all are.
        """
        if not open_:
            raise ArgumentError("clusters", "one that is not used up", "none")
        return max(sorted(open_), key=self.bound)

    def told(self, cluster: int, scores: Sequence[float]) -> None:
        """Take in the scores of one draw from a cluster."""
        if not scores:
            return
        self.draws[cluster] += 1
        self.weights[cluster] = self.decay * self.weights[cluster] + 1
        mean = sum(scores) / len(scores)
        self.totals[cluster] = self.decay * self.totals[cluster] + mean


def clustered(embeddings: Tensor, clusters: int, *, seed: int = 0, rounds: int = 20) -> Tensor:
    """Clusters (n,) of embeddings (n,D) by their direction: k-means on the sphere, started from
    samples drawn by the seed.

    Raises:
        ArgumentError: more clusters than samples, or no matrix.
    """
    if embeddings.ndim != 2 or not 1 <= clusters <= len(embeddings):
        got = (clusters, tuple(embeddings.shape))
        raise ArgumentError("clusters, embeddings", "1 to n clusters of (n,D)", got)
    x = unit(embeddings.double())[None, None]
    source = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(embeddings), generator=source)[:clusters]
    centroids = x[0, :, first.to(x.device)]
    for _ in range(rounds):
        centroids = k_means_step(x, centroids)
    return nearest(x, centroids)[0, 0]
