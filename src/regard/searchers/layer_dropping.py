r"""Layer dropping: the sub-layers that turn the residual stream least are left out.

    S = mean_t cos(x_t, y_t)        x: the stream before the sub-layer, y: after it; largest first

`kind` is attention, mlp, joint (both lists together), block (attention and mlp of a layer at once)
or stretch (successive blocks, the stream before the first beside that after the last). In one shot,
or one at a time with a new measurement after each (`in_turn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from regard.core.card import Claim, Paper
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.core.searcher import SearcherCard
from regard.plan import Plan
from regard.plan.resolved import signature
from regard.recipes.layer_similarity import drop_plan, least_needed, stretch_similarity

Kind = Literal["attention", "mlp", "joint", "block", "stretch"]


def layer_dropping(
    model: Any,
    passages: Sequence[Passage],
    count: int,
    *,
    kind: Kind = "attention",
    in_turn: bool = False,
) -> Plan:
    """The plan without the `count` sub-layers that turn the stream least on passages. Equal ones:
    attention before mlp, earlier layers first.

    Raises:
        ArgumentError: no passage, another kind, more sub-layers than there are; a stretch in turn.
        UnsupportedError: blocks that do not add what a sub-layer gives to its input.
    """
    if kind not in get_args(Kind):
        raise ArgumentError("kind", f"one of {get_args(Kind)}", kind)
    if kind == "stretch":
        if in_turn:
            raise ArgumentError("in_turn", "one shot for a stretch", in_turn)
        start = int(stretch_similarity(model, passages, count).argmax())
        plan = drop_plan(tuple(("block", start + i) for i in range(count)))
    else:
        sublayers = ("attention", "mlp") if kind == "joint" else (kind,)
        plan = least_needed(model, passages, count, sublayers=sublayers, in_turn=in_turn)
    return plan.model_copy(update={"made_for": signature(model)})


CARD = SearcherCard(
    name="layer_dropping",
    build=layer_dropping,
    finds="plan",
    papers=(
        Paper("2406.15786", "What Matters in Transformers? Not All Attention is Needed", 2024),
    ),
    claim=Claim(
        "dropping the layers that turn the stream least hurts less than dropping as many at random",
        "regard study dropping_by_similarity",
    ),
)
