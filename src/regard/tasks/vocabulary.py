"""The vocabulary of the pocket language model and of the tasks made for it.

    0 … 255 bytes of UTF-8 text | 256 begin | 257 ask | 258 … 263 unused | 264 … 511 symbols

Text is its bytes, so any text can be scored. Symbols never occur in text: facts are made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from regard.core.errors import ArgumentError

BYTES = 256
BEGIN, ASK = 256, 257
FIRST_SYMBOL = 264
SIZE = 512
SYMBOLS = SIZE - FIRST_SYMBOL


@dataclass(frozen=True)
class Vocabulary:
    """Text to token ids and back. Whatever is encoded can be decoded, whatever the text."""

    begin: ClassVar[int] = BEGIN
    ask: ClassVar[int] = ASK
    symbols: ClassVar[range] = range(FIRST_SYMBOL, SIZE)

    def __len__(self) -> int:
        return SIZE

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text, one per byte of its UTF-8 form, after the token every sequence begins with
        unless `begin` is False.
        """
        return [BEGIN] * begin + list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Tokens that are no bytes are written ⟨begin⟩, ⟨ask⟩, ⟨s0⟩ …, and
        bytes that are no UTF-8 become U+FFFD.

        Raises:
            ArgumentError: an id outside the vocabulary.
        """
        return b"".join(map(_spelling, ids)).decode(errors="replace")


def _spelling(token: int) -> bytes:
    if not 0 <= token < SIZE:
        raise ArgumentError("ids", f"0 to {SIZE - 1}", token)
    if token < BYTES:
        return bytes([token])
    if token >= FIRST_SYMBOL:
        return f"⟨s{token - FIRST_SYMBOL}⟩".encode()
    return f"⟨{ {BEGIN: 'begin', ASK: 'ask'}.get(token, f'unused{token}') }⟩".encode()
