"""Pictures for models of timm: one in a folder, or one named as in timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.bench.hub import config_of, library, loading
from regard.bench.showing.exhibit import Exhibit
from regard.bench.showing.pictures import READS, Picture, pictures
from regard.core.errors import ArgumentError
from regard.core.passage import Passage

WHO = "models of timm"
WEIGHTS = "model.safetensors"


def from_folder(folder: Path) -> Exhibit:
    """A model that timm saved: config.json and model.safetensors.

    Raises:
        ArgumentError: no such architecture, or weights that do not fit it.
        UnsupportedError: timm is missing.
    """
    foreign, config = library("timm", WHO), config_of(folder)
    if not (folder / WEIGHTS).is_file():
        raise ArgumentError("MODEL", f"a folder with {WEIGHTS}", folder)
    given = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    with loading(str(folder)), torch.random.fork_rng():
        cfg = config.get("pretrained_cfg")
        model = foreign.create_model(config["architecture"], pretrained_cfg_overlay=cfg, **given)
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / WEIGHTS))
    return _viewer(model)


def named(name: str) -> Exhibit:
    """A model by its name, with its trained weights, which timm fetches.

    Raises:
        ArgumentError: no such model.
        UnsupportedError: timm is missing.
    """
    foreign = library("timm", WHO)
    with loading(name):
        config = foreign.get_pretrained_cfg(name)
        if config is None or not config.hf_hub_id:
            raise ArgumentError("MODEL", "a model of timm with weights on the hub", name)
        safe = {"hf_hub_filename": WEIGHTS}
        return _viewer(foreign.create_model(name, pretrained=True, pretrained_cfg_overlay=safe))


def _viewer(model: Any) -> Exhibit:
    model.eval()
    config = model.pretrained_cfg
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or config["input_size"][-2:]
    grid = getattr(patches, "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", 0)

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        return [
            Passage(
                {"x": _pixels(picture, size, config["mean"], config["std"])},
                grid=grid,
                prefix=prefix if grid else 0,
            )
            for _, picture in pictures(path, examples)
        ]

    return Exhibit(model, READS, show)


def _pixels(picture: Picture, size: Any, mean: Any, std: Any) -> Tensor:
    """A picture as (1,3,h,w) around zero."""
    scaled = picture.resize((int(size[1]), int(size[0])), resample=3)  # bicubic
    plain = torch.from_numpy(np.array(scaled)).float() / 255
    return ((plain - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]
