"""`regard atlas`: what every head of a model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regard.cli.output import console
from regard.core.errors import ArgumentError

if TYPE_CHECKING:
    from regard.atlases.record import Atlas
    from regard.bench.subject import Subject

BYTES_PER_TOKEN = 16
"""Text set aside per token asked for; what is left over is not read."""


def atlas(
    model: Annotated[
        str, typer.Argument(help="pocket, a model's folder, or its name on the hub")
    ] = "pocket",
    data: Annotated[
        Path | None, typer.Option(help="a text file to read [Python's documentation]")
    ] = None,
    length: Annotated[int, typer.Option(help="tokens per passage")] = 512,
    examples: Annotated[int, typer.Option(help="passages")] = 4,
    top: Annotated[int, typer.Option(help="heads to print per metric")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="folder for atlas.json and profiles.safetensors")
    ] = None,
) -> None:
    """Measure what every attention head of a model does on text.

    Attention sinks, entropy, distance, previous-token, duplicate-token and induction scores, from
    weights streamed in tiles; no matrix of all weights is held.

    Example: regard atlas pocket --length 1024 --out runs/atlas
    """
    from regard.atlases.survey import atlas as measure
    from regard.bench.subject import load

    if min(length, examples, top) < 1:
        raise ArgumentError("length, examples, top", "at least 1", (length, examples, top))
    subject = load(model)
    passages = _passages(subject, None if data is None else str(data), length, examples)
    found = measure(subject.model, passages)
    for tower in found.towers:
        console().print(_table(found, tower, top))
    if out is not None:
        found.save(out)
        console().print(f"atlas: {out / 'atlas.json'}")


def _passages(
    subject: Subject, file: str | None, length: int, examples: int
) -> list[dict[str, Any]]:
    """Passages of a text, one forward each, all of the same length."""
    import torch

    from regard.tasks.corpus import corpus

    text = bytes(corpus("test", file))
    step = max(1, len(text) // examples)
    found = []
    for start in range(0, step * examples, step):
        piece = text[start : start + BYTES_PER_TOKEN * length].decode(errors="ignore")
        ids = subject.encode(piece)[:length]
        if len(ids) < length:
            raise ArgumentError("length", f"at most {len(ids)}, which this text holds", length)
        found.append({"input_ids": torch.tensor([ids])})
    return found


def _table(found: Atlas, tower: str, top: int) -> Table:
    from regard.core.catalog import probe_cards

    meaning = {name: text for card in probe_cards().values() for name, text in card.metrics.items()}
    table = Table(title=f"{found.model}: {tower}", title_justify="left")
    for name in ("metric", "what", "heads with most (layer.head)", "mean"):
        table.add_column(name, justify="right" if name == "mean" else "left")
    for metric in found.metrics:
        values = found.map(metric, tower)
        chosen = found.select(metric, top=min(top, values.numel()), tower=tower)
        heads = "  ".join(f"{layer}.{head} {values[layer, head]:.2f}" for layer, head in chosen)
        table.add_row(metric, meaning[metric], heads, f"{values.nanmean():.2f}")
    return table
