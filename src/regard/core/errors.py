"""Errors a caller can act on: each names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any


class RegardError(Exception):
    """Base of every error this package raises on purpose. It can be sent to another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[RegardError], args: tuple[Any, ...], state: dict[str, Any]) -> RegardError:
    """The error as it was, whatever its class takes to be made."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ArgumentError(RegardError, ValueError):
    """An argument has the wrong shape, type or value."""

    def __init__(self, argument: str, expected: str, got: object) -> None:
        super().__init__(f"{argument}: expected {expected}, got {got}")
        self.argument = argument
        self.expected = expected
        self.got = got


class UnsupportedError(RegardError, NotImplementedError):
    """A valid request that this mechanism or executor cannot serve; nothing is ignored instead."""

    def __init__(self, who: str, lacks: str) -> None:
        super().__init__(f"{who} cannot serve this call: {lacks}")
        self.who = who
        self.lacks = lacks


class UnknownNameError(RegardError, LookupError):
    """A name that no card, task or option carries; the nearest ones are suggested."""

    def __init__(self, what: str, name: str, known: list[str]) -> None:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        )
        super().__init__(f"unknown {what} {name!r}; {hint}")
        self.name = name
        self.near = near
