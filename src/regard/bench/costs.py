"""What plans cost, side by side: bytes of the cache, seconds to read a prompt and to decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from regard.bench.machine import Hardware, Versions, hardware, load, versions
from regard.bench.reading import Reading, under
from regard.bench.record import Record, digest
from regard.bench.timing import Pace, Spread, interleaved, ratio, spread
from regard.plan import Plan


class CostConfig(Record):
    """What decides a measurement of costs. plans: None is the model as it is, always first. length:
    tokens of the prompt. tokens: decoded after it, one by one.
    """

    model: str
    plans: tuple[Plan | None, ...]
    length: PositiveInt
    tokens: PositiveInt
    seconds: NonNegativeFloat
    threads: PositiveInt
    device: str

    @property
    def id(self) -> str:
        """Its name."""
        return digest(self)


class Cost(Record):
    """The costs of one plan on one sequence: bytes held after the prompt and one more token,
    seconds per prompt and per decoded token, and how many times faster than the model as it is,
    round by round.
    """

    cache_bytes: NonNegativeInt
    prefill_seconds: Spread
    decode_seconds: Spread
    prefill_speedup: Spread
    decode_speedup: Spread


class Costs(Record):
    """The costs of all plans of a config, in its order, timed in turn in one process. load:
    processes that wanted to run before it began, on average.
    """

    format: Literal["regard.costs/1"] = Field(default="regard.costs/1", alias="schema")
    config: CostConfig
    costs: tuple[Cost, ...]
    versions: Versions
    hardware: Hardware
    load: float | None
    seconds: float


class Lap:
    """One plan on one prompt: every call reads it, decodes, and notes how long each took."""

    def __init__(self, model: Any, plan: Plan | None, prompt: Tensor, tokens: int) -> None:
        self.model, self.plan, self.tokens = model, plan, tokens
        self.prompt = prompt.to(model.device)
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.held = 0

    def __call__(self) -> None:
        with under(self.plan, self.model) as run:
            reading = Reading(self.model)
            started = self._now()
            ids = reading.read(self.prompt).argmax(-1, keepdim=True)
            read = self._now()
            for step in range(self.tokens):
                ids = reading.read(ids).argmax(-1, keepdim=True)
                if step == 0 and not self.prefill:  # in the round that is not counted
                    self.held = held_bytes(run, reading.cache)
            ended = self._now()
        self.prefill.append(read - started)
        self.decode.append((ended - read) / self.tokens)

    def _now(self) -> float:
        if self.prompt.is_cuda:
            torch.cuda.synchronize(self.prompt.device)
        return time.perf_counter()


def held_bytes(run: Any, cache: Any) -> int:
    """Bytes of a cache: as the plan in force reports them, or of all keys and values."""
    report = {} if run is None else run.report()
    if report.get("layers"):
        return int(report["bytes"])
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def measure_costs(model: Any, prompt: Tensor, config: CostConfig) -> Costs:
    """Costs of every plan of a config on a prompt (1,N). Plans take turns, and the first round of
    all is not counted.
    """
    started, before = time.perf_counter(), load()
    laps = [Lap(model, plan, prompt, config.tokens) for plan in config.plans]
    interleaved(laps, Pace(max(config.seconds, 1e-3), long=3))
    dense = laps[0]
    costs = tuple(_cost(lap, dense) for lap in laps)
    return Costs(
        config=config, costs=costs, versions=versions(), hardware=hardware(config.device),
        load=before,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _cost(lap: Lap, dense: Lap) -> Cost:
    def counted(times: Sequence[float]) -> Sequence[float]:
        return times[1:]  # the first call also warms up

    return Cost(
        cache_bytes=lap.held,
        prefill_seconds=spread(counted(lap.prefill)),
        decode_seconds=spread(counted(lap.decode)),
        prefill_speedup=ratio(counted(dense.prefill), counted(lap.prefill)),
        decode_speedup=ratio(counted(dense.decode), counted(lap.decode)),
    )
