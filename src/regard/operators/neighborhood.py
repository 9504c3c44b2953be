r"""Neighborhood attention: softmax over the nearest cells of a token grid, axis by axis.

    o_i = sum_{j in window(i)} softmax_j(q_i . k_j s) v_j        window(i) = product over axes

q: (B,H,N,D)  k: (B,H_k,N,D)  v: (B,H_v,N,E); N = prefix + cells of the call's 1-D, 2-D or 3-D grid.
A window holds `kernel` cells, `dilation` apart, and is pushed inside at the border. With a stride,
so many neighbouring queries share the window of one of them. A causal axis looks back only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core.boundary import check_qkv
from regard.core.call import Call, Result
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import UnsupportedError
from regard.core.frame import Frame
from regard.core.mask import Mask
from regard.core.scored import attend
from regard.core.tiling import BLOCK, GATHERED_KEY
from regard.core.weights import Scored
from regard.masks.future import hides_future
from regard.masks.neighborhood import Neighborhood
from regard.operators.gathered import attend_gathered

NearImpl = Literal["auto", "dense", "sdpa", "tiled", "gathered"]
Sides = int | tuple[int, ...]


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    kernel: Sides = 7,
    dilation: Sides = 1,
    causal: bool | tuple[bool, ...] | None = None,
    impl: NearImpl = "auto",
) -> Result:
    """Neighborhood attention: every cell has its own window. Options as `gna`."""
    return gna(q, k, v, call, kernel=kernel, stride=1, dilation=dilation, causal=causal, impl=impl)


def gna(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    kernel: Sides = 8,
    stride: Sides = 4,
    dilation: Sides = 1,
    causal: bool | tuple[bool, ...] | None = None,
    impl: NearImpl = "auto",
) -> Result:
    """Generalized neighborhood attention: `stride` neighbouring queries share a window.

    kernel, stride and dilation are one value for all axes, or one per axis. causal: which axes look
    back only; None = the first one, where the call's mask hides the future. impl: an executor of
    `attend`, or "gathered", whose cost is linear in the cells of any grid.

    Raises:
        ArgumentError: more than one axis and no call.grid, or options for another number of axes.
        UnsupportedError: "gathered", and rows of the tensors need not be cells of the grid.
    """
    check_qkv(q, k, v, call)
    if causal is None:
        axes = len(call.grid or (1,))
        causal = (hides_future(call.mask), *(False,) * (axes - 1))
    mask = Neighborhood(kernel, dilation, stride, causal)
    lacks = _not_gathered(q, k, call)
    if impl == "gathered" and lacks:
        raise UnsupportedError("impl='gathered'", lacks)
    if impl == "gathered" or (impl == "auto" and not lacks and _pays(mask, call, k.shape[2])):
        return _gathered(q, k, v, call, mask)
    return attend(q, k, v, call, Scored(mask=mask), impl=impl)


def _not_gathered(q: Tensor, k: Tensor, call: Call) -> str:
    """Why row i need not be cell i, or an empty string."""
    if call.query_positions is not None or call.key_positions is not None:
        return "positions are given, so rows need not be cells"
    if q.shape[2] != k.shape[2]:
        return "queries and keys are not the same cells"
    if call.padding is not None and call.grid is None:
        return "padding moves the cells of a sequence"
    return ""


def _pays(mask: Neighborhood, call: Call, keys: int) -> bool:
    """Whether reading a window's keys one by one beats row-major tiles, which read every key of the
    rows of the grid that a block of queries and its windows touch.
    """
    grid = call.grid or (keys,)
    kernels = [axis.kernel for axis in mask.axes(len(grid))]
    row = math.prod(grid[1:])
    tiled = min(BLOCK + kernels[0] * row, keys)
    return len(grid) > 1 and GATHERED_KEY * (math.prod(kernels) + call.prefix) < tiled


def _gathered(q: Tensor, k: Tensor, v: Tensor, call: Call, mask: Neighborhood) -> Result:
    """Prefix rows see everything; the other rows see the prefix and their window."""
    prefix, cells = call.prefix, q.shape[2] - call.prefix
    near, inside = mask.near(call.grid or (None,), cells)
    first = torch.arange(prefix).expand(cells, -1)
    keys = torch.cat([first, near + prefix], 1).to(q.device)  # (cells, prefix + w)
    inside = torch.cat([torch.ones_like(first, dtype=torch.bool), inside], 1).to(q.device)
    if not prefix:
        return attend_gathered(q, k, v, call, keys, inside)
    queries, _ = call.positions(q.shape[2], k.shape[2], q.device)
    parts = []
    for rows, run in (
        (slice(0, prefix), partial(attend, method=Scored(mask=mask))),
        (slice(prefix, None), partial(attend_gathered, keys=keys, inside=inside)),
    ):
        real = None if call.query_padding is None else call.query_padding[:, rows]
        part = call.but(query_positions=queries[:, rows], query_padding=real)
        parts.append(run(q[:, :, rows], k, v, part).output)
    return Result(torch.cat(parts, 2))


def _mask(kernel: Sides = 7, dilation: Sides = 1) -> Mask:
    """The sequence form of the mask; what is alive does not depend on causality."""
    return Neighborhood(kernel, dilation)


def _strided_mask(kernel: Sides = 8, stride: Sides = 4, dilation: Sides = 1) -> Mask:
    return Neighborhood(kernel, dilation, stride)


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    config, inputs = case["config"], case["inputs"]
    grid = tuple(config["shape"])
    kernel, stride, dilation, causal = (
        tuple(config[name]) for name in ("kernel_size", "stride", "dilation", "is_causal")
    )
    mask = Neighborhood(kernel, dilation, stride, causal)
    cells = torch.arange(math.prod(grid))[None]
    found: dict[str, Any] = {"mask": mask.dense(Frame(1, 1, cells, cells, grid))[0, 0]}
    if inputs:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        call = Call(grid=grid)
        options = {"kernel": kernel, "stride": stride, "dilation": dilation, "causal": causal}
        found["out"] = gna(q, k, v, call, impl="gathered", **options).output
        found["lse"] = attend(q, k, v, call, Scored(mask=mask), need_lse=True).lse
    return found


_GOLDEN = Golden(
    "100_136_natten_gna_masks.pt",
    _replay,
    "SHI-Labs/NATTEN:src/natten/backends/flex.py:get_na_flex_mask",
    "8c8729f496",
)

NEIGHBORHOOD = Card(
    name="neighborhood",
    kind="operator",
    build=neighborhood,
    papers=(
        Paper("2204.07143", "Neighborhood Attention Transformer", 2022),
        Paper(
            "2403.04690",
            "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
            "Threadblock Level",
            2024,
        ),
    ),
    family="scored",
    patterns=("noncausal self", "causal self"),
    grids=(1, 2, 3),
    cost=Cost(time=1, state="constant"),
    claim=Claim(
        "classifies digits from windows of 3 x 3 cells",
        "regard compare --task digits --mechanisms 'softmax,neighborhood(kernel=3)'",
    ),
    mask=_mask,
    example=Example(options={"kernel": 3, "dilation": 2}),
    limits=(Limit({"kernel": 10**6, "dilation": 1}, "softmax"),),
    forms=("impl", ("dense", "sdpa", "tiled", "gathered")),
    goldens=(replace(_GOLDEN, only=lambda case: set(case["config"]["stride"]) == {1}),),
)

GNA = replace(
    NEIGHBORHOOD,
    name="gna",
    build=gna,
    papers=(
        Paper(
            "2504.16922",
            "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed "
            "of Light",
            2025,
        ),
    ),
    claim=Claim(
        "classifies digits as well when groups of cells share a window",
        "regard compare --task digits --mechanisms "
        "'neighborhood(kernel=4),gna(kernel=4,stride=2),gna(kernel=4,stride=4)'",
    ),
    mask=_strided_mask,
    cost=Cost(time=1.25, state="constant"),  # tiles touch whole rows of a grid
    example=Example(grid=(4, 6), prefix=1, options={"kernel": 3, "stride": 2}),
    limits=(
        Limit({"stride": 1}, "neighborhood", {"kernel": 3}),
        Limit({"kernel": 6, "stride": 6}, "softmax", patterns=("noncausal self",)),
    ),
    goldens=(_GOLDEN,),
)
