"""Plans on plain PyTorch modules that call the fused kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.core.errors import UnsupportedError
from regard.plan import Plan, PlanError, Step


class Attention(nn.Module):
    """Grouped self-attention with the kernel's every way of masking."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.width = num_heads, num_kv_heads, width
        self.q = nn.Linear(32, num_heads * width)
        self.kv = nn.Linear(32, 2 * num_kv_heads * width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2 * self.num_kv_heads, self.width).transpose(1, 2).chunk(2, 1)
        o = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, enable_gqa=True)
        return o.transpose(1, 2).flatten(2)


class Silent(nn.Module):
    """Looks like attention, and calls the kernel on one branch only."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4

    def forward(self, x: Tensor, loud: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) if loud else x


class Model(nn.Module):
    """Two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **how)
        return x


@pytest.fixture
def model() -> Model:
    return Model().double().eval()


def plan(treatment: str, **options: Any) -> Plan:
    return Plan(steps=(Step(treatment=treatment, options=options),))


X = torch.randn(2, 10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BOOLEAN = torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) > 0.3
WAYS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"mask": BOOLEAN},
    {"mask": torch.where(BOOLEAN, 0.5, float("-inf")).double()},
]


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_every_mask_goes_through_our_kernels(model: Model, how: dict[str, Any]) -> None:
    before = model(X, **how)
    with plan("initial_token", gamma=1e-30).applied(model):
        without_first = model(X, **how)
    with plan("temperature", tau=1.0 + 1e-12).applied(model):
        same = model(X, **how)
    assert torch.allclose(same, before, rtol=0, atol=1e-10)
    assert not torch.allclose(without_first, before, rtol=0, atol=1e-6)
    assert torch.equal(model(X, **how), before)


def test_one_head_of_one_layer(model: Model) -> None:
    one = Plan(steps=(Step(treatment="head_silence", layers=[1], heads=[3]),))
    seen: list[Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
    model(X)
    with one.applied(model):
        model(X)
    handle.remove()
    plain, changed = seen
    assert torch.equal(changed[..., :24], plain[..., :24])
    assert bool((changed[..., 24:] == 0).all())


def test_steps_that_need_a_cache_are_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="no cache"), plan("h2o", budget=0.5).applied(model):
        pass


def test_heads_out_of_range(model: Model) -> None:
    with pytest.raises(PlanError, match="heads"):
        Plan(steps=(Step(treatment="head_silence", heads=[4]),)).resolve(model)


def test_dropout_is_refused(model: Model) -> None:
    class Dropping(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            q = x[:, None].expand(-1, 4, -1, -1)
            return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], dropout_p=0.1)[:, 0]

    dropping = nn.Sequential(Dropping())
    with pytest.raises(UnsupportedError, match="dropout"), plan("head_silence").applied(dropping):
        dropping(torch.randn(1, 4, 32))


def test_a_plan_that_was_never_asked_says_so() -> None:
    silent = nn.Sequential(Silent())

    def unheard() -> None:
        with plan("head_silence").applied(silent):
            silent(X)

    with pytest.raises(UnsupportedError, match="never called"):
        unheard()
