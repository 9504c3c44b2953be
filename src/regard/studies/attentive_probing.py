r"""Attentive probing: tokens pretrained on masked images tell their label to a pool that attends,
less to their mean; and the simplest of such pools, efficient probing, is enough.

    accuracy of  W batchnorm(pool(x))  on frozen tokens x, by pool

A small vision transformer learns to fill in masked patches of handwritten digits (mean squared
error of the pixels, masked patches replaced by one learned token) and is then frozen. Its tokens
are read through the mean, as in linear probing, and through every pool of the study, each trained
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.core.weights import Scored
from regard.features import abmilp, aim_pool, cae_pool, coca_pool, efficient_probing, simpool
from regard.features.efficient_probing import EfficientProbing
from regard.features.pooling import MeanPool
from regard.lenses.attentive_probe import Probed, probe_features
from regard.studies.masked_digits import PLACES, Pretraining, frozen


@dataclass(frozen=True)
class AttentiveProbing:
    """dim, layers, heads: of the pretrained model; masked: share of patches it does not see; steps:
    of its training; queries: of efficient probing; epochs: of probing.
    """

    dim: int = 48
    layers: int = 2
    heads: int = 4
    masked: float = 0.5
    steps: int = 1000
    queries: int = 8
    epochs: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads, self.steps, self.queries, self.epochs) < 1:
            raise ArgumentError("sizes", "at least 1", self)
        if not 1 / PLACES <= self.masked < 1:
            raise ArgumentError("masked", f"a share from 1/{PLACES} to below 1", self.masked)

    def run(self, progress: Progress) -> Outcome:
        """Pretrain, freeze, and probe with every pool."""
        training = Pretraining(self.dim, self.layers, self.heads, self.masked, self.steps)
        model = training.run(self.seed, lambda done: progress(done * 0.7))
        train, test = frozen(model, "train"), frozen(model, "valid", "test")
        found: dict[str, Probed] = {}
        pools = self.pools()
        for name, build in pools.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                pool = build()
            found[name] = probe_features(train, test, pool, epochs=self.epochs, seed=self.seed)
            progress(0.7 + 0.3 * len(found) / len(pools))
        lines = {
            name: [(float(epoch), loss) for epoch, loss in enumerate(probed.losses, 1)]
            for name, probed in found.items()
        }
        return Outcome(
            figures(found),
            (Curve("Probing", "epoch", "loss in nats", lines),),
            (looks(found["efficient probing"].head.pool, test.tokens),),
        )

    def pools(self) -> dict[str, Callable[[], nn.Module]]:
        """Every pool by its short name."""
        dim, heads = self.dim, self.heads
        return {
            "mean": MeanPool,
            "efficient probing": lambda: EfficientProbing(dim, queries=self.queries),
            "AIM": lambda: aim_pool.AimPool(dim, heads=heads),
            "SimPool": lambda: simpool.SimPool(dim),
            "CAE": lambda: cae_pool.CaePool(dim, heads=heads),
            "CoCa": lambda: coca_pool.CocaPool(dim, heads=heads, head_dim=dim // heads),
            "AbMILP": lambda: abmilp.AbMilp(dim),
        }


def figures(found: Mapping[str, Probed]) -> tuple[Figure, ...]:
    """Accuracies, and what efficient probing costs beside the others."""
    right = {name: probed.accuracy for name, probed in found.items()}
    size = {name: sum(w.numel() for w in p.head.pool.parameters()) for name, p in found.items()}
    own, projecting = "efficient probing", ("AIM", "SimPool", "CAE", "CoCa")
    better = "attending beats the mean on tokens from masked images"
    return (
        Figure("accuracy, mean", right["mean"], "linear probing: above chance", low=0.1),
        *(
            Figure(f"accuracy, {name}", right[name], better, low=right["mean"])
            for name in right
            if name != "mean"
        ),
        Figure(
            "gain by efficient probing",
            right[own] - right["mean"],
            "MAE ViT-B on ImageNet: 67.8 % by linear probing, 75.5 % by efficient probing",
            low=0.03,
        ),
        Figure(
            "accuracy, efficient probing / best",
            right[own] / max(right.values()),
            "on a par with heavier pools",
            low=0.85,
        ),
        Figure(
            "parameters, efficient probing / next larger",
            size[own] / min(size[name] for name in projecting),
            "no W_q, W_k, W_o: fewer parameters",
            high=0.7,
        ),
    )


@torch.no_grad()
def looks(pool: nn.Module, tokens: Tensor) -> Map:
    """Where each query of efficient probing looks, on average over images."""
    if not isinstance(pool, EfficientProbing):
        raise ArgumentError("pool", "efficient probing", type(pool).__name__)
    x = tokens[:, None]
    places = torch.eye(tokens.shape[1]).expand(len(x), len(pool.queries), -1, -1)
    q = pool.queries[None, :, None].expand(len(x), -1, -1, -1)
    weights = attend(q, x, places, Call(), Scored(scale=pool.scale)).output[:, :, 0].mean(0)
    return Map("Where queries look", "query", "patch, row by row", weights.tolist())


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """Efficient probing with the authors' weights, one configuration after the other, with their
    queries and with others.
    """
    outputs: dict[str, Tensor] = {}
    for name in case["outputs"]:
        number = name.removeprefix("y").removeprefix("_cls")
        state = case["state_dict"].get(f"sd{number}", case["state_dict"])
        given = state["cls_token"].flip(1) if "cls" in name else None
        pool = efficient_probing.converted({}, state)
        outputs[name] = pool(case["inputs"][f"x{number}"], queries=given)
    return outputs


def replaying(
    converted: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module],
) -> Callable[[Mapping[str, Any]], Mapping[str, Tensor]]:
    """A replay of one pool with the authors' weights. (Theirs drop axes of length one, and their
    generalised mean keeps heads apart, so shapes are aligned.)
    """

    def run(case: Mapping[str, Any]) -> dict[str, Tensor]:
        y = converted(case["config"], case["state_dict"])(case["inputs"]["x"])
        return {"y": y.reshape(case["outputs"]["y"].shape)}

    return run


def replay_abmilp(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """AbMILP with the authors' weights; of "patch" content the first token is left out."""
    state, x = case["state_dict"], case["inputs"]["x"]
    x = x[:, 1:] if case["config"].get("content") == "patch" else x
    pool = abmilp.converted(case["config"], state)
    return {"y": pool(x, places=state.get("pos_embed"))}


SOURCE, COMMIT = "https://github.com/billpsomas/efficient-probing", "b8f4fb8"
OTHERS = {
    "aim_pool": aim_pool.converted,
    "simpool": simpool.converted,
    "simpool_gamma": simpool.converted,
    "simpool_nolinears": simpool.converted,
    "cae_pool": cae_pool.converted,
    "coca_pool": coca_pool.converted,
}
CARD = StudyCard(
    name="attentive_probing",
    build=AttentiveProbing,
    papers=(
        Paper(
            "2506.10178",
            "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
            2025,
        ),
    ),
    claim=Claim(
        "a pool that attends reads more from a masked image model than the mean of its tokens, and "
        "queries with a shared W_v are enough",
        "regard study attentive_probing",
    ),
    seconds=25,
    small={"dim": 16, "layers": 1, "heads": 2, "steps": 3, "queries": 2, "epochs": 1},
    goldens=(
        Golden("63_efficient_probing.pt", replay, SOURCE, COMMIT),
        Golden("63_abmilp.pt", replay_abmilp, SOURCE, COMMIT),
        *(
            Golden(f"63_{name}.pt", replaying(converted), SOURCE, COMMIT)
            for name, converted in OTHERS.items()
        ),
    ),
)
