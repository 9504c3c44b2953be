"""Speech: .wav files read by the standard library, or chirps made on the spot."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.bench.hub import library
from regard.bench.showing.exhibit import Exhibit, files_in
from regard.bench.showing.text import start_of
from regard.core.errors import ArgumentError
from regard.core.passage import Passage

READS = "a .wav file, or a folder of them"
SECONDS = 2.0
"""Of a chirp."""
LOWEST, OCTAVES = 110.0, 5.0
"""Where a chirp's pitch begins, in Hz, and how far it rises."""


def listener(model: Any, extractor: Any, tokenizer: Any | None) -> Exhibit:
    """A model of speech. tokenizer: of its decoder, if it has one."""

    def show(path: Path | None, examples: int, length: int) -> list[Passage]:
        rate = int(extractor.sampling_rate)
        sounds = chirps(rate, examples) if path is None else recordings(path, rate, examples)
        return [_heard(model, extractor, tokenizer, sound, length) for sound in sounds]

    return Exhibit(model, READS, show)


def _heard(model: Any, extractor: Any, tokenizer: Any, sound: Tensor, length: int) -> Passage:
    features = extractor(sound.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    inputs = {
        name: x.to(model.dtype) for name, x in dict(features).items() if x.is_floating_point()
    }
    if tokenizer is None:
        return Passage(inputs)
    ids = transcript(model, inputs, length)
    words = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    return Passage({**inputs, "decoder_input_ids": ids}, ids, words)


def transcript(model: Any, inputs: dict[str, Any], length: int) -> Tensor:
    """What the model itself says, ids (1,T) of at least two and at most `length` tokens; fewer than
    its encoder's frames, so that no one takes the one for the other.
    """
    names = ("max_target_positions", "max_source_positions")
    limits = [getattr(model.config, name, None) for name in names]
    most = min(length, *(x - 1 for x in limits if isinstance(x, int)))
    generation = library().GenerationMixin
    start = torch.tensor([[start_of(model)]])
    said = generation.generate(
        model,
        **inputs,
        decoder_input_ids=start,
        do_sample=False,
        num_beams=1,
        min_new_tokens=1,
        max_new_tokens=max(1, most - 1),
    )
    return said


def chirps(rate: int, count: int) -> list[Tensor]:
    """Tones that rise evenly by octaves, each from a higher pitch than the one before."""
    time = torch.arange(int(rate * SECONDS), dtype=torch.float64) / rate
    found = []
    for index in range(count):
        low = LOWEST * 2 ** (index / count)
        slope = OCTAVES * math.log(2) / SECONDS
        found.append((0.5 * torch.sin(2 * math.pi * low * (slope * time).expm1() / slope)).float())
    return found


def recordings(path: Path, rate: int, count: int) -> list[Tensor]:
    """`count` recordings (samples,) in [-1, 1] at `rate`: of a folder, or parts of one file.

    Raises:
        ArgumentError: no .wav files, too few, too short, or not of whole-number samples.
    """
    sounds = [_recording(file, rate) for file in files_in(path, (".wav",), READS, count)]
    if path.is_file():
        sounds = list(sounds[0].tensor_split(count))
    if not all(len(sound) for sound in sounds):
        raise ArgumentError("data", "recordings that are not empty", path)
    return sounds


def _recording(file: Path, rate: int) -> Tensor:
    try:
        with wave.open(str(file)) as sound:
            width, channels, own = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            raw = bytearray(sound.readframes(sound.getnframes()))
    except (OSError, EOFError, wave.Error) as error:
        raise ArgumentError("data", f"a .wav file of plain samples ({error})", file) from error
    del raw[len(raw) - len(raw) % (width * channels) :]
    if not raw:
        raise ArgumentError("data", "a recording that is not empty", file)
    parts = torch.frombuffer(raw, dtype=torch.uint8).view(-1, channels, width).long()
    value = (parts << (8 * torch.arange(width))).sum(-1)
    most = 1 << (8 * width - 1)
    value = value - most if width == 1 else torch.where(value >= most, value - 2 * most, value)
    return resampled((value.double() / most).mean(1), own, rate)


def resampled(sound: Tensor, own: int, rate: int) -> Tensor:
    """Samples (n,) taken `own` times a second, as if taken `rate` times: what is higher than either
    rate can carry is left out.
    """
    count = round(len(sound) * rate / own)
    if own == rate or not count:
        return sound.float()[:count]
    spectrum = torch.fft.rfft(sound)[: count // 2 + 1]
    return (torch.fft.irfft(spectrum, count) * count / len(sound)).float()
