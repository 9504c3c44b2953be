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
