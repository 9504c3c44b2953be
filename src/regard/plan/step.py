"""What a plan is made of: steps, storage, and the kind of model it was made for."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from regard.core.catalog import treatment
from regard.core.errors import ArgumentError
from regard.core.moment import Phase
from regard.core.treatment import Treatment

Numbers = Literal["all"] | str | tuple[int, ...]


class PlanError(ArgumentError):
    """A plan that cannot be read, or that does not fit a model."""


class Step(BaseModel):
    """One treatment with its options, and where it acts: layers, heads (or whole groups by their
    key heads), phases, modules.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    treatment: str
    options: dict[str, Any] = {}
    layers: Numbers = "all"
    heads: Numbers | None = None
    kv_heads: Numbers | None = None
    modules: str | None = None
    phases: tuple[Phase, ...] = ("prefill", "decode")

    @field_validator("phases")
    @classmethod
    def _some_phase(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        if not value:
            raise ValueError(f"at least one of {get_args(Phase)}")
        return value

    def build(self) -> Treatment:
        """The treatment with its options, checked field by field.

        Raises:
            UnknownNameError: no such treatment.
            PlanError: options it does not have, or of the wrong type or value.
        """
        return built(self.treatment, self.options)


def built(name: str, options: dict[str, Any]) -> Treatment:
    """A treatment from its name and options; unknown options are errors."""
    kind = treatment(name).build
    known = set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for option in options:
        if option not in known:
            raise PlanError(f"options of {name}", f"one of {sorted(known)}", option)
    try:
        return TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        raise PlanError(f"options of {name}", "valid options", first_problem(error)) from error


class Signature(BaseModel):
    """The kind of model a plan was made for; a different one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    layers: int
    heads: int
    kv_heads: int


class Storage(BaseModel):
    """How some layers store what they hold: in transformers' own quantised layers. bits,
    group_size and residual (tokens kept in full precision) are for the group-wise backends hqq and
    quanto; fp8 takes none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["fp8", "hqq", "quanto"]
    bits: int | None = None
    group_size: int | None = None
    residual: int | None = None
    layers: Numbers = "all"


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error, in one line."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def said(step: Step) -> str:
    """A step in one line."""
    return json.dumps(step.model_dump(exclude_defaults=True), sort_keys=True)
