"""Forced decoding: what an encoder with a decoder predicts of a text that was said, when its source
is another.

    spoken = Spoken.of(passage, row, model.config)
    occlusion(spoken.predict(model), spoken.source, masks, fill=spoken.fill)

One sequence at a time, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.passage import Passage
from regard.core.predictions import logits_of

FEATURES, IDS, SAID = "input_features", "input_ids", "decoder_input_ids"
BINS = ("num_mel_bins", "input_feat_per_channel")
"""What configurations call the number of a spectrogram's bins."""
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Spoken:
    """A source and what was said of it. source: a spectrogram (T,F), or ids (T,). ids: of the
    decoder, (1,I). turned: whether the model takes spectrograms as (B,F,T). fill: what stands where
    nothing is.
    """

    source: Tensor
    ids: Tensor
    turned: bool = False
    fill: float = 0.0

    @classmethod
    def of(cls, passage: Passage, row: int, config: Any) -> Spoken:
        """A sequence of a passage.

        Raises:
            UnsupportedError: its encoder reads neither a spectrogram nor ids, its decoder no ids.
        """
        given = passage.inputs
        ids = _real(said_of(passage), given.get("decoder_attention_mask"), row)
        mask = given.get("attention_mask")
        if FEATURES in given:
            x = given[FEATURES]
            bins = next((getattr(config, n) for n in BINS if hasattr(config, n)), min(x.shape[1:]))
            turned = x.shape[1] == bins
            return cls(_real(x.mT if turned else x, mask, row)[0], ids, turned)
        if IDS not in given:
            lacks = f"the encoder reads neither {FEATURES} nor {IDS}"
            raise UnsupportedError("forced decoding", lacks)
        blank = getattr(config, "pad_token_id", None) or 0
        return cls(_real(given[IDS], mask, row)[0], ids, fill=blank)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The forward of this sequence."""
        return {**self.given(self.source[None]), SAID: self.ids}

    def given(self, x: Tensor) -> dict[str, Tensor]:
        """Sources (n,…) as the encoder's inputs."""
        if not x.is_floating_point():
            return {IDS: x}
        return {FEATURES: x.mT if self.turned else x}

    def predict(self, model: Any) -> Predict:
        """Log-probabilities (n,I,V) of sources (n,…)."""
        return lambda x: _logs(model(**self.given(x), **self._said(len(x))))

    def answer(self, model: Any) -> Predict:
        """Log-probabilities (n,I,V) of what an encoder might give, (n,T',C)."""
        return lambda x: _logs(model(encoder_outputs=(x,), **self._said(len(x))))

    def encoded(self, model: Any) -> Tensor:
        """What the encoder gives, (T',C)."""
        return model.get_encoder()(**self.given(self.source[None]))[0][0]

    def _said(self, count: int) -> dict[str, Tensor]:
        return {SAID: self.ids.expand(count, -1)}


def said_of(passage: Passage) -> Tensor:
    """The decoder's ids, (B,I).

    Raises:
        UnsupportedError: it has none.
    """
    ids = passage.inputs.get(SAID)
    if not isinstance(ids, Tensor):
        raise UnsupportedError("forced decoding", f"the passages have no {SAID}")
    return ids


def _real(x: Tensor, mask: Any, row: int) -> Tensor:
    """One row of x (B,T,…), its real steps by a mask (B,T) of such length: (1,t,…)."""
    if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
        return x[row, mask[row].bool()][None]
    return x[row][None]


def _logs(output: Any) -> Tensor:
    return logits_of(output).float().log_softmax(-1)
