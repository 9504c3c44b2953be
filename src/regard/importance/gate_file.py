"""Gate files: the block gates of a model as safetensors, the attention modules' paths as names and
what shapes a gate as metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.features.block_gate import BlockGate

FORMAT = "regard block gates 1"


def save_gates(path: str | Path, gates: Mapping[str, BlockGate]) -> None:
    """Write gates, which must share block and poolings."""
    shapes = {(g.block, tuple(g.queries), tuple(g.keys)) for g in gates.values()}
    if len(shapes) != 1:
        raise ArgumentError("gates", "gates of one block length and pooling", sorted(shapes))
    block, queries, keys = shapes.pop()
    tensors = {
        f"{name}.{part}": x.detach().float().contiguous()
        for name, gate in gates.items()
        for part, x in gate.state_dict().items()
    }
    shape = {"block": block, "queries": queries, "keys": keys}
    heads = {name: gate.heads for name, gate in gates.items()}
    save_file(tensors, path, {"format": FORMAT, "gate": json.dumps({**shape, "heads": heads})})


def load_gates(path: str | Path) -> dict[str, BlockGate]:
    """The gates of a file, by module.

    Raises:
        ArgumentError: no such file, or not one of gates.
    """
    try:
        with safe_open(path, "pt") as file:
            noted = file.metadata() or {}
            if noted.get("format") != FORMAT:
                raise ArgumentError("file", FORMAT, noted.get("format"))
            shape = json.loads(noted["gate"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        return {site: _gate(tensors, site, shape) for site in shape["heads"]}
    except (SafetensorError, OSError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ArgumentError("file", "a safetensors file of gates", f"{path} ({error})") from error


def _gate(tensors: Mapping[str, Tensor], site: str, shape: Mapping[str, Any]) -> BlockGate:
    start = f"{site}."
    parts = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
    rows, pooled, width = parts["k_maps"].shape
    maps = "q_maps" in parts
    gate = BlockGate(
        shape["heads"][site],
        pooled // len(shape["keys"]),
        kv_heads=rows if maps else None,
        block=shape["block"],
        width=width,
        queries=shape["queries"],
        keys=shape["keys"],
        map_queries=maps,
    )
    gate.load_state_dict(parts)
    return gate
