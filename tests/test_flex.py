"""The flex executor against the dense truth (each shape compiles for seconds: few, and slow)."""

from __future__ import annotations

import pytest
import torch

from regard.core.call import Call
from regard.core.errors import UnsupportedError
from regard.core.flexed import block_mask
from regard.core.mask import Causal, Mask
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.masks.sinks import Sinks
from regard.masks.window import Window
from regard.testing.compare import close

WINDOW = Causal() & Window(70) | Sinks(3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own use of deprecated names
@pytest.mark.parametrize(("n", "m", "mask"), [(300, 300, WINDOW), (130, 200, Causal())])
def test_flex_equals_dense(n: int, m: int, mask: Mask) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, n, 16, generator=draw)
    k, v = (torch.randn(2, 2, m, 16, generator=draw) for _ in range(2))
    padding = torch.ones(2, m, dtype=torch.bool)
    padding[0, -20:] = False
    call = Call(mask=mask, padding=padding, query_positions=torch.arange(m - n, m))
    bias = torch.randn(1, 4, m, generator=draw)
    method = Scored(score=lambda s, b, h, i, j: s - 0.01 * (i - j), key_bias=bias)
    with torch.no_grad():
        flexed = attend(q, k, v, call, method, impl="flex").output
        close(flexed, attend(q, k, v, call, method, impl="dense").output, "flex", 1e-5)


def test_what_flex_lacks_is_named() -> None:
    x = torch.randn(1, 1, 8, 4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backward"):
        attend(x, x, x, Call(), Scored(), impl="flex")
    plain = x.detach()
    with pytest.raises(UnsupportedError, match="log-sum-exp"):
        attend(plain, plain, plain, Call(), Scored(), impl="flex", need_lse=True)
    with pytest.raises(UnsupportedError, match="float64"):
        attend(*(plain.double(),) * 3, Call(), Scored(), impl="flex")


def test_block_mask_lists_every_visible_block_and_nothing_else() -> None:
    x = torch.zeros(1, 1, 700, 1)
    frame = Call(mask=WINDOW).frame(x, x)
    listed = block_mask(frame, WINDOW).to_dense()[0, 0].bool()
    exact = WINDOW.blocks(frame, 128)
    assert bool((listed >= exact.some[0, 0]).all())
    assert listed.sum() <= exact.some.sum() + 6
