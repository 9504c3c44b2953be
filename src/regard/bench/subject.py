"""The model under evaluation: the pocket one, one in a folder, or one named as on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from regard import pocket
from regard.bench.hub import fetching, library, loading, quiet, told
from regard.bench.record import Record
from regard.core.errors import ArgumentError
from regard.tasks.vocabulary import Vocabulary

POCKET = "pocket"
SAMPLE = 64
"""Numbers of each tensor that enter a model's fingerprint."""


class SubjectRecord(Record):
    """What a model is: as it was named, its class, size, number format, library, and a fingerprint
    of its shape and of some of its weights.
    """

    name: str
    architecture: str
    parameters: int
    dtype: str
    library: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Subject:
    """A causal language model, and what turns text into its ids and back: the pocket model's
    vocabulary, or a tokenizer of transformers.
    """

    name: str
    model: Any
    text: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process it goes by its name, and is loaded there again."""
        return reloaded, (placed(self.name), str(self.model.device), fingerprint(self.model))

    @property
    def symbols(self) -> bool:
        """Whether it has the pocket vocabulary, and with it the tasks made of symbols."""
        return isinstance(self.text, Vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, after what begins a sequence of this model, if anything does."""
        if self.symbols:
            return self.text.encode(text)
        return [*self.opening, *self.plain(text)]

    def plain(self, text: str) -> list[int]:
        """Ids of a text and nothing else."""
        if self.symbols:
            return self.text.encode(text, begin=False)
        return self.text(text, add_special_tokens=False).input_ids

    @property
    def opening(self) -> list[int]:
        """The token that begins a sequence, where the tokenizer puts one."""
        begin = self.text.begin if self.symbols else self.text.bos_token_id
        return [begin] if self.symbols or begin in self.text("").input_ids else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids."""
        return self.text.decode(list(ids))

    def words(self, ids: Iterable[int]) -> list[str]:
        """The text of every id by itself."""
        return [self.decode([i]) for i in ids]

    def record(self) -> SubjectRecord:
        """What it is, for results."""
        import transformers

        weights = list(self.model.parameters())
        return SubjectRecord(
            name=told(self.name),
            architecture=type(self.model).__name__,
            parameters=sum(weight.numel() for weight in weights),
            dtype=str(weights[0].dtype).removeprefix("torch."),
            library=f"transformers {transformers.__version__}",
            fingerprint=fingerprint(self.model),
        )


def load(name: str, device: str = "cpu") -> Subject:
    """The model of that name, in evaluation mode: "pocket", a folder (nothing is fetched), or a
    name on the hub. Only safetensors are read, and no code that comes with a model is run.

    Raises:
        ArgumentError: no such model, or one that cannot be loaded; a device that is not there.
        UnsupportedError: transformers is missing.
    """
    place = _device(device)
    model: Any
    foreign = library()
    if name == POCKET:
        with quiet(foreign):
            model, text = pocket.language()
    else:
        with loading(name), quiet(foreign, Path(name).is_dir()):
            options = fetching(name)
            text = foreign.AutoTokenizer.from_pretrained(name, **options)
            model = foreign.AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", use_safetensors=True, **options
            )
    return Subject(name, model.to(place).eval(), text)


@lru_cache(maxsize=1)
def reloaded(name: str, device: str, expected: str) -> Subject:
    """The model of that name in this process, the last one remembered.

    Raises:
        ArgumentError: it is not the one with the expected fingerprint.
    """
    found = load(name, device)
    check_same(found.model, name, expected)
    return found


def placed(name: str) -> str:
    """The name of a model for a process in another folder."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def check_same(model: Any, name: str, expected: str) -> None:
    """Raise ArgumentError unless a model that was found again has the expected fingerprint."""
    if fingerprint(model) != expected:
        raise ArgumentError("launcher", f"here, for a model that is not {name} as it is kept", name)


def skeleton(name: str) -> Any:
    """The model without its weights: enough to see which layers and heads a plan would reach.

    Raises:
        ArgumentError, UnsupportedError: as `load`.
    """
    foreign = library()
    if name == POCKET:
        with quiet(foreign):
            return pocket.language()[0]
    with loading(name), torch.device("meta"):
        config = foreign.AutoConfig.from_pretrained(name, **fetching(name))
        kind = getattr(foreign, (config.architectures or ["?"])[0], None)
        if kind is None:
            return foreign.AutoModelForCausalLM.from_config(config)
        return kind(config)


def fingerprint(model: Any) -> str:
    """Tells models apart: names, shapes and formats of the weights, and some of their numbers."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].double().cpu()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(some.numpy().tobytes())
    return found.hexdigest()[:16]


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ArgumentError("device", "a device of this machine", f"{name} ({first})") from error
