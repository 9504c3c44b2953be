"""The plan as a record: versions, JSON, and what it is asked."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from regard.core.hosting import Run
from regard.plan.resolved import Resolved, resolved
from regard.plan.step import PlanError, Signature, Step, Storage, first_problem, said

VERSION = 1
LARGEST = 4 * 2**20
"""Bytes of the largest plan file that is read."""


class Plan(BaseModel):
    """An ordered list of steps, and how caches are stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = VERSION
    name: str = ""
    made_for: Signature | None = None
    steps: tuple[Step, ...] = ()
    storage: Storage | None = None

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(f"this regard reads plans of version {VERSION}; update regard")
        return value

    @classmethod
    def read(cls, text: str) -> Plan:
        """A plan from JSON.

        Raises:
            PlanError: not JSON, not a plan, a newer version, an unknown field.
        """
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError("plan", "JSON", str(error)) from error
        if not isinstance(found, dict) or "steps" not in found or "schema_version" not in found:
            raise PlanError("plan", "an object with schema_version and steps", type(found).__name__)
        try:
            plan = cls.model_validate(found)
        except ValidationError as error:
            raise PlanError("plan", "a valid plan", first_problem(error)) from error
        for step in plan.steps:
            step.build()
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan from a JSON file.

        Raises:
            PlanError: as `read`, or the file is missing or larger than 4 MiB.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError("plan", "a JSON file", path)
        if path.stat().st_size > LARGEST:
            raise PlanError("plan", f"at most {LARGEST} bytes", path.stat().st_size)
        return cls.read(path.read_text(encoding="utf-8"))

    def text(self) -> str:
        """The plan as JSON."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        path = Path(path)
        draft = path.with_name(path.name + ".part")
        draft.write_text(self.text(), encoding="utf-8")
        draft.replace(path)

    def resolve(self, model: Any) -> Resolved:
        """Every step's layers and heads on this model.

        Raises:
            PlanError: made for another model, a pattern that matches nothing, a number out of
                range, half a group of heads where a whole one is needed.
            UnsupportedError: no host knows the model, or it has no attention that can be reached.
        """
        return resolved(model, self.steps, self.made_for, self.storage)

    def explain(self, model: Any) -> str:
        """Step by step and layer by layer, what would happen to this model."""
        return self.resolve(model).text()

    def diff(self, other: Plan) -> list[str]:
        """Lines of a comparison: steps only here (-), only there (+)."""
        mine, theirs = ([said(s) for s in plan.steps] for plan in (self, other))
        gone = [f"- {line}" for line in mine if line not in theirs]
        lines = gone + [f"+ {line}" for line in theirs if line not in mine]
        if self.storage != other.storage:
            lines += [f"{sign} storage {p.storage}" for sign, p in (("-", self), ("+", other))]
        if not lines and mine != theirs:
            lines = ["the same steps in another order"]
        return lines

    def applied(self, model: Any, *, masked_only: bool = False) -> AbstractContextManager[Run]:
        """A context in which this plan acts on the model; afterwards the model is as before.

        masked_only: hide evicted keys instead of dropping them; slower, saves nothing, and must
        give the same output.

        Raises:
            PlanError, UnsupportedError: before anything runs, as in `resolve`.
        """
        found = self.resolve(model)
        return found.host.run(model, found.table, masked_only=masked_only, storage=found.storage)
