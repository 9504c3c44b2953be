r"""Linear regression in context: the heads of one softmax attention layer become a few debiased
gradient steps in disguise.

    examples (x_i, y_i), i = 1..L        y = b.x + noise        x ~ N(0, I_d)  b ~ N(0, I_d / d)

After training each head's KQ is w_h diag(I_d, 0) and its OV passes on the label alone, mu_h times:

    answer(x_q) = sum_h mu_h sum_i softmax_i(w_h x_i.x_q) y_i

Heads of both signs, of one size |w| and with sum_h mu_h = 0 are best; for small w they make 1/L
sum_i y_i (x_i - mean x).x_q times sum_h mu_h w_h: one step of gradient descent, debiased.

Differs from the paper: fewer and larger steps of Adam, their rate falling to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.study import Curve, Figure, Map, Outcome, Progress, StudyCard
from regard.layers.attention import Attention
from regard.studies.in_context import answers, circuits, fit, reader
from regard.studies.linear_estimators import best_mu, estimate, gradient_step, ridge, risk

TESTS = 20_000
"""Prompts to judge by."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Examples x (B,L,d) with labels y (B,L), and a question (B,d) with its label (B,)."""

    x: Tensor
    y: Tensor
    asked: Tensor
    label: Tensor

    @staticmethod
    def drawn(count: int, length: int, dim: int, noise: float, draw: torch.Generator) -> Prompts:
        """Prompts of tasks of their own; noise: its variance."""
        x = torch.randn(count, length + 1, dim, generator=draw)
        slope = torch.randn(count, dim, 1, generator=draw) * dim**-0.5
        y = (x @ slope)[..., 0] + noise**0.5 * torch.randn(count, length + 1, generator=draw)
        return Prompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


