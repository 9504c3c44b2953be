r"""Deep self-attention distillation: a student's last layer learns a teacher's attention, and how
the teacher's values relate to one another; the two may differ in width and depth.

    loss = sum over relations of 1/(A N) sum_a sum_t KL(R_teacher[a,t] || R_student[a,t])
    R(X, Y) = softmax(X Y^T / sqrt(d)) over the keys that token t may see
    relations: q with k, which is the attention itself, and v with v      A: heads, N: real tokens

In relation form (`relation_heads`), all heads are joined and split anew into as many, so that
teacher and student need not have equally many; then q with q, k with k and v with v serve best, and
in large teachers a layer of the upper middle. Where the student has at most half the layers and
half the width, an assistant as deep as the teacher and as narrow as the student learns first and
teaches then. Queries and keys are those of attention, after rotary embeddings; dropout is off.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.mode import in_mode
from regard.core.recipe import RecipeCard
from regard.core.scene import Scene
from regard.recipes.relations import RELATIONS, Relation, States, relation_loss, states_of
from regard.recipes.training import Batches, Watch, frozen, trained

RATE = 5e-4


class Minilm(nn.Module):
    """The lesson. layer: of the teacher, negative from its end; the student's is its last.

    Raises:
        ArgumentError: unknown relations, or a layer that the teacher does not have.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        *,
        relations: Sequence[Relation] = ("qk", "vv"),
        relation_heads: int | None = None,
        layer: int = -1,
    ) -> None:
        super().__init__()
        if not relations or not set(relations) <= set(RELATIONS):
            raise ArgumentError("relations", f"some of {', '.join(RELATIONS)}", relations)
        self.teacher, self.student = teacher, student
        self.relations, self.relation_heads = tuple(relations), relation_heads
        depth = len(Scene.of(teacher, ()).chain)
        if not -depth <= layer < depth:
            raise ArgumentError("layer", f"one of the teacher's {depth}", layer)
        self.layer = layer

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses by relation of keyword arguments of both models' forward."""
        with torch.no_grad():
            wanted = states_of(self.teacher, batch, self.layer)
        found = states_of(self.student, batch, -1)
        heads = self.relation_heads
        return {
            name: relation_loss(
                wanted.relation(name, heads), found.relation(name, heads), found.real
            )
            for name in self.relations
        }


def wants_assistant(teacher: Any, student: Any) -> bool:
    """Whether the student is at most half as deep and half as wide as the teacher."""
    return all(
        2 * getattr(student.config, name) <= getattr(teacher.config, name)
        for name in ("num_hidden_layers", "hidden_size")
    )


def assistant_of(teacher: Any, student: Any) -> Any:
    """A new model as deep as the teacher and of the student's kind and width, its weights drawn
    from PyTorch's global generator.
    """
    fields = copy.deepcopy(student.config.to_dict())
    fields["num_hidden_layers"] = teacher.config.num_hidden_layers
    fields.pop("layer_types", None)
    return type(student)(type(student.config)(**fields)).to(next(student.parameters()))


def minilm(
    teacher: Any,
    student: Any,
    batches: Batches,
    steps: int,
    *,
    relations: Sequence[Relation] = ("qk", "vv"),
    relation_heads: int | None = None,
    layer: int = -1,
    assistant: bool | None = None,
    rate: float = RATE,
    watch: Watch | None = None,
) -> Any:
    """Train a student in place, and return it. assistant: whether one learns first, for as many
    steps of the same batches; None: where the student is small enough to want one.

    Raises:
        ArgumentError: models or options that do not fit each other; too few batches.
        UnsupportedError: accelerate is missing, or a model without self-attention that is reached.
    """
    if assistant or (assistant is None and wants_assistant(teacher, student)):
        between, stream = assistant_of(teacher, student), iter(batches)
        options: dict[str, Any] = {"relations": relations, "relation_heads": relation_heads}
        options |= {"assistant": False, "rate": rate, "watch": watch}
        minilm(teacher, between, stream, steps, layer=layer, **options)
        return minilm(between, student, stream, steps, **options)
    lesson = Minilm(
        teacher, student, relations=relations, relation_heads=relation_heads, layer=layer
    )
    with frozen(teacher), in_mode(student, False):
        trained(lesson, batches, steps, rate=rate, decay=0.01, watch=watch)
    return student


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The formula's two losses."""
    given = case["inputs"]
    b, _, n, _ = given["qs"].shape
    everything, real = torch.ones(b, 1, n, n, dtype=torch.bool), torch.ones(b, n, dtype=torch.bool)
    teacher, student = (
        States(given[f"q{who}"], given[f"k{who}"], given[f"v{who}"], everything, real)
        for who in "ts"
    )
    found = {
        name: relation_loss(teacher.relation(name), student.relation(name), real)
        for name in ("qk", "vv")
    }
    return {"L_AT": found["qk"], "L_VR": found["vv"]}


CARD = RecipeCard(
    name="minilm",
    build=minilm,
    papers=(
        Paper(
            "2002.10957",
            "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained "
            "Transformers",
            2020,
        ),
        Paper(
            "2012.15828",
            "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained "
            "Transformers",
            2020,
        ),
    ),
    claim=Claim(
        "a narrower student that first learns a layer's attention and value relations copies when"
        " one trained as long on data alone does not yet",
        "regard study relations_teach",
    ),
    goldens=(
        Golden("90_minilm.pt", replay, "formula of arXiv 2002.10957, equations 4 to 7", "none"),
    ),
)
