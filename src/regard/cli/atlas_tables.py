"""Tables of an atlas: the heads with most of each metric, and those in which two atlases differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from regard.atlases.record import Atlas


def tower_table(found: Atlas, tower: str, top: int) -> Table:
    """One line per metric of one tower: its heads with most, or its layers, and the mean."""
    table = Table(title=f"{found.model}: {tower}", title_justify="left")
    for name in ("metric", "what", "most (layer.head, or layer)", "mean"):
        table.add_column(name, justify="right" if name == "mean" else "left")
    for metric in (*found.metrics, *found.layer_metrics):
        rows = [r for r in found.rows if (r.tower, r.metric) == (tower, metric) and r.n]
        if not rows:
            continue
        most = sorted(rows, key=lambda row: -row.value)[:top]
        where = "  ".join(f"{_place(row.layer, row.head)} {_short(row.value)}" for row in most)
        mean = sum(row.value for row in rows) / len(rows)
        table.add_row(metric, found.meanings.get(metric, ""), where, _short(mean))
    return table


def difference_table(found: Atlas, other: Atlas, top: int) -> Table:
    """The heads of each metric in which two atlases differ most.

    Raises:
        ArgumentError: they have nothing in common.
    """
    table = Table(title=f"{found.model} and {other.model}", title_justify="left")
    for name in ("metric", "tower", "layer.head", "this", "other", "difference"):
        table.add_column(name, justify="left" if name in ("metric", "tower") else "right")
    rows = [row for row in found.compare(other) if row["difference"] == row["difference"]]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == metric]
        for row in sorted(mine, key=lambda row: -abs(row["difference"]))[:top]:
            numbers = (row["value"], row["other"])
            where = _place(row["layer"], row["head"])
            told = (*(f"{x:.3g}" for x in numbers), f"{row['difference']:+.3g}")
            table.add_row(metric, row["tower"], where, *told)
    return table


def _place(layer: int, head: int | None) -> str:
    return f"{layer}" if head is None else f"{layer}.{head}"


def _short(value: float) -> str:
    """A number to two places; one that these would make zero, to one digit."""
    return f"{value:.0e}" if 0 < abs(value) < 0.005 else f"{value:.2f}"
