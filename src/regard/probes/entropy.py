r"""Entropy: over how many keys a head spreads, and from how many queries a key is read.

    H_i = - sum_j A_ij ln A_ij        row share: H_i / ln n_i, n_i visible keys (0 where n_i = 1)
    C_j = - sum_i p_ij ln p_ij, p_ij = A_ij / sum_i A_ij        column share: C_j / ln m_j

m_j queries see key j. A sink head has rows of low and a column of high share. exp H_i is the
effective number of keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core.card import Claim, Golden, Paper
from regard.core.observe import Seen
from regard.core.probe import (
    Finding,
    Look,
    ProbeCard,
    add_columns,
    add_rows,
    mean_of_rows,
    measured,
    plain_look,
    zeros,
)
from regard.core.shown import tile
from regard.importance.entropy_penalty import entropy_penalty, row_entropies


@dataclass(frozen=True)
class Entropy:
    """Entropies of rows and columns, in nats and as a share of the largest possible."""

    def begin(self, look: Look) -> _Spread:
        return _Spread(look)


class _Spread:
    def __init__(self, look: Look) -> None:
        n, m = look.queries.shape[1], look.keys.shape[1]
        self.look = look
        self.rows, self.seen = zeros(look, n), zeros(look, n)
        self.mass, self.logs, self.viewers = (zeros(look, m) for _ in range(3))

    def add(self, seen: Seen) -> None:
        rows, columns = seen.logs
        add_rows(self.rows, seen, -rows)
        add_rows(self.seen, seen, seen.in_view)
        add_columns(self.mass, seen, seen.mass)
        add_columns(self.logs, seen, columns)
        add_columns(self.viewers, seen, seen.viewers)

    def found(self) -> Finding:
        rows, columns = self.shares()
        real = self.look.real_queries
        gone = ~self.look.real_keys[:, None]
        return Finding(
            {
                "entropy": mean_of_rows(self.rows, real),
                "entropy_share": mean_of_rows(rows, real),
                "support": mean_of_rows(self.rows.exp(), real),
                "column_share": columns.masked_fill(gone, 0.0).amax(-1),
            }
        )

    def shares(self) -> tuple[Tensor, Tensor]:
        """Shares of rows (B,H,N) and columns (B,H,M)."""
        mass = self.mass.clamp_min(torch.finfo(torch.float64).tiny)
        columns = mass.log() - self.logs / mass
        return _share(self.rows, self.seen), _share(columns, self.viewers)


def _share(entropy: Tensor, count: Tensor) -> Tensor:
    """Entropy over its largest value with so many terms; 0 with one."""
    most = count.clamp_min(2).log()
    return (entropy / most).masked_fill(count < 2, 0.0)


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' shares by token, and their mean over rows and maximum over columns."""
    found: dict[str, Tensor] = {}
    for index in range(2):
        maps = case["inputs"][f"A{index}"]
        tally = Entropy().begin(plain_look(maps))
        tally.add(tile(maps))
        rows, columns = tally.shares()
        head = measured(Entropy(), maps).metrics
        found[f"row_tokenwise_normalized_entropy{index}"] = rows
        found[f"row_headwise_average_normalized_entropy{index}"] = head["entropy_share"]
        found[f"column_tokenwise_normalized_entropy{index}"] = columns
        found[f"column_headwise_maximum_normalized_entropy{index}"] = head["column_share"]
    return found


def replay_penalty(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' entropies of rows, and the loss by which they keep heads in a band."""
    maps, config = case["inputs"]["attentions"], case["config"]
    loss = entropy_penalty(
        maps,
        case["inputs"]["reg_threshold_weights"],
        margin=config["tolerance_margin_factor"],
        weight=config["loss_coeff"],
        reduction="sum_tokens",
    )
    return {"loss": loss, "entropy": row_entropies(maps)}


CARD = ProbeCard(
    name="entropy",
    build=Entropy,
    metrics={
        "entropy": "mean entropy of a query's weights, in nats",
        "entropy_share": "the same over ln of the keys the query sees, 0 to 1",
        "support": "effective number of keys of a query",
        "column_share": "largest share of any key's column, 0 to 1",
    },
    papers=(
        Paper(
            "2410.13835",
            "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena "
            "in LLMs",
            2024,
        ),
        Paper("2501.03489", "Entropy-Guided Attention for Private LLMs", 2025),
    ),
    claim=Claim("heads differ: some look at one key, some at all", "regard atlas"),
    goldens=(
        Golden(
            "29_attn_entropy.pt",
            replay,
            "https://github.com/GuoTianYu2000/Active-Dormant-Attention",
            "16b3593",
        ),
        Golden(
            "83_entropy_reg.pt",
            replay_penalty,
            "https://github.com/Nandan91/entropy-guided-attention-llm",
            "728944d",
        ),
    ),
)
