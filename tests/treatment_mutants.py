"""Mutation test of the contract of treatments: planted bugs must be caught (`make mutants`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from regard.core import cutting, kept, treating
from regard.core.catalog import treatment
from regard.core.incoming import Chosen, Incoming, Memory
from regard.core.kept import Bucket
from regard.core.moment import Held, Moment
from regard.core.treatment import Treatment, TreatmentCard
from regard.testing.patient import Patient
from regard.testing.treatments import TREATMENT_CHECKS
from regard.treatments.snapkv import SnapKV
from regard.treatments.stream import Stream
from regard.treatments.temperature import Temperature

pytest.importorskip("transformers")

Plant = Callable[[], AbstractContextManager[TreatmentCard]]
PLANTS: dict[str, Plant] = {}


def plant(function: Callable[[], Iterator[TreatmentCard]]) -> None:
    PLANTS[function.__name__] = contextmanager(function)


@plant
def ignored_head_choice() -> Iterator[TreatmentCard]:
    """The treatment acts on every head of its layer."""
    good = treating.treat

    def bad(call: Incoming, steps: list[Chosen], memory: Memory) -> Tensor:
        everyone = tuple(range(call.site.heads))
        return good(call, [replace(s, heads=everyone) for s in steps], memory)

    with mock.patch("regard.hosts.transformers.run.treat", bad):
        yield treatment("head_gain")


@plant
def evicts_another_key_than_it_hides() -> Iterator[TreatmentCard]:
    good = Bucket.drop

    def bad(self: Bucket, keep: Tensor, spare: int = 0) -> None:
        good(self, keep.roll(1, -1), spare)

    with mock.patch.object(Bucket, "drop", bad):
        yield treatment("stream")


@plant
def holes_are_attended_to() -> Iterator[TreatmentCard]:
    """Empty slots of a bucket count as keys."""
    good = cutting._visible

    def bad(call: Incoming, heads: Any, slots: Tensor, bucket: Any, rows: Any) -> Tensor | None:
        return good(call, heads, slots.clamp_min(0), bucket, rows)

    with mock.patch.object(cutting, "_visible", bad):
        yield treatment("snapkv")


@plant
def counts_padding_as_tokens() -> Iterator[TreatmentCard]:
    """Positions are slots, so that left padding shifts what a treatment keeps."""

    def bad(self: Incoming) -> Tensor:
        return torch.arange(self.total)[None].expand(len(self.q), -1)

    with mock.patch.object(Incoming, "positions", bad):
        yield treatment("stream")


@plant
def keys_do_not_follow_their_beams() -> Iterator[TreatmentCard]:
    with mock.patch.object(Memory, "each", return_value=None):
        yield treatment("stream")


@plant
def appends_in_the_wrong_order() -> Iterator[TreatmentCard]:
    """Several new tokens get each other's places."""
    good = Bucket.append

    def bad(self: Bucket, k: Tensor, v: Tensor, slots: Tensor) -> None:
        good(self, k, v, slots.flip(-1))

    with mock.patch.object(kept.Bucket, "append", bad):
        yield treatment("stream")


@plant
def neutral_but_for_a_rounding() -> Iterator[TreatmentCard]:
    """What should change nothing changes the last bits."""

    def bad(self: Temperature, at: Moment) -> tuple[Tensor, Tensor, Tensor]:
        return at.q * (1 + 1e-14), at.k, at.v

    with (
        mock.patch.object(Temperature, "neutral", False),
        mock.patch.object(Temperature, "inputs", bad),
    ):
        yield treatment("temperature")


@plant
def does_nothing() -> Iterator[TreatmentCard]:
    with mock.patch.object(Stream, "keep", return_value=None):
        yield treatment("stream")


@plant
def chooses_by_the_first_queries() -> Iterator[TreatmentCard]:
    """The window of queries is taken by rows, padding included."""
    good = SnapKV.keep

    def bad(self: SnapKV, held: Held) -> Tensor | None:
        held.query_real = torch.ones_like(held.query_real)
        held.query_positions = torch.arange(held.q.shape[2]).expand_as(held.query_positions)
        return good(self, held)

    with mock.patch.object(SnapKV, "keep", bad):
        yield treatment("snapkv")


@plant
def never_evicts() -> Iterator[TreatmentCard]:
    """Bytes stay, and nothing is hidden either."""
    with mock.patch.object(treating, "evict", return_value=None):
        yield treatment("h2o")


@plant
def a_place_forgotten() -> Iterator[TreatmentCard]:
    with mock.patch.object(treating, "CHANGING", ("bias", "visible", "attention")):
        yield treatment("sink_calibration")


def caught(card: TreatmentCard) -> list[str]:
    """Names of the checks that fail."""
    found = []
    for name, check in TREATMENT_CHECKS.items():
        if name in card.gaps:
            continue
        try:
            check(Patient(card))
        except Exception:  # a caught bug may fail in any way
            found.append(name)
    return found


@pytest.mark.parametrize("name", PLANTS)
def test_mutant_is_caught(name: str) -> None:
    with PLANTS[name]() as card:
        found = caught(card)
    assert found, f"the contract does not see {name}"


@pytest.mark.parametrize("name", ["stream", "snapkv", "h2o", "temperature", "head_gain"])
def test_the_unmutated_are_clean(name: str) -> None:
    assert not caught(treatment(name))
    assert issubclass(treatment(name).build, Treatment)
