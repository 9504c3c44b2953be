r"""Rotation of the residual stream: another model with the same outputs, whose weights have fewer
outliers to quantise.

    x <- x Q        W <- W Q where a map reads x, W <- Q^T W where one writes it        Q Q^T = 1

Weights of norms are first moved into the maps that read them, so that the norms commute with Q. Q
is a Hadamard matrix with random signs; what is odd in the width is mixed by a random rotation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.core.hosting import host_of
from regard.core.linears import blocks_of, norm_readers, root_mean_square, weight_of


def random_hadamard(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (C,C) in float64 whose entries are nearly alike in size."""
    random = torch.Generator().manual_seed(seed)
    power = width & -width
    odd = width // power
    drawn = torch.randn(odd, odd, generator=random, dtype=torch.float64)
    found = (
        torch.linalg.qr(drawn).Q.contiguous() if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
    )
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(found) < width:
        found = torch.kron(pair, found)
    signs = torch.randint(0, 2, (width,), generator=random) * 2 - 1
    return signs[:, None] * found


@torch.no_grad()
def rotated(model: Any, seed: int = 0) -> Any:
    """A copy of a model with its stream rotated. Where it shared the embedding with what reads the
    stream out, these are two matrices now.

    Raises:
        UnsupportedError: blocks of unknown parts, or norms other than weight times x over its root
            mean square.
    """
    model = _apart(model)
    embedding = model.get_input_embeddings()
    norm, readout = host_of(model).readout(model)
    turn = random_hadamard(embedding.weight.shape[1], seed).to(embedding.weight.device)
    readers: list[tuple[Any, tuple[nn.Module, ...]]] = [(norm, (readout,))]
    for one in blocks_of(model):
        readers += norm_readers(one)
        for writer in (one.joined, one.back):
            weight_of(writer).copy_(turn.mT @ weight_of(writer).double())
            bias = getattr(writer, "bias", None)
            if bias is not None:
                bias.copy_(bias.double() @ turn)
    for own, maps in readers:
        if not root_mean_square(own, len(turn)):
            raise UnsupportedError("rotation", f"{type(own).__name__} does not commute with it")
        for reader in maps:
            weight_of(reader).copy_((weight_of(reader).double() * own.weight.double()) @ turn)
        own.weight.fill_(1.0)
    embedding.weight.copy_(embedding.weight.double() @ turn)
    return model


def _apart(model: Any) -> Any:
    """A copy of a model in which embedding and readout are two matrices."""
    if not model.config.tie_word_embeddings:
        return copy.deepcopy(model)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        found = type(model)(config)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    found.load_state_dict(state, assign=True)
    return found.to(next(model.parameters()).device).train(model.training)
