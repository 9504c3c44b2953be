"""A name with options, as a record and as text: `sliding_window(window=8,sinks=0)`.

The text is Python's call syntax, read with the `ast` module and never run: values are literals
(numbers, strings, True, False, None, tuples, lists, dictionaries); a bare word stands for its own
text, so that `form=chunk` needs no quotes in a shell.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator

from regard.bench.record import Record
from regard.core.errors import ArgumentError

HYBRID = "hybrid"
"""The name of a mechanism that differs from layer to layer."""
SYNTAX = "name or name(option=value, ...), separated by commas"


class Spec(Record):
    """A mechanism or a task: its name and the options that differ from the defaults."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _plain_values(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name: _plain(value, name) for name, value in options.items()}

    @property
    def label(self) -> str:
        """The spec as text, unique among specs that differ."""
        if not self.options:
            return self.name
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({options})"

    def over(self, layers: int) -> tuple[Spec, ...]:
        """The mechanism of each of so many layers: always this one, or in turn those in the option
        `layers` of a hybrid, each as text: hybrid(layers=('softmax', 'uniform')).

        Raises:
            ArgumentError: a hybrid without such layers, or with other options.
        """
        if self.name != HYBRID:
            return (self,) * layers
        texts: Any = self.options.get("layers")
        if set(self.options) != {"layers"} or not isinstance(texts, tuple) or not texts:
            expected = "layers=('softmax', 'uniform', ...) and nothing else"
            raise ArgumentError(HYBRID, expected, self.options)
        parts = [parse_spec(str(text), f"{HYBRID}.layers") for text in texts]
        return tuple(parts[layer % len(parts)] for layer in range(layers))


def parse_specs(text: str, argument: str) -> tuple[Spec, ...]:
    """The specs in a comma-separated text; `argument` is named in errors.

    Raises:
        ArgumentError: the text is empty or not such a list, or a spec stands in it twice.
    """
    tree = _parsed(f"[{text}]", text, argument)
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ArgumentError(argument, SYNTAX, repr(text))
    specs = tuple(_spec(node, argument) for node in tree.elts)
    for index, spec in enumerate(specs):
        if spec in specs[:index]:
            raise ArgumentError(argument, "each one once", f"{spec.label} twice")
    return specs


def parse_spec(text: str, argument: str) -> Spec:
    """The one spec in a text."""
    specs = parse_specs(text, argument)
    if len(specs) != 1:
        raise ArgumentError(argument, "one name", repr(text))
    return specs[0]


def parse_options(pairs: Iterable[str], argument: str) -> dict[str, Any]:
    """Options from texts such as `window=8`; `argument` is named in errors."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ArgumentError(argument, "name=value", repr(pair))
        if name in options:
            raise ArgumentError(argument, "each option once", f"{name} twice")
        options[name] = _value(_parsed(value.strip(), pair, argument), name)
    return options


def _parsed(source: str, text: str, argument: str) -> ast.expr:
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ArgumentError(argument, SYNTAX, repr(text)) from error


def _spec(node: ast.expr, argument: str) -> Spec:
    if isinstance(node, ast.Name):
        return Spec(name=node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ArgumentError(argument, SYNTAX, repr(ast.unparse(node)))
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise ArgumentError(argument, "each option once, by name", repr(ast.unparse(node)))
        options[keyword.arg] = _value(keyword.value, f"{node.func.id}.{keyword.arg}")
    return Spec(name=node.func.id, options=options)


def _value(node: ast.expr, where: str) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        shown = repr(ast.unparse(node))
        raise ArgumentError(where, "a literal such as 8, 0.5, True, text or (3, 3)", shown) from (
            error
        )
    return _plain(value, where)


def _plain(value: Any, where: str) -> Any:
    """The value with lists as tuples, if JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part, where) for part in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, where) for key, part in value.items()}
    finite = not isinstance(value, float) or math.isfinite(value)
    if value is None or (isinstance(value, (bool, int, float, str)) and finite):
        return value
    raise ArgumentError(where, "a finite number, text, True, False, None or a list", repr(value))