@dataclass(frozen=True)
class IclRegression:
    """Train the layer, then read its heads and hold it against the debiased step.

    Args:
        dim, length, noise: d, L and the variance of the noise. heads: H. batch, steps, rate: of
            Adam. seed: of weights and prompts.
    """

    dim: int = 5
    length: int = 40
    noise: float = 0.1
    heads: int = 4
    batch: int = 128
    steps: int = 6000
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.dim, self.length, self.heads, self.batch, self.steps) < 1:
            raise ArgumentError("sizes", "at least 1", self)
        if self.noise < 0:
            raise ArgumentError("noise", "a variance", self.noise)

    def run(self, progress: Progress) -> Outcome:
        draw = torch.Generator().manual_seed(self.seed)
        layer = reader(self.dim, self.heads, self.seed)

        def loss() -> Tensor:
            prompts = Prompts.drawn(self.batch, self.length, self.dim, self.noise, draw)
            return (said(layer, prompts) - prompts.label).square().mean()

        losses = fit(layer, loss, self.steps, self.rate, lambda done: progress(0.95 * done))
        with torch.no_grad():
            kq, ov = circuits(layer)
            kq = kq / (self.dim + 1) ** 0.5
            outcome = Outcome(
                (*shape(kq, ov[..., -1]), *self._quality(layer, kq, ov[..., -1], draw)),
                (self._curve(losses),),
                tuple(
                    Map(f"KQ of head {h}", "question's entry", "example's entry", kq[h].tolist())
                    for h in range(self.heads)
                ),
            )
        progress(1.0)
        return outcome

    def _quality(
        self, layer: Attention, kq: Tensor, ov: Tensor, draw: torch.Generator
    ) -> tuple[Figure, ...]:
        """Errors on new prompts, of this length and of twice as many examples."""
        near, far = (
            Prompts.drawn(TESTS, length, self.dim, self.noise, draw)
            for length in (self.length, 2 * self.length)
        )
        rate = float(diagonal(kq) @ ov[:, -1])
        step = gradient_step(near.x, near.y, near.asked, rate, debiased=True)
        errors = [
            float((guess - prompts.label).square().mean())
            for guess, prompts in ((said(layer, near), near), (step, near), (said(layer, far), far))
        ]
        return (
            Figure("error", errors[0], "0.24: two heads and more; 0.41: one head", high=0.3),
            Figure("error/debiased step's", errors[0] / errors[1], "1: it is one", 0.9, 1.15),
            Figure("error, twice as long", errors[2] / errors[0], "below 1: it gains", high=0.9),
        )

    def _curve(self, losses: list[float]) -> Curve:
        width = max(1, self.steps // 100)
        means = torch.tensor(losses)[: self.steps // width * width].view(-1, width).mean(1)
        lines = {"layer": [(width * (i + 1), m) for i, m in enumerate(means.tolist())]}
        for name, w in (("best one head", [self.dim**-0.5]), ("best two heads", [0.01, -0.01])):
            heads = torch.tensor(w, dtype=torch.float64)
            mu = best_mu(heads, self.dim, self.length, self.noise)
            level = float(risk(heads, mu, self.dim, self.length, self.noise))
            lines[name] = [(0, level), (self.steps, level)]
        return Curve("Loss", "step", "squared error", lines)


def said(layer: Attention, prompts: Prompts) -> Tensor:
    """Answers of the layer (B,)."""
    return answers(layer, prompts.x, prompts.y, prompts.asked[:, None])[:, 0]


def diagonal(kq: Tensor) -> Tensor:
    """w (H,): mean of the diagonal of KQ (H,d+1,d+1), its last entry aside."""
    return kq.diagonal(dim1=1, dim2=2)[:, :-1].mean(-1)


def shape(kq: Tensor, ov: Tensor) -> tuple[Figure, ...]:
    """How near the scaled KQ (H,d+1,d+1) and OV to the answer (H,d+1) are to the paper's form;
    heads count by |mu|. The last row of KQ is left aside, since a question ends with zero.
    """
    w, mu = diagonal(kq), ov[:, -1]
    share = mu.abs() / mu.abs().sum()
    acting = kq[:, :-1]
    form = w[:, None, None] * torch.eye(*acting.shape[1:])
    off = (acting - form).norm(dim=(1, 2)) / acting.norm(dim=(1, 2))
    size = (share * w.abs()).sum()
    spread = (share * (w.abs() - size).square()).sum().sqrt() / size
    return (
        Figure("KQ off w diag(I,0)", float(share @ off), "0", high=0.25),
        Figure(
            "OV off the label",
            float(share @ (ov[:, :-1].norm(dim=1) / ov.norm(dim=1))),
            "0",
            high=0.15,
        ),
        Figure(
            "sum of mu over sum of |mu|", float(mu.sum().abs() / mu.abs().sum()), "0", high=0.05
        ),
        Figure("spread of |w|", float(spread), "0: heads of one size", high=0.2),
        Figure("mu and w of one sign", float(share @ (w * mu > 0).float()), "1", low=0.95),
    )


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' layer with its circuits, or their estimators on one prompt."""
    return _layer(case) if case["state_dict"] else _estimators(case)


def _layer(case: Mapping[str, Any]) -> dict[str, Tensor]:
    width, heads = case["config"]["n_embd"], case["config"]["n_head"]
    layer, weights = reader(width - 1, heads, 0), case["state_dict"]
    layer.o_proj = nn.Linear(heads * width, len(weights["o_proj.weight"]), bias=False)
    layer.load_state_dict(weights)
    kq, ov = circuits(layer)
    y = layer(case["inputs"]["z_q"], context=case["inputs"]["z"])
    return {"y": y, "KQ": kq, "OV": ov}


def _estimators(case: Mapping[str, Any]) -> dict[str, Tensor]:
    config, inputs = case["config"], case["inputs"]
    dim, length, noise = config["d"], config["L"], config["var"]
    x, y, asked = inputs["Zx"].T[None], inputs["Zy"][None], inputs["xq"][None]
    w = torch.tensor(config["omega"], dtype=x.dtype)
    mu = best_mu(w, dim, length, noise)
    rate = 2 * float((w[0] * mu[0]).abs())
    return {
        "mu_opt": mu,
        "attention_est": estimate(x, y, asked, w, mu)[0],
        "approx_loss": risk(w, mu, dim, length, noise),
        "gd": gradient_step(x, y, asked, rate, debiased=False)[0],
        "dgd": gradient_step(x, y, asked, rate, debiased=True)[0],
        "ridge": ridge(x, y, asked, noise * dim)[0],
    }


CARD = StudyCard(
    name="icl_regression",
    build=IclRegression,
    papers=(
        Paper(
            "2503.12734",
            "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
            "Interpretability of Multi-Head Softmax Attention",
            2025,
        ),
    ),
    claim=Claim(
        "heads trained on regression prompts become scaled identities of both signs, and together "
        "one debiased gradient step",
        "regard study icl_regression",
    ),
    seconds=15,
    small={"heads": 2, "batch": 8, "steps": 5, "length": 6, "dim": 2},
    goldens=(
        Golden("9_icl_linear.pt", replay, "https://github.com/XintianPan/ICL_linear", "87ed34f"),
    ),
)
