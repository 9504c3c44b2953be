"""Layers that treat heads unequally: gates, routers, and caches of unequal keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.core.state import state_bytes
from regard.layers.attention import Attention
from regard.layers.moh import HeadGates, MoH
from regard.layers.moh_llama import MoHLlama
from regard.layers.sigma import Sigma, selective_values
from regard.operators.softmax import softmax


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def noted(module: nn.Module, x: Tensor, **fields: Any) -> dict[str, list[Any]]:
    notes: dict[str, list[Any]] = {}
    module(x, Call(notes=notes, **fields))
    return notes


@pytest.mark.parametrize(("shared", "active"), [(0, 3), (1, 2), (2, 2), (6, 0), (2, 4)])
def test_gates_of_a_token_share_out_all_heads_in_use(shared: int, active: int) -> None:
    gates = HeadGates(16, 6, shared, active).double()
    x = draw(2, 5, 16)
    found = gates(x, Call())
    assert found.shape == (2, 5, 6)
    assert ((found[..., shared:] > 0).sum(-1) == active).all()
    both = shared and active
    mix = 2 * gates.mix(x).softmax(-1) if both else torch.ones(2, 5, 2).double()
    torch.testing.assert_close(found.sum(-1), mix[..., 0] * shared + mix[..., 1] * active)


def test_routed_heads_may_change_places() -> None:
    layer, x = MoH(16, 4, shared=1, active=2).double(), draw(2, 5, 16)
    expected, order = layer(x), torch.tensor([0, 3, 1, 2])
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection.weight.copy_(projection.weight.unflatten(0, (4, 4))[order].flatten(0, 1))
        o = layer.o_proj.weight
        o.copy_(o.unflatten(1, (4, 4))[:, order].flatten(1, 2))
        layer.gates.route.weight.copy_(layer.gates.route.weight[order[1:] - 1])
    torch.testing.assert_close(layer(x), expected)


def test_balance_loss_counts_real_tokens_and_is_k_at_balance() -> None:
    layer, x = MoH(16, 4, shared=1, active=2).double(), draw(2, 5, 16)
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[:, 3:] = False
    cut = noted(layer, x[:, :3])["balance_loss"][0]
    torch.testing.assert_close(noted(layer, x, padding=padding)["balance_loss"][0], cut)
    nn.init.zeros_(layer.gates.route.weight)
    torch.testing.assert_close(noted(layer, x)["balance_loss"][0].item(), 2.0)


@pytest.mark.parametrize(("shared", "active"), [(5, 0), (-1, 2), (2, 0), (2, 3), (4, 1)])
def test_impossible_head_counts_are_refused(shared: int, active: int) -> None:
    with pytest.raises(ArgumentError):
        MoH(16, 4, shared=shared, active=active)


def test_query_norms_choose_heads_and_learn_straight_through() -> None:
    layer, x = MoHLlama(16, 4, shared=1, active=1).double(), draw(2, 5, 16)
    gates = noted(layer, x)["gates"][0]
    norms = layer.q_proj(x).unflatten(-1, (4, 4)).norm(dim=-1)[..., 1:]
    expected = nn.functional.one_hot(norms.argmax(-1), 3)
    assert torch.equal(gates, torch.cat([torch.ones(2, 5, 1), expected], -1).double())
    gradients = []
    for training in (False, True):
        layer.train(training)
        assert torch.equal(noted(layer, x)["gates"][0], gates)
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(layer.q_proj.weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("rope", [None, "half", "pairs"])
@pytest.mark.parametrize("cached", [8, 4, 3])
def test_sigma_decodes_from_a_cache_of_the_size_it_promises(rope: Any, cached: int) -> None:
    options = {"key_heads": 1, "value_heads": 2, "value_dim": 6, "cached_key_dim": cached}
    layer = Sigma(32, 4, rope=rope, query_hidden=12, value_rows=50, **options).double()
    x = draw(2, 9, 32)
    full, state, outputs, sizes = layer(x, Call(mask=Causal())), None, [], []
    for t in range(9):
        y, state = layer.step(x[:, t : t + 1], state)
        outputs.append(y)
        sizes.append(state_bytes(state))
    torch.testing.assert_close(torch.cat(outputs, 1), full)
    bookkeeping = 8 + 1  # a position and a flag per token
    assert sizes[-1] - sizes[-2] == 2 * ((1 * cached + 2 * 6) * 8 + bookkeeping)


def test_selective_values_keep_the_largest_weights_as_they_are() -> None:
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 9, 8), torch.eye(9).double().expand(2, 2, 9, 9)
    weights = softmax(q, k, v, Call()).output
    kept = selective_values(q, k, v, Call(), 3).output
    top = weights.topk(3, -1)
    torch.testing.assert_close(kept, torch.zeros_like(weights).scatter(-1, top.indices, top.values))
    torch.testing.assert_close(selective_values(q, k, v, Call(), 9).output, weights)


def test_a_neighborhood_decodes_behind_prefix_tokens() -> None:
    layer = Attention(16, 4, "neighborhood", {"kernel": 3}).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    call = Call(mask=Causal(), prefix=2)
    state, rows = None, []
    for t in range(9):
        out, state = layer.step(x[:, t : t + 1], state, call)
        rows.append(out)
    torch.testing.assert_close(torch.cat(rows, 1), layer(x, call))
    assert state is not None
    assert state.inner.k.shape[2] == 2 + 2, "the prefix and what the window still reaches"
