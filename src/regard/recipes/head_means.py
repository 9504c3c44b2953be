"""Head means: what each head gives on average over texts, as a file for `mean_ablation`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from regard.core.errors import ArgumentError
from regard.core.outputs import Averaged
from regard.core.scene import Scene


@torch.no_grad()
def head_means(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Mean output (H,E), in float32, of every self-attention module's heads over the real tokens of
    batches, each the keyword arguments of one forward.

    Raises:
        ArgumentError: there is no batch.
    """
    watch, scene = Averaged(), Scene.of(model, ())
    with scene.treated(watch, *scene.own):
        for batch in batches:
            model(**batch)
    if not watch.sums:
        raise ArgumentError("batches", "one batch or more", 0)
    return {name: x.float().cpu() for name, x in watch.means().items()}


def save_head_means(model: Any, batches: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write `head_means` as safetensors."""
    path = Path(path)
    save_file({n: x.contiguous() for n, x in head_means(model, batches).items()}, path)
    return path
