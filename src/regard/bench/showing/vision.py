"""Pictures for models of transformers that see: alone, or beside a tower that reads captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regard.bench.showing.exhibit import Exhibit
from regard.bench.showing.grids import seen_grid
from regard.bench.showing.pictures import READS, pictures
from regard.core.passage import Passage


def viewer(model: Any, processor: Any) -> Exhibit:
    """A model of pictures alone."""

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        found = []
        for _, picture in pictures(path, examples):
            inputs = seen(model, processor, picture)
            _, (grid, prefix) = seen_grid(model, inputs, model)
            found.append(Passage(inputs, grid=grid, prefix=prefix))
        return found

    return Exhibit(model, READS, show)


def matcher(model: Any, processor: Any, tokenizer: Any) -> Exhibit:
    """A tower for pictures and one for captions, which are the names of the files."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        found = []
        for name, picture in pictures(path, examples):
            limits = {"truncation": True, "max_length": min(length, most or length)}
            ids = tokenizer(name, return_tensors="pt", **limits).input_ids
            inputs = seen(model, processor, picture)
            _, (grid, prefix) = seen_grid(model, inputs, model.get_image_features)
            words = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
            found.append(Passage({**inputs, "input_ids": ids}, ids, words, {}, grid, prefix))
        return found

    return Exhibit(model, f"{READS}, named by captions", show)


def seen(model: Any, processor: Any, picture: Any) -> dict[str, Any]:
    """A picture as the inputs of a model, in its number format."""
    found = processor(images=picture, return_tensors="pt")
    return {
        name: x.to(model.dtype) if x.is_floating_point() else x for name, x in dict(found).items()
    }
