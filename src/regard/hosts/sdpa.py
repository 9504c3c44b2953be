"""Host for every other model that calls `scaled_dot_product_attention`: timm, diffusers, plain
PyTorch.

While a plan is in force a TorchFunctionMode sees the calls, and forward hooks on attention modules
say which module a call belongs to. The mode and the list of plans belong to one thread; nothing is
patched. There is no cache here, so steps that evict keys, or leave sub-layers out, are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.hosting import mentions, tower_of
from regard.core.incoming import Chosen, Incoming, Memory, split_mask
from regard.core.moment import Site
from regard.core.treating import treat
from regard.hosts.parts import Parts

CALL = "scaled_dot_product_attention"
HEADS = ("num_heads", "heads", "n_heads", "num_attention_heads", "nhead")
KEY_HEADS = ("num_kv_heads", "num_key_value_heads", "kv_heads", "n_kv_heads")
LOOKS = re.compile(r"attention|attn", re.IGNORECASE)


class SdpaHost(Parts):
    """What plans need to know of models that call the fused kernel themselves."""

    name = "sdpa"

    def claims(self, model: object) -> bool:
        return isinstance(model, nn.Module)

    def sites(self, model: Any) -> list[Site]:
        """Attention modules that call the kernel, or hand the call to a processor of theirs."""
        found = [(name, m) for name, m in model.named_modules() if _calls(m) and _number(m, HEADS)]
        towers = [tower_of(name) for name, _ in found]
        sites = []
        for i, (name, module) in enumerate(found):
            heads = _number(module, HEADS) or 1
            cross = bool(getattr(module, "is_cross_attention", False))
            sites.append(
                Site(
                    name,
                    towers[i],
                    towers[:i].count(towers[i]),
                    towers.count(towers[i]),
                    heads,
                    _number(module, KEY_HEADS) or heads,
                    causal=False,
                    cross=cross,
                )
            )
        return sites

    def unreached(self, model: Any) -> Mapping[str, str]:
        """Modules named attention whose forward does not mention the kernel."""
        reached = {site.name for site in self.sites(model)}
        return {
            name: f"{type(m).__name__} does not call {CALL}, or does not say its number of heads"
            for name, m in model.named_modules()
            if LOOKS.search(type(m).__name__)
            and name not in reached
            and not any(r.startswith(name + ".") or name.startswith(r + ".") for r in reached)
        }

    def in_force(self, model: Any) -> bool:
        return any(run.model is model for run in _RUNS.get())

    @contextmanager
    def run(
        self,
        model: Any,
        steps: Mapping[str, Sequence[Chosen]],
        *,
        masked_only: bool = False,
        storage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Iterator[SdpaRun]:
        """See Host.run.

        Raises:
            UnsupportedError: a step needs a cache, or leaves a sub-layer out.
        """
        for step in (s for chosen in steps.values() for s in chosen):
            if step.touches("keep", "removes"):
                raise UnsupportedError(
                    type(step.treatment).__name__, "this model's host has no cache and no blocks"
                )
        if storage:
            raise UnsupportedError("storage", "this model's host has no cache")
        modules = dict(model.named_modules())
        run = SdpaRun(model, {s.name: s for s in self.sites(model)}, dict(steps))
        handles: list[Any] = []
        token = _RUNS.set((*_RUNS.get(), run))
        try:
            handles.append(model.register_forward_pre_hook(run.begin))
            for name in run.sites:
                handles.append(modules[name].register_forward_pre_hook(run.enter(name)))
                handles.append(modules[name].register_forward_hook(run.leave, always_call=True))
            with _Seeing(run):
                yield run
            run.check_reached()
        finally:
            for handle in handles:
                handle.remove()
            _RUNS.reset(token)


@dataclass(eq=False)
class SdpaRun:
    """A plan in force: its model and sites, modules being run, what layers share."""

    model: Any
    sites: dict[str, Site]
    steps: dict[str, Sequence[Chosen]]
    stack: list[str] = field(default_factory=list)
    shared: dict[int, dict[str, Any]] = field(default_factory=dict)
    begun: bool = False
    called: bool = False

    def check_reached(self) -> None:
        """Raise UnsupportedError if the model ran and no treated module called the kernel."""
        if self.begun and self.steps and not self.called:
            first = next(iter(self.steps))
            raise UnsupportedError("plan", f"the model ran, but {first} never called {CALL}")

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: a new forward begins."""
        if self in _RUNS.get():
            self.shared, self.begun = {}, True

    def enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Forward pre-hook of an attention module."""

        def hook(module: nn.Module, args: Any) -> None:
            if self in _RUNS.get():
                self.stack.append(name)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of an attention module, called after exceptions too."""
        if self in _RUNS.get():
            self.stack.pop()

    def report(self) -> Mapping[str, Any]:
        """No cache: nothing is held."""
        return {"layers": [], "bytes": 0, "dense_bytes": 0, "budget": 1.0, "compression_ratio": 0.0}


_RUNS: ContextVar[tuple[SdpaRun, ...]] = ContextVar("regard_sdpa_runs", default=())


class _Seeing(TorchFunctionMode):
    """Sees calls of the fused kernel; the innermost plan answers alone."""

    def __init__(self, run: SdpaRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        run = self.run
        if func is not F.scaled_dot_product_attention or not run.stack:
            return func(*args, **kwargs)
        site, steps = run.sites[run.stack[-1]], run.steps.get(run.stack[-1], ())
        if not steps or _RUNS.get()[-1] is not run:
            return func(*args, **kwargs)
        run.called = True
        call = _incoming(site, inspect.signature(_kernel).bind(*args, **kwargs))
        call.shared = run.shared
        return treat(call, steps, Memory())


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel's own signature, which it does not show to inspect."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _incoming(site: Site, bound: inspect.BoundArguments) -> Incoming:
    bound.apply_defaults()
    given = bound.arguments
    q, k, v = given["query"], given["key"], given["value"]
    if q.ndim != 4 or q.shape[1] != site.heads or k.shape[1] != site.kv_heads:
        raise ArgumentError(
            f"queries of {site.name}",
            f"(B, {site.heads}, N, D) and {site.kv_heads} key heads",
            (tuple(q.shape), tuple(k.shape)),
        )
    if given["dropout_p"]:
        raise UnsupportedError("plan", "attention dropout is on; call model.eval()")
    rest = {name: given[name] for name in list(given)[3:]}
    mask = given["attn_mask"]
    mask, bias = split_mask(None if mask is None else mask[(None,) * (4 - mask.ndim)])
    causal = bool(given["is_causal"]) and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:
        raise UnsupportedError("plan", "is_causal with unequal lengths is aligned top-left")
    return Incoming(
        site,
        "prefill",
        q,
        k,
        v,
        given["scale"] or q.shape[-1] ** -0.5,
        lambda q, k, v: _kernel(q, k, v, **rest),
        visible=mask,
        causal=causal,
        query_slot=0 if site.cross else k.shape[2] - q.shape[2],
        bias=bias,
        pattern="given" if mask is not None else "causal" if causal else "full",
    )


def _calls(module: nn.Module) -> bool:
    """Whether this module's forward, or its processor's call, mentions the kernel."""
    processor = getattr(module, "processor", None)
    if processor is not None:
        return mentions(type(processor).__call__, CALL, "dispatch_attention_fn")
    return mentions(type(module).forward, CALL)


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((x for x in found if isinstance(x, int) and x > 0), None)


HOST = SdpaHost()
