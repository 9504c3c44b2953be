r"""Dead features, drawn anew.

A dead feature gets the direction of an input drawn in proportion to the square of its error, and an
encoder of `scale` times the mean norm of the living ones; its bias becomes zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lenses.dictionary import Dictionary


@torch.no_grad()
def redraw(
    dictionary: Dictionary, dead: Tensor, inputs: Tensor, scale: float, source: torch.Generator
) -> Tensor:
    """Give dead features (K,) directions of badly reconstructed inputs (T,H E), at most as many as
    there are; the ones that got one.
    """
    error = (dictionary(inputs).reconstruction - inputs).square().sum(-1).double()
    odds = error.square().cpu()
    count = min(len(dead), int((odds > 0).sum()))
    if not count:
        return dead[:0]
    index = torch.multinomial(odds, count, replacement=False, generator=source)
    chosen = inputs[index.to(inputs.device)] - dictionary.decoder_bias
    direction = chosen / chosen.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    living = torch.ones(dictionary.features, dtype=torch.bool)
    living[dead] = False
    drawn = dead[:count].to(inputs.device)
    norms = dictionary.encoder[:, living.to(inputs.device)].norm(dim=0)
    size = norms.mean() if len(norms) else 1.0
    dictionary.decoder[drawn] = direction
    dictionary.encoder[:, drawn] = direction.mT * size * scale
    dictionary.encoder_bias[drawn] = 0.0
    return drawn
