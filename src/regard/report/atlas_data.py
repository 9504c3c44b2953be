"""What the page of an atlas holds for its script: all numbers, compactly, and no markup.

Matrices are base64 of little-endian float32 (layers, heads), profiles too, long ones averaged over
steps of positions; weights of examples are whole numbers of 1/10000, words places in one list.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from regard.atlases.example import Example
from regard.atlases.record import Atlas
from regard.core.catalog import probe_cards
from regard.report.head_types import head_types
from regard.report.towers import Tower

POINTS = 100_000
"""Points of one profile over all heads of a page; longer profiles are averaged."""
SHOWN = 160_000
"""Keys in all examples of a page, about; beyond, each head shows fewer examples."""


def script_json(value: object) -> Markup:
    """JSON that may stand in a script element: no character in it begins or ends a tag."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def plain_atlas(atlas: Atlas, towers: Sequence[Tower]) -> dict[str, Any]:
    """An atlas as its page holds it."""
    words: dict[str, int] = {}
    kept, left = bounded(atlas.examples)
    found = [_tower(atlas, tower) for tower in towers]
    places = {tower.name: plain["examples"] for tower, plain in zip(towers, found, strict=True)}
    for example in kept:
        if example.tower in places:
            place = f"{example.layer}.{example.head}"
            places[example.tower].setdefault(place, []).append(_example(example, words))
    return {"model": atlas.model, "towers": found, "words": list(words), "left": left}


def bounded(examples: Sequence[Example], shown: int = SHOWN) -> tuple[list[Example], int]:
    """As many examples of every head as fit on a page, the strongest first, and how many did not
    fit.
    """
    grouped: dict[tuple[str, int, int], list[Example]] = {}
    for example in examples:
        grouped.setdefault((example.tower, example.layer, example.head), []).append(example)
    most = max((len(group) for group in grouped.values()), default=0)
    kept: list[Example] = []
    for rank in range(most):
        for group in grouped.values():
            if rank < len(group):
                shown -= sum(len(span.weights) for span in group[rank].spans)
                if shown < 0:
                    return kept, len(examples) - len(kept)
                kept.append(group[rank])
    return kept, 0


def _tower(atlas: Atlas, tower: Tower) -> dict[str, Any]:
    kinds: dict[str, list[str]] = {}
    for kind in head_types(tower):
        for layer, head in kind.heads:
            kinds.setdefault(f"{layer}.{head}", []).append(kind.rule.name)
    return {
        "name": tower.name,
        "layers": tower.layers,
        "heads": tower.heads,
        "there": _base64(tower.there, "u1"),
        "values": {name: _base64(x, "<f4") for name, x in tower.values.items()},
        "counts": {name: _counts(x) for name, x in tower.counts.items()},
        "profiles": _profiles(atlas, tower),
        "types": kinds,
        "examples": {},
    }


def _base64(values: NDArray[Any], kind: str) -> str:
    return b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


def _counts(counts: NDArray[np.int64]) -> int | list[int]:
    """Sequences behind each head's number: one number where all have the same."""
    found = np.unique(counts[counts >= 0]).tolist()
    return found[0] if len(found) == 1 else counts.clip(0).ravel().tolist()


def _profiles(atlas: Atlas, tower: Tower) -> list[dict[str, Any]]:
    """The profiles of a tower, averaged over steps where they are long."""
    meanings = {name: text for c in probe_cards().values() for name, text in c.profiles.items()}
    found = []
    for key, tensor in atlas.profiles.items():
        owner, _, name = key.rpartition("/")
        if owner != tower.name or tensor.ndim != 3 or not tensor.shape[2]:
            continue
        values = tensor.detach().float().cpu().numpy()
        layers, heads, length = values.shape
        step = -(-length // max(16, min(256, POINTS // max(1, layers * heads))))
        padded = np.pad(values, ((0, 0), (0, 0), (0, -length % step)), constant_values=np.nan)
        blocks = padded.reshape(layers, heads, -1, step)
        counted = np.maximum((~np.isnan(blocks)).sum(-1), 1)
        means = np.nansum(blocks, -1) / counted
        found.append(
            {
                "name": name,
                "meaning": meanings.get(name, ""),
                "length": length,
                "step": step,
                "heads": heads,
                "points": _base64(means, "<f4"),
            }
        )
    return found


def _example(example: Example, words: dict[str, int]) -> dict[str, Any]:
    def numbered(word: str) -> int:
        return words.setdefault(word, len(words))

    spans = [
        [
            span.start,
            [] if example.grid else [numbered(word) for word in span.words],
            [round(10_000 * weight) for weight in span.weights],
        ]
        for span in example.spans
    ]
    found = {"passage": example.passage, "query": example.query, "word": numbered(example.word)}
    return {**found, "spans": spans, **({"grid": example.grid} if example.grid else {})}
