"""Training and evaluation mode of a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """A context in which a model is in training or in evaluation mode; afterwards as before."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
