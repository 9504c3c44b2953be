"""Noise: the inputs of a diffusion model somewhere between noise and picture, by the names its
forward gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.errors import UnsupportedError

WHO = "diffusion models"
STEPS = 1000
"""Times from picture (0) to noise."""
TEXT = 77
"""Tokens of a text that random states stand for."""
WIDTHS = ("cross_attention_dim", "joint_attention_dim", "caption_channels")
"""What configurations call the width of a text's states."""
TIMES = 6
"""Numbers beside the text in some models: sizes and crops of the picture."""
Draw = Callable[..., Tensor]


def noise_inputs(model: Any, config: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """Inputs of passage `index` of `count`, at times that stand at equal distances.

    Raises:
        UnsupportedError: the model wants an input that is not known here.
    """
    source = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=source).to(model.dtype)

    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in MAKERS:
            made = MAKERS[name](config, draw)
            found.update({} if made is None else {name: made})
        elif name == "timestep":
            found[name] = torch.tensor([int(STEPS * (index + 0.5) / count)])
        elif parameter.default is parameter.empty:
            raise UnsupportedError(WHO, f"{type(model).__name__} wants {name}, not known here")
    return found


def sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents.

    Raises:
        UnsupportedError: the configuration does not say.
    """
    size = config.get("sample_size")
    if size is None:
        raise UnsupportedError(WHO, "its configuration has no sample_size")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def width_of_text(config: Mapping[str, Any]) -> int | None:
    """The width of a text's states; None: it reads no text."""
    for name in WIDTHS:
        found = config.get(name)
        found = found[0] if isinstance(found, list | tuple) else found
        if isinstance(found, int):
            return found
    return None


def _latents(config: Mapping[str, Any], draw: Draw) -> Tensor:
    return draw(int(config["in_channels"]), *sides(config))


def _states(config: Mapping[str, Any], draw: Draw) -> Tensor | None:
    width = width_of_text(config)
    return None if width is None else draw(TEXT, width)


def _pooled(config: Mapping[str, Any], draw: Draw) -> Tensor | None:
    width = config.get("pooled_projection_dim")
    return None if width is None else draw(int(width))


def _class(config: Mapping[str, Any], draw: Draw) -> Tensor | None:
    classed = config.get("num_class_embeds") or config.get("norm_type") == "ada_norm_zero"
    return torch.zeros(1, dtype=torch.long) if classed else None


def _added(config: Mapping[str, Any], draw: Draw) -> dict[str, Any] | None:
    if config.get("addition_embed_type") == "text_time":
        times = TIMES * int(config["addition_time_embed_dim"])
        text = int(config["projection_class_embeddings_input_dim"]) - times
        return {"text_embeds": draw(text), "time_ids": draw(TIMES)}
    return {"resolution": None, "aspect_ratio": None} if config.get("caption_channels") else None


MAKERS: Mapping[str, Callable[[Mapping[str, Any], Draw], Any]] = {
    "sample": _latents,
    "hidden_states": _latents,
    "encoder_hidden_states": _states,
    "pooled_projections": _pooled,
    "class_labels": _class,
    "added_cond_kwargs": _added,
}
"""Inputs that a configuration says how to make."""
