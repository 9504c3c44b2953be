"""Probes that bring their own rivals: these compute what they claim to, and say where they are
absent.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench import delta_rule, high_low
from regard.bench.delta_rule import GatedDelta
from regard.bench.high_low import HighLow, LocalWindows, SpatialReduction
from regard.bench.probes import Missing, Wrong
from regard.bench.rivals import Setting
from regard.bench.timing import Pace
from regard.build import create
from regard.core.call import Call
from regard.core.delta import DeltaRule, delta
from regard.core.mask import Causal
from regard.testing.compare import close

QUICK = Pace(budget=0.01, least=1, most=2)


def test_local_windows_are_window_attention() -> None:
    theirs, x = LocalWindows(16, 2, side=6, window=3), torch.randn(2, 36, 16)
    ours = create("window_attention", dim=16, heads=2, window=3)
    ours.load_state_dict(theirs.state_dict())
    close(theirs(x), ours(x, Call(grid=(6, 6))), "windows", 1e-5)


def test_spatial_reduction_reads_one_key_per_patch() -> None:
    layer, x = SpatialReduction(16, 2, side=4), torch.randn(3, 16, 16)
    patches = x.view(3, 2, 2, 2, 2, 16).transpose(2, 3).reshape(3, 4, 4, 16)
    weight = layer.reduce.weight.permute(2, 3, 1, 0).reshape(4 * 16, 16)
    keys = layer.norm(patches.flatten(2) @ weight + layer.reduce.bias)
    q, kv = layer.q(x).view(3, 16, 2, 8), layer.kv(keys).view(3, 4, 2, 2, 8)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, kv[:, :, 0]) / 8**0.5
    mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), kv[:, :, 1]).flatten(2)
    close(layer(x), layer.proj(mixed), "spatial reduction", 1e-5)


@pytest.mark.parametrize("rival", ["spatial reduction", "local windows"])
def test_high_and_low_are_timed_beside_both(rival: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high_low, "IMAGES", Setting(batch=1, heads=2, head_dim=8))
    probe = HighLow(rival)
    found = probe.measure(QUICK)
    assert found.reached > 0
    assert found.more["gate"].passed
    assert rival in probe.unit


def peer(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A stand-in for transformers: our rule in its layout, times a factor."""

    def rule(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, beta, decay = (x.transpose(1, 2) for x in (q, k, v, beta, decay))
        scaled = factor * q * q.shape[-1] ** -0.5
        call = Call(mask=Causal())
        return delta(scaled, k, v, call, DeltaRule(beta, decay)).output.transpose(1, 2), None

    module = SimpleNamespace(**{delta_rule.FUNCTION: rule})
    monkeypatch.setitem(sys.modules, delta_rule.MODULE, module)


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_the_delta_rule_is_timed_beside_one_that_agrees(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer(monkeypatch, 1.0)
    assert GatedDelta(70, mode).measure(QUICK).reached > 0


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    peer(monkeypatch, 1.01)
    with pytest.raises(Wrong, match=delta_rule.FUNCTION):
        GatedDelta(70).measure(QUICK)


@pytest.mark.parametrize(
    ("module", "told"),
    [(None, "pip install transformers"), (SimpleNamespace(), "this version of transformers")],
)
def test_an_absent_rival_says_how_to_get_it(
    module: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, delta_rule.MODULE, module)
    with pytest.raises(Missing, match=told):
        GatedDelta(64).measure(QUICK)


def test_attended_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 8).unbind(0)
    close(high_low.attended(q, k, v, 1), F.softmax(q @ k.mT / 8**0.5, -1) @ v, "attention", 1e-5)
