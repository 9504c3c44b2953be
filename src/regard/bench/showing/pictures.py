"""Pictures: of a folder, or scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regard.bench.hub import library
from regard.bench.showing.exhibit import files_in
from regard.core.errors import ArgumentError
from regard.tasks.digits import Digits

READS = "a folder of pictures, or one of them"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Picture = Any
"""An image of Pillow in three colours."""


def pictures(path: Path | None, count: int) -> list[tuple[str, Picture]]:
    """`count` pictures with what they show, by the names of their files; without a path, digits.

    Raises:
        ArgumentError: too few pictures, or one that cannot be read.
        UnsupportedError: Pillow or scikit-learn is missing.
    """
    pillow = library("PIL.Image", "pictures", "images")
    if path is None:
        return _digits(pillow, count)
    found = []
    for file in files_in(path, ENDINGS, READS, count):
        try:
            found.append((file.stem.replace("_", " "), pillow.open(file).convert("RGB")))
        except (OSError, ValueError) as error:
            raise ArgumentError("data", f"a readable picture ({error})", file) from error
    return found


def _digits(pillow: Any, count: int) -> list[tuple[str, Picture]]:
    batch = next(iter(Digits().batches("test", count)))
    grey = (batch.inputs.reshape(-1, *Digits.grid) * 255).round().byte().numpy()
    return [
        (f"the digit {label}", pillow.fromarray(image).convert("RGB"))
        for label, image in zip(batch.targets.tolist(), grey, strict=True)
    ]
