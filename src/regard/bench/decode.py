"""Decoding: one new token after many, for every mechanism that carries keys or a constant state."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.book import Book
from regard.bench.machine import memory_limited
from regard.bench.rivals import Setting, option_choices
from regard.bench.roof import read_probe
from regard.bench.spec import Spec
from regard.bench.speed import DecodePoint
from regard.bench.sweep import FAILURES, Progress, Watch, check_specs, told
from regard.bench.timing import Pace, Work, interleaved, rate, ratio, spread
from regard.build import create
from regard.core.call import Call
from regard.core.card import Card
from regard.core.catalog import card
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.mask import Causal, both
from regard.core.state import Keys, state_bytes, trimmed

PIECE = 256  # tokens a layer reads at a time while its state is filled
KEYS = 65_536


@dataclass(frozen=True)
class DecodePlan:
    """What to decode after how many keys. fill: seconds a layer may take to read them."""

    specs: tuple[Spec, ...]
    keys: int = KEYS
    pace: Pace = Pace()
    fill: float = 20.0


@dataclass(frozen=True, eq=False)
class Ready:
    """A step to be timed, the bytes of state it reads, and the tokens seen before it."""

    step: Work
    state_bytes: int
    keys: int


def decodes(entry: Card) -> bool:
    """Whether a mechanism carries anything from token to token."""
    return entry.cost.state != "none" and entry.causal


def decode(plan: DecodePlan, book: Book, watch: Watch) -> None:
    """Measure every mechanism of the plan that decodes and that the book does not hold yet."""
    check_specs(plan.specs)
    held = {(p.mechanism.label, p.asked) for p in book.speed.decode}
    specs = [spec for spec in plan.specs if decodes(card(spec.name))]
    for done, spec in enumerate(specs):
        watch(Progress(done, len(specs), f"decoding with {spec.label}"))
        if (spec.label, plan.keys) not in held:
            book.add("decode", [_point(spec, plan, book)])
    watch(Progress(len(specs), len(specs)))


def _point(spec: Spec, plan: DecodePlan, book: Book) -> DecodePoint:
    entry, setting = card(spec.name), book.speed.setting
    blank = DecodePoint(
        mechanism=spec,
        family=entry.family,
        status="failed",
        session=book.session,
        asked=plan.keys,
        keys=plan.keys,
        state="constant" if entry.cost.state == "constant" else "keys",
        through="operator" if _bare(entry) else "step",
    )
    with memory_limited(), torch.no_grad():
        try:
            found = clocked(_ready(spec, plan, setting), setting, plan.pace)
        except FAILURES as error:
            return blank.model_copy(update={"reason": told(error)})
    return blank.model_copy(update={"status": "measured", **found})


def _bare(entry: Card) -> bool:
    """Whether the operator is timed without a layer: its state can be had without a long past."""
    own_keys = entry.carries_state and entry.cost.state == "keys"
    return entry.kind == "operator" and not own_keys


def _ready(spec: Spec, plan: DecodePlan, setting: Setting) -> Ready:
    """The step to be timed; options as `rivals` chooses them."""
    entry = card(spec.name)
    choices = option_choices(entry, spec.options, (plan.keys + 1,), setting)
    for left, options in enumerate(choices, 1 - len(choices)):
        try:
            layer = _built(spec, options, setting)
            if _bare(entry):
                return operator_ready(layer, plan.keys, setting)
            return layer_ready(layer, plan, setting)
        except (ArgumentError, UnsupportedError):
            if left == 0:
                raise
    raise UnsupportedError(spec.label, "it has no options for this many keys")


def operator_ready(layer: Any, keys: int, setting: Setting) -> Ready:
    """One query on the state that an operator holds after `keys` tokens: cached keys that are still
    alive, or its own state. layer: the attention layer around it.
    """
    q, k, v = _heads(setting, 1), _heads(setting, keys), _heads(setting, keys)
    if layer.card.carries_state and layer.card.cost.state == "constant":
        head = PIECE
        first = Call(mask=Causal())
        state = layer.inner(k[:, :, :head], k[:, :, :head], v[:, :, :head], first).state
        new = _new_token(keys, setting)
        return Ready(
            lambda: layer.inner(q, k[:, :, :1], v[:, :, :1], new, state=state),
            state_bytes(state),
            keys,
        )
    positions = torch.arange(keys).expand(setting.batch, -1)
    cache = Keys(k, v, positions, torch.ones_like(positions, dtype=torch.bool))
    seen = torch.full((setting.batch,), keys - 1)
    cache = trimmed(cache, both(Causal(), layer.own_mask), seen, setting.heads, Call())
    call = Call(mask=Causal(), query_positions=seen[:, None], key_positions=cache.positions, step=0)
    return Ready(
        lambda: layer.inner(q, cache.k, cache.v, call), state_bytes((cache.k, cache.v)), keys
    )


def layer_ready(layer: Any, plan: DecodePlan, setting: Setting) -> Ready:
    """One step of a layer after it has read `plan.keys` tokens, or as many as `plan.fill` seconds
    allow.
    """
    state, seen = None, 0
    draw = torch.Generator().manual_seed(1)
    ends = time.perf_counter() + plan.fill
    while seen < plan.keys and (state is None or time.perf_counter() < ends):
        piece = min(PIECE, plan.keys - seen)
        x = torch.randn(setting.batch, piece, setting.dim, generator=draw)
        _, state = layer.step(x, state, Call(mask=Causal()))
        seen += piece
    token = torch.randn(setting.batch, 1, setting.dim, generator=draw)
    return Ready(lambda: layer.step(token, state, Call(mask=Causal())), state_bytes(state), seen)


def clocked(ready: Ready, setting: Setting, pace: Pace) -> dict[str, Any]:
    """Times of a step, with one query over all keys and a read of memory timed in turn."""
    q, k, v = (_heads(setting, n) for n in (1, ready.keys, ready.keys))
    probe, probe_bytes = read_probe()
    own, baseline, reads = interleaved(
        [ready.step, lambda: F.scaled_dot_product_attention(q, k, v), probe], pace
    )
    return {
        "keys": ready.keys,
        "state_bytes": ready.state_bytes,
        "seconds": spread(own),
        "speedup": ratio(baseline, own),
        "tokens_per_second": rate(setting.batch, own),
        "bytes_per_second": rate(ready.state_bytes, own),
        "fraction": rate(ready.state_bytes, own) / rate(probe_bytes, reads),
    }


def _built(spec: Spec, options: dict[str, Any], setting: Setting) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create(spec.name, dim=setting.dim, heads=setting.heads, **options).eval()


def _heads(setting: Setting, tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(setting.batch, setting.heads, tokens, setting.head_dim, generator=draw)


def _new_token(seen: int, setting: Setting) -> Call:
    position = torch.full((setting.batch, 1), seen)
    return Call(mask=Causal(), query_positions=position, key_positions=position)
