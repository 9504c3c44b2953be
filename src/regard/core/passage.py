"""Passages: what a model is shown while its heads are measured, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regard.core.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Passage:
    """One forward of a model.

    inputs: its keyword arguments. tokens (B,N): ids of the sequence whose heads are measured;
    words: their texts, one list per sequence. roles: name -> (B,N), what positions are for (image,
    needle, …). grid (h,w): the arrangement of an image's positions after `prefix` others. domain:
    the kind of data, to compare kinds. answer (B,T): what should be said next. wrong (B,): an
    answer that should not be. scored: the tokens whose loss counts, (B,T)
    of the answer if there is one, else (B,N); None: all. labels (B,):
    classes, for models that tell them. contrast: inputs of the same shape in which what matters is
    another.
    """

    inputs: Mapping[str, Any]
    tokens: Tensor | None = None
    words: Sequence[Sequence[str]] | None = None
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    prefix: int = 0
    domain: str = ""
    answer: Tensor | None = None
    wrong: Tensor | None = None
    scored: Tensor | None = None
    labels: Tensor | None = None
    contrast: Mapping[str, Any] | None = None

    @property
    def padding(self) -> Tensor | None:
        """(B,N), False on padding; None: there is none."""
        mask = self.inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def passage_of(given: Passage | Mapping[str, Any]) -> Passage:
    """A passage from keyword arguments of a forward; `input_ids` among them are its tokens (those
    of the decoder, if it has its own).

    Raises:
        ArgumentError: neither a passage nor keyword arguments; a sequence of one token, or of
            padding alone.
    """
    if not isinstance(given, Passage):
        if not isinstance(given, Mapping):
            raise ArgumentError("passages", "passages or keyword arguments", type(given).__name__)
        ids = given.get("decoder_input_ids", given.get("input_ids"))
        given = Passage(given, tokens=ids if isinstance(ids, Tensor) else None)
    if given.tokens is not None and given.tokens.shape[1] < 2:
        raise ArgumentError("passages", "two tokens or more", given.tokens.shape[1])
    padding = given.padding
    if padding is not None and not bool(padding.any(1).all()):
        row = int((~padding.any(1)).nonzero()[0])
        raise ArgumentError("attention_mask", "a real token in every row", f"row {row} is padding")
    return given
