"""A forward's cache under a plan: our layers put in, and a report of what they hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    QuantizedCache,
)

from regard.core.errors import ArgumentError, UnsupportedError
from regard.hosts.transformers.cache import AbsentLayer, KeptLayer


def prepare(owner: Any, treated: Mapping[int, str], model: Any, kwargs: dict[str, Any]) -> Any:
    """The cache of a forward, with our layers where the plan acts; None without a cache.

    treated: cache layer -> "kept" or "absent". kwargs: of the forward; gets the cache if the model
    would have made one.

    Raises:
        ArgumentError: a cache that was filled without the plan, or one of fixed shape.
    """
    cache = kwargs.get("past_key_values")
    config = model.config
    wants = kwargs.get("use_cache")
    wants = getattr(config, "use_cache", False) if wants is None else wants
    if not treated:
        return None
    if cache is None:
        takes = "past_key_values" in inspect.signature(model.forward).parameters
        if not takes or not wants or (model.training and torch.is_grad_enabled()):
            return None
        cache = DynamicCache(config=config)
        if getattr(config, "is_encoder_decoder", False):
            cache = EncoderDecoderCache(cache, DynamicCache())
        kwargs["past_key_values"] = cache
    inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    _adopt(owner, treated, inner, config)
    return inner


def _adopt(owner: Any, treated: Mapping[int, str], cache: Any, config: Any) -> None:
    if _owned(owner, cache):
        return
    if cache.is_compileable or not isinstance(cache, DynamicCache):
        raise ArgumentError(
            "past_key_values", "a DynamicCache (a plan changes its size)", type(cache).__name__
        )
    if cache.get_seq_length() > 0:
        raise ArgumentError(
            "past_key_values",
            "an empty cache, or one filled under this plan",
            f"{cache.get_seq_length()} tokens from before the plan",
        )
    _fill(cache, max(treated) + 1, config)
    for index, options in owner.storage.items():
        cache.layers[index] = _quantised(options, config, index)
    for index, kind in treated.items():
        if kind == "kept":
            cache.layers[index] = KeptLayer(cache.layers[index], owner)
    for index, kind in treated.items():
        if kind == "absent":
            like = _neighbour(index, treated, cache.layers)
            cache.layers[index] = AbsentLayer(like, owner)


def _fill(cache: Any, count: int, config: Any) -> None:
    """Make the layers of a cache that would have made them one by one."""
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    cache.layers += [DynamicLayer() for _ in range(count - len(cache.layers))]


def _quantised(options: Mapping[str, Any], config: Any, index: int) -> Any:
    """One of the library's own quantised cache layers."""
    names = {"bits": "nbits", "group_size": "q_group_size", "residual": "residual_length"}
    given = {names.get(name, name): value for name, value in options.items()}
    try:
        return QuantizedCache(config=config, **given).layers[index]
    except (ValueError, ImportError) as error:
        raise UnsupportedError("storage", str(error)) from error


def _owned(owner: Any, cache: Any) -> bool:
    """Whether the cache is already this run's; one of another run is refused."""
    owned = [layer for layer in cache.layers if isinstance(layer, KeptLayer | AbsentLayer)]
    if any(layer.owner is not owner for layer in owned):
        raise ArgumentError("past_key_values", "a cache made under this plan", "one of another")
    return bool(owned)


def _neighbour(index: int, treated: Mapping[int, str], layers: list[Any]) -> Any:
    """The nearest layer of the same kind that is still there."""
    sliding = bool(getattr(layers[index], "is_sliding", False))
    there = [i for i in range(len(layers)) if treated.get(i) != "absent"]
    same = [i for i in there if bool(getattr(layers[i], "is_sliding", False)) == sliding]
    if not there:
        raise UnsupportedError("plan", "it leaves no attention layer in the model")
    return layers[min(same or there, key=lambda i: abs(i - index))]


def report(cache: Any) -> dict[str, Any]:
    """What a cache holds: per layer the key heads, keys and bytes of each bucket; in all the bytes,
    those a dense cache of the same tokens would hold, the budget (fraction kept) and the
    compression ratio (fraction removed).
    """
    layers, held, dense = [], 0, 0
    for index, layer in enumerate([] if cache is None else cache.layers):
        if isinstance(layer, AbsentLayer):
            layers.append({"layer": index, "buckets": [], "seen": layer.get_seq_length()})
            dense += _held(layer.like)[1]
            continue
        buckets, full = _held(layer)
        held += sum(b["bytes"] for b in buckets)
        dense += full
        layers.append({"layer": index, "buckets": buckets, "seen": layer.get_seq_length()})
    budget = held / dense if dense else 1.0
    return {
        "layers": layers,
        "bytes": held,
        "dense_bytes": dense,
        "budget": budget,
        "compression_ratio": 1 - budget,
    }


def _held(layer: Any) -> tuple[list[dict[str, Any]], int]:
    """The buckets of a layer, and the bytes of a dense one of its shape."""
    kept = layer if isinstance(layer, KeptLayer) else KeptLayer(layer, None)
    buckets = [
        {"heads": list(heads), "keys": keys, "bytes": size} for heads, keys, size in kept.held
    ]
    if kept.memory.buckets is None:
        return buckets, kept.dense_bytes or sum(b["bytes"] for b in buckets)
    dense = 0
    for b in kept.memory.buckets:
        row = b.k.shape[-1] * b.k.element_size() + b.v.shape[-1] * b.v.element_size()
        dense += b.k.shape[0] * b.k.shape[1] * kept.seen * row
    return buckets, dense
