"""Text as passages: for decoders, encoders, and encoders with a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regard.bench.showing import needles
from regard.bench.showing.exhibit import Exhibit
from regard.bench.subject import Subject
from regard.core.errors import ArgumentError
from regard.core.passage import Passage
from regard.tasks.corpus import corpus

READS = "a text file, or needle"
BYTES_PER_TOKEN = 16
"""Text set aside per token asked for; what is left over is not read."""


def reader(subject: Subject) -> Exhibit:
    """A decoder or an encoder, which reads one sequence."""

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        _fits(subject.model, length)
        if path is not None and str(path) == needles.NAME and not path.exists():
            return needles.questions(subject, examples, length)
        pieces = _pieces(path, examples, length)
        return [_passage(subject, _ids(subject, piece, length)) for piece in pieces]

    return Exhibit(subject.model, READS, show)


def translator(subject: Subject) -> Exhibit:
    """An encoder and a decoder: the one reads a text, the other how it goes on, half as long."""

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        _fits(subject.model, length)
        half = max(2, length // 2)
        if half == length:
            raise ArgumentError("length", "at least 3 for an encoder with a decoder", length)
        found = []
        for piece in _pieces(path, examples, length + half):
            ids = _ids(subject, piece, length + half, special=False)
            source, more = ids[:length], [start_of(subject.model), *ids[length:-1]]
            inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": _row(more)}
            found.append(Passage(inputs, _row(more), words=[subject.words(more)]))
        return found

    return Exhibit(subject.model, READS, show)


def _passage(subject: Subject, ids: list[int]) -> Passage:
    """One forward over ids."""
    return Passage({"input_ids": _row(ids)}, _row(ids), words=[subject.words(ids)])


def start_of(model: Any) -> int:
    """The token with which a decoder begins.

    Raises:
        ArgumentError: its configuration names none.
    """
    holders = (getattr(model, "generation_config", None), model.config)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for holder in holders:
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return found
    raise ArgumentError("MODEL", "a configuration with decoder_start_token_id", "none")


def _row(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


def _fits(model: Any, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ArgumentError("length", f"at most {most}, the positions of this model", length)


def _ids(subject: Subject, piece: str, length: int, special: bool = True) -> list[int]:
    """`length` ids of a text, with what the tokenizer puts around it, if that is wanted."""
    if subject.symbols:
        ids = subject.encode(piece)[:length]
    else:
        limits: dict[str, Any] = {"truncation": True, "max_length": length}
        ids = subject.text(piece, add_special_tokens=special, **limits).input_ids
    if len(ids) < length:
        raise ArgumentError("length", f"at most {len(ids)}, which this text holds", length)
    return ids


def _pieces(path: Path | None, examples: int, length: int) -> list[str]:
    """Pieces of a text that begin at equal distances."""
    text = _text(path)
    step = max(1, len(text) // examples)
    starts = range(0, step * examples, step)
    return [text[s : s + BYTES_PER_TOKEN * length].decode(errors="ignore") for s in starts]


def _text(path: Path | None) -> bytes:
    if path is None:
        return bytes(corpus("test"))
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArgumentError("data", f"{READS} ({error.strerror})", path) from error
    if b"\0" in text:
        raise ArgumentError("data", f"{READS}, which this model reads", path)
    return text
