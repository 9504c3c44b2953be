"""How a report reads what it shows: plain dictionaries, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from regard.core.errors import ArgumentError


class Shown(BaseModel):
    """Read-only; fields this version does not show are let pass."""

    model_config = ConfigDict(frozen=True, extra="ignore")


S = TypeVar("S", bound=Shown)


def read_shown(kind: type[S], given: Mapping[str, Any], schema: str) -> S:
    """The record of a dictionary of schema "regard.NAME/VERSION".

    Raises:
        ArgumentError: another schema, or a field that is missing or of the wrong kind; it is named.
    """
    name = schema.removeprefix("regard.").partition("/")[0]
    if given.get("schema") != schema:
        raise ArgumentError(f"{name}.schema", schema, repr(given.get("schema")))
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise ArgumentError(where, first["msg"], repr(first["input"])[:80]) from error
