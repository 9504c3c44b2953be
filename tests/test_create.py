"""`regard.create`: any mechanism by name, with errors one can act on."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import Call, Causal, Sinks, UnknownNameError, Window


def test_the_readme_example() -> None:
    layer = regard.create("softmax", dim=48, heads=6, kv_heads=2, rope="half")
    x = torch.randn(2, 64, 48)
    call = Call(mask=Causal() & Window(16) | Sinks(4))
    y = layer(x, call)
    first, state = layer.step(x[:, :60], None, call)
    rest = []
    for t in range(60, 64):
        out, state = layer.step(x[:, t : t + 1], state, call)
        rest.append(out)
    torch.testing.assert_close(torch.cat([first, *rest], 1), y, rtol=1e-4, atol=1e-5)
    assert state.inner.k.shape[2] < 64, "keys beyond the window and the sinks were dropped"


def test_wrong_names_suggest_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean softmax"):
        regard.create("sofmax", dim=8, heads=2)


def test_wrong_options_list_the_valid_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean window"):
        regard.create("sliding_window", dim=8, heads=2, windw=3)
    with pytest.raises(UnknownNameError, match=r"known: .*kv_heads"):
        regard.create("softmax", dim=8, heads=2, zzz=3)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"dim": 8, "heads": 3}, "heads"),
        ({"dim": 8, "heads": 0}, "dim, heads"),
        ({"dim": 8, "heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"dim": 12, "heads": 4, "rope": "half"}, "width"),
    ],
)
def test_wrong_sizes_name_the_argument(arguments: dict[str, object], names: str) -> None:
    with pytest.raises(regard.ArgumentError, match=names):
        regard.create("softmax", **arguments)(torch.randn(1, 4, 8 if names != "width" else 12))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", regard.cards())
def test_every_card_is_created_by_name(name: str) -> None:
    entry = regard.card(name)
    example = entry.example
    size = example.grid or (example.length,)
    options = {**example.options, **(example.sized(size) if example.sized else {})}
    layer = regard.create(name, dim=example.dim, heads=example.heads, **options)
    causal = "noncausal self" not in entry.patterns
    call = Call(mask=Causal() if causal else None, grid=example.grid, prefix=example.prefix)
    assert layer(torch.randn(1, example.tokens, example.dim), call).shape == (
        1,
        example.tokens,
        example.dim,
    )


def test_two_continuations_of_one_state_do_not_disturb_each_other() -> None:
    layer = regard.create("softmax", dim=16, heads=2).eval()
    x = torch.randn(1, 12, 16)
    with torch.no_grad():
        _, state = layer.step(x[:, :4], None)
        _, state = layer.step(x[:, 4:5], state)
        left, _ = layer.step(x[:, 5:6], state)
        other, after = layer.step(x[:, 6:7], state)
        again, _ = layer.step(x[:, 5:6], state)
        further, _ = layer.step(x[:, 7:8], after)
        path = torch.cat([x[:, :5], x[:, 6:8]], 1)
        whole = layer(path, Call(mask=Causal()))
    torch.testing.assert_close(left, again, rtol=0, atol=0)
    torch.testing.assert_close(other, whole[:, 5:6])
    torch.testing.assert_close(further, whole[:, 6:7])


def test_a_growing_cache_is_not_copied_for_every_token() -> None:
    layer = regard.create("softmax", dim=16, heads=2).eval()
    state, rooms = None, set()
    with torch.no_grad():
        for _ in range(64):
            _, state = layer.step(torch.randn(1, 1, 16), state)
            rooms.add(state.inner.room)
    assert len(rooms) < 10, "the cache doubles, so 64 tokens need few moves"
