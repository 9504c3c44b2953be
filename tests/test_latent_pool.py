"""Learned pooling of hidden states into one vector."""

from __future__ import annotations

import pytest
import torch

from regard.core.errors import ArgumentError
from regard.features.latent_pool import LatentPool, layer_means
from regard.testing.compare import close


def pool(layers: int = 0) -> LatentPool:
    return LatentPool(12, latents=5, heads=2, head_dim=3, layers=layers).double().eval()


def test_vectors_have_unit_norm() -> None:
    y = pool()(torch.randn(3, 7, 12).double())
    assert y.shape == (3, 12)
    close(y.norm(dim=-1), torch.ones(3).double(), "norm", 1e-12)


def test_padding_never_matters() -> None:
    own, x = pool(), torch.randn(2, 7, 12).double()
    real = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    x[1, :3] = torch.nan
    close(own(x, real)[1:], own(x[1:, 3:]), "padded", 1e-12)


def test_layers_may_change_places_with_their_embeddings() -> None:
    own, x = pool(layers=6), torch.randn(2, 6, 12).double()
    before, order = own(x), torch.tensor([3, 1, 5, 0, 2, 4])
    assert own.place is not None
    with torch.no_grad():
        own.place.weight.copy_(own.place.weight[order])
    close(own(x[:, order]), before, "permuted", 1e-12)


def test_one_vector_is_its_own_mean() -> None:
    """With one token the weights are one, so what is asked does not matter to what is read."""
    own, x = pool(), torch.randn(2, 1, 12).double()
    before = own(x)
    with torch.no_grad():
        own.q.weight.mul_(3.0)
    close(own(x), before, "one token", 1e-12)


def test_layer_means_leave_padding_out() -> None:
    states = [torch.randn(2, 5, 4) for _ in range(3)]
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    for x in states:
        x[1, 2:] = torch.nan
    found = layer_means(states, real)
    assert found.shape == (2, 3, 4)
    close(found[1], torch.stack([x[1, :2].mean(0) for x in states]), "means", 1e-6)
    close(layer_means([x[:1] for x in states]), found[:1], "no padding", 1e-6)


def test_gradients_reach_every_parameter() -> None:
    own = pool(layers=4)
    own(torch.randn(2, 4, 12).double()).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in own.parameters())


def test_bad_shapes() -> None:
    with pytest.raises(ArgumentError, match="layers"):
        pool(layers=3)(torch.randn(2, 4, 12).double())
    with pytest.raises(ArgumentError, match="x"):
        pool()(torch.randn(2, 4, 11).double())
    with pytest.raises(ArgumentError, match="padding"):
        pool()(torch.randn(2, 4, 12).double(), torch.ones(2, 3, dtype=torch.bool))
