"""Opening a model by what it is: one of transformers, of timm or of diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from regard.bench.hub import config_of, fetching, library, loading, quiet
from regard.bench.showing import diffusion, timm
from regard.bench.showing.exhibit import Exhibit
from regard.bench.showing.speech import listener
from regard.bench.showing.text import reader, translator
from regard.bench.showing.vision import matcher, viewer
from regard.bench.showing.vision_language import image_token, spectator
from regard.bench.subject import POCKET, Subject, load
from regard.core.errors import ArgumentError, UnsupportedError

HUB = {"timm:": timm.named, "diffusers:": diffusion.named}
"""How a name on a hub says whose it is; without one it is of transformers."""


def open_model(name: str) -> Exhibit:
    """The model of that name, in evaluation mode, with what makes passages for it: "pocket", a
    folder that transformers, timm or diffusers saved, a name on the hub for transformers, or
    timm:NAME and diffusers:NAME. Only safetensors are read and no code that comes with a model is
    run.

    Raises:
        ArgumentError: no such model, or one that cannot be loaded.
        UnsupportedError: its library is missing, or it reads what is not known here.
    """
    if name == POCKET:
        return reader(load(POCKET))
    for prefix, found in HUB.items():
        if name.startswith(prefix):
            return found(name.removeprefix(prefix))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _of_transformers(name)
    config = config_of(folder)
    if config_of(folder, "model_index.json") or "_class_name" in config:
        return diffusion.from_folder(folder)
    if "architecture" in config:
        return timm.from_folder(folder)
    if "model_type" not in config:
        raise ArgumentError("MODEL", "a folder of transformers, timm or diffusers", name)
    return _of_transformers(str(folder))


def _of_transformers(name: str) -> Exhibit:
    """A model of transformers, of the class its configuration names, by what its forward takes."""
    foreign = library()
    with loading(name), quiet(foreign, Path(name).is_dir()):
        config = foreign.AutoConfig.from_pretrained(name, **fetching(name))
        model = _kind(foreign, config).from_pretrained(
            name, dtype="auto", use_safetensors=True, **fetching(name)
        )
        return _by_inputs(name, model.eval(), foreign)


def _kind(foreign: Any, config: Any) -> Any:
    named = (config.architectures or ["AutoModel"])[0]
    kind = getattr(foreign, named, None)
    if kind is None:
        raise ArgumentError("MODEL", "a class of transformers' own", named)
    return kind


def _by_inputs(name: str, model: Any, foreign: Any) -> Exhibit:
    taken, options = set(inspect.signature(model.forward).parameters), fetching(name)

    def part(kind: str) -> Any:
        return getattr(foreign, kind).from_pretrained(name, **options)

    sees, reads = "pixel_values" in taken, "input_ids" in taken
    hears, writes = bool(taken & {"input_features", "input_values"}), "decoder_input_ids" in taken
    if sees and reads and not (hears or writes):
        both = part("AutoImageProcessor"), part("AutoTokenizer")
        return (matcher if image_token(model.config) is None else spectator)(model, *both)
    if sees and not (hears or writes):
        return viewer(model, part("AutoImageProcessor"))
    if hears and not (sees or reads):
        written = part("AutoTokenizer") if writes else None
        return listener(model, part("AutoFeatureExtractor"), written)
    if reads and not (sees or hears):
        subject = Subject(name, model, part("AutoTokenizer"))
        return (translator if writes else reader)(subject)
    lacks = f"{type(model).__name__} reads another mixture of data than is known here"
    raise UnsupportedError("atlas", lacks)
