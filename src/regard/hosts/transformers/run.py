"""A plan in force on one transformers model, and the two functions the model calls meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils

from regard.core.errors import UnsupportedError
from regard.core.incoming import Chosen, Memory
from regard.core.moment import Phase, Site
from regard.core.treating import treat
from regard.hosts.transformers.cache import KeptLayer
from regard.hosts.transformers.call import UNKNOWN, Noted, incoming
from regard.hosts.transformers.prepare import prepare, report
from regard.hosts.transformers.sites import sites_of

PATTERNS = {
    masking_utils.causal_mask_function: "causal",
    masking_utils.bidirectional_mask_function: "full",
}


@dataclass(eq=False)
class Forward:
    """One forward of the model: masks seen (kept alive, so that their ids stay theirs), the cache,
    what layers share.
    """

    masks: dict[int, tuple[Tensor, Noted]] = field(default_factory=dict)
    cache: Any = None
    past: int = 0
    shared: dict[int, dict[str, Any]] = field(default_factory=dict)


class Run:
    """A plan in force on one model."""

    def __init__(
        self,
        model: Any,
        steps: Mapping[str, Sequence[Chosen]],
        masked_only: bool,
        storage: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.model = model
        self.masked_only = masked_only
        known = {site.name: site for site in sites_of(model)}
        self.sites = {
            id(module): (known[name], list(steps.get(name, ())))
            for name, module in model.named_modules()
            if name in known
        }
        self.storage: dict[int, Mapping[str, Any]] = {}
        self.cached = self._cached(storage)
        self.modules = {id(module) for module in model.modules()}
        self.removed: set[int] = set()
        self.depth = 0
        self.forwards = 0
        self.called: set[str] = set()
        self.forward = Forward()

    def _cached(self, storage: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
        """Cache layers that the plan touches: index -> kept or absent."""
        kinds = {}
        for module in self.model.modules():
            site, steps = self.sites.get(id(module), (None, []))
            index = getattr(module, "layer_idx", None)
            if site is None or not site.causal or index is None:
                continue
            if site.name in storage:
                self.storage[index] = storage[site.name]
            if steps or site.name in storage:
                kinds[index] = "absent" if any(_drops(s) for s in steps) else "kept"
        return kinds

    def knows(self, module: nn.Module) -> bool:
        """Whether this is a module of the run's model."""
        return id(module) in self.modules

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: start afresh and see to the cache."""
        if not self.inner:
            return None
        self.depth += 1
        if self.depth > 1:
            return None
        self.forward = Forward()
        self.forwards += 1
        cache = prepare(self, self.cached, module, kwargs)
        self.forward.cache = cache
        self.forward.past = 0 if cache is None else int(cache.get_seq_length())
        return args, kwargs

    def leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, called after exceptions too."""
        if self.inner:
            self.depth -= 1

    @property
    def inner(self) -> bool:
        """Whether this is the innermost plan on its model, in this thread."""
        return next((r for r in reversed(RUNS.get()) if r.model is self.model), None) is self

    def noted(self, mask: Tensor) -> Noted:
        """What the mask function noted about this mask."""
        entry = self.forward.masks.get(id(mask))
        return UNKNOWN if entry is None else entry[1]

    def check_reached(self) -> None:
        """Raise UnsupportedError if the model ran and no treated module asked for its attention."""
        treated = [site.name for site, steps in self.sites.values() if steps]
        if self.forwards and treated and not self.called and not self.removed:
            raise UnsupportedError(
                "plan", f"the model ran, but {treated[0]} never called the attention interface"
            )

    def report(self) -> Mapping[str, Any]:
        """Keys held and bytes, per layer and in all, of the last forward's cache, beside those of a
        dense one.
        """
        return report(self.forward.cache)


def _drops(step: Chosen) -> bool:
    return "attention" in step.treatment.removes


RUNS: ContextVar[tuple[Run, ...]] = ContextVar("regard_runs", default=())
"""Plans in force in this thread, innermost last."""
BEFORE: dict[int, str] = {}
"""The attention implementation of every adopted configuration, by id."""


def make_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The mask function: the model's former one; a plan notes padding and pattern beside it."""
    before = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[BEFORE[id(config)]]
    mask = before(*args, config=config, **kwargs)
    pattern = PATTERNS.get(kwargs.get("mask_function"), "given")  # type: ignore[arg-type]
    for run in RUNS.get():
        if mask is not None:
            run.forward.masks[id(mask)] = (mask, (kwargs.get("attention_mask"), pattern))
    return mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: the innermost plan that treats this module, else the former one."""
    original = _former(module)
    run = next((r for r in reversed(RUNS.get()) if id(module) in r.sites), None)
    if run is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    site, steps = run.sites[id(module)]
    run.called.add(site.name)
    layer = _kept_layer(run, site, module)
    if not steps:
        if layer is not None:
            layer.fresh = False
        return original(module, query, key, value, attention_mask, **kwargs)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return original(module, q, k, v, attention_mask, **kwargs)[0].transpose(1, 2)

    if layer is not None and layer.arrived is not None:
        key, value = layer.arrived
    noted = UNKNOWN if attention_mask is None else run.noted(attention_mask)
    phase: Phase = "decode" if run.forward.past else "prefill"
    call = incoming(site, (query, key, value), attention_mask, noted, kwargs, kernel, layer, phase)
    call.shared, call.masked_only = run.forward.shared, run.masked_only
    call.cached = layer is not None
    memory = Memory() if layer is None else layer.memory
    dense = memory.buckets is None
    output = treat(call, steps, memory)
    if layer is not None:
        layer.fresh, layer.arrived = False, None
        if dense and memory.buckets is not None:
            layer.evicted()
    return output.transpose(1, 2).contiguous(), None


def _former(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The implementation this module had before."""
    config: Any = module.config
    name = BEFORE[id(config)]
    default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, default)  # type: ignore[arg-type]


def _kept_layer(run: Run, site: Site, module: Any) -> Any:
    """The cache layer that this call has just filled, if it is ours."""
    cache = run.forward.cache
    index = getattr(module, "layer_idx", None)
    if cache is None or site.cross or index is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, KeptLayer) and layer.fresh else None
