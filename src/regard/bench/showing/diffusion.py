"""Denoisers of diffusers: latents of random numbers, and prompts where a pipeline's text encoder is
at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.bench.hub import config_of, fetching, library, loading, quiet
from regard.bench.showing.exhibit import Exhibit
from regard.bench.showing.noise import WHO, noise_inputs, sides, width_of_text
from regard.core.errors import ArgumentError
from regard.core.passage import Passage

DENOISERS = ("unet", "transformer")
READS = "a text file of prompts, one per line"
RANDOM = "latents are random numbers, and so is what stands for a prompt unless --data gives some"
Encode = Callable[[str], Tensor]


def from_folder(folder: Path) -> Exhibit:
    """The denoiser of a pipeline's folder, or a model in a folder of its own.

    Raises:
        ArgumentError: no denoiser there, or one that cannot be loaded.
        UnsupportedError: diffusers is missing.
    """
    index = config_of(folder, "model_index.json")
    if index:
        return _of_pipeline(str(folder), index)
    return _exhibit(_loaded(str(folder), config_of(folder)["_class_name"]), lambda: None)


def named(name: str) -> Exhibit:
    """The denoiser of a pipeline on the hub; errors as `from_folder`."""
    foreign = library("diffusers", WHO)
    with loading(name):
        index = foreign.DiffusionPipeline.load_config(name)
    return _of_pipeline(name, index)


def _of_pipeline(name: str, index: Mapping[str, Any]) -> Exhibit:
    part = next((entry for entry in DENOISERS if entry in index), None)
    if part is None:
        raise ArgumentError("MODEL", f"a pipeline with one of {', '.join(DENOISERS)}", name)
    model = _loaded(name, index[part][1], part)
    written = "text_encoder" in index and "tokenizer" in index
    return _exhibit(model, lambda: _encoder(name, model) if written else None)


def _loaded(name: str, kind: str, part: str | None = None) -> Any:
    foreign = library("diffusers", WHO)
    found = getattr(foreign, kind, None)
    if not (isinstance(found, type) and issubclass(found, foreign.ModelMixin)):
        raise ArgumentError("MODEL", "a model of diffusers' own", kind)
    where = {} if part is None else {"subfolder": part}
    local = Path(name).is_dir()
    with loading(name), quiet(foreign, local):
        model = found.from_pretrained(name, use_safetensors=True, local_files_only=local, **where)
    return model.eval()


def _encoder(name: str, model: Any) -> Encode | None:
    """What turns a prompt into states (1,T,C) for this denoiser; None: the encoder's are of another
    width, so that the pipeline does more with them.
    """
    foreign, options = library("transformers", WHO), fetching(name)
    with loading(name), quiet(foreign, Path(name).is_dir()):
        tokenizer = foreign.AutoTokenizer.from_pretrained(name, subfolder="tokenizer", **options)
        config = foreign.AutoConfig.from_pretrained(name, subfolder="text_encoder", **options)
        kind = getattr(foreign, (config.architectures or ["?"])[0], None)
        if kind is None or config.hidden_size != width_of_text(model.config):
            return None
        encoder = kind.from_pretrained(
            name, subfolder="text_encoder", use_safetensors=True, **options
        ).eval()

    def encode(prompt: str) -> Tensor:
        most = config.max_position_embeddings
        given = {"padding": "max_length", "truncation": True, "max_length": most}
        ids = tokenizer(prompt, return_tensors="pt", **given).input_ids
        with torch.no_grad():
            return encoder(ids)[0].to(model.dtype)

    return encode


def _exhibit(model: Any, encoder: Callable[[], Encode | None]) -> Exhibit:
    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        encode = None if path is None else encoder()
        prompts = [None] * examples if path is None else _prompts(path, encode, examples)
        height, width = sides(model.config)
        patch = int(model.config.get("patch_size") or 1)
        grid = (height // patch, width // patch)
        found = []
        for index, prompt in enumerate(prompts):
            inputs = noise_inputs(model, model.config, index, examples)
            if prompt is not None and encode is not None:
                inputs["encoder_hidden_states"] = encode(prompt)
            found.append(Passage(inputs, grid=grid))
        return found

    return Exhibit(model, READS, show, (RANDOM,))


def _prompts(path: Path, encode: Encode | None, count: int) -> list[str]:
    """The first `count` lines of a file that are not empty.

    Raises:
        ArgumentError: no text file, too few lines, or nothing that encodes them.
    """
    if encode is None:
        raise ArgumentError("data", "none, for a denoiser without its text encoder", path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("data", f"{READS} ({error})", path) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < count:
        raise ArgumentError("examples", f"at most {len(lines)}, which {path} holds", count)
    return lines[:count]
