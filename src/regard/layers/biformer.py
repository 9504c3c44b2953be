r"""Bi-level routing attention: each region of an image chooses a few regions, and its tokens attend
to those.

    A_rs = mean_{i in r} q_i . mean_{j in s} k_j / sqrt(C)        chosen(r) = top-k_s A_rs
    o_i = sum_{j in chosen(r(i))} softmax_j(q_i . k_j / sqrt(C)) v_j + DWConv(v)_i

x: (B, h*w, C), cut into S x S regions. Heads share the choice, no gradient flows through it, and
the scale counts the whole width C, not that of a head. `soft_routing` multiplies keys and values of
a chosen region by the softmax of its A_rs over the chosen ones; `pool` shrinks a region's keys.

Where S does not divide the image, border regions are smaller. Both published versions count zeros
there instead: `pad="legacy"` adds them before the projection, in S x S regions of ceil(h/S) cells;
`pad="nchw"` after it, in regions of floor(h/S) cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Limit, Paper
from regard.core.errors import ArgumentError
from regard.features.grid import Tiling, convolved, image_sides, tile_means
from regard.features.region_pool import POOLS, Pool, region_pool
from regard.layers.attention import real_tokens
from regard.layers.regions import Regions, gathered, masked

Pad = Literal["masked", "legacy", "nchw"]


class BiFormer(nn.Module):
    """Bi-level routing attention, (B,h*w,C) -> (B,h*w,C) on call.grid = (h,w).

    Args:
        dim: width C. heads: heads H. regions: S, regions a side. topk: regions chosen, None = all.
        lepe: kernel of the convolution of values, 0 = none. soft_routing: weigh what is chosen.
        pool, pool_size: how keys shrink within a region (features/region_pool.py). pad: "masked" or
            a published padding.
        impl: "gathered", or "masked", which scores every pair and has no soft routing.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        regions: int = 7,
        topk: int | None = 4,
        lepe: int = 5,
        soft_routing: bool = False,
        pool: Pool = "none",
        pool_size: int = 4,
        pad: Pad = "masked",
        impl: Literal["gathered", "masked"] = "gathered",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        if regions < 1 or not 1 <= (1 if topk is None else topk) <= regions**2:
            raise ArgumentError("topk", f"1 to regions^2 = {regions**2}, or None", topk)
        if pool not in POOLS or pool_size < 1:
            raise ArgumentError("pool, pool_size", f"one of {POOLS}, at least 1", (pool, pool_size))
        if pad not in ("masked", "legacy", "nchw"):
            raise ArgumentError("pad", "'masked', 'legacy' or 'nchw'", pad)
        if impl not in ("gathered", "masked") or (impl == "masked" and soft_routing):
            raise ArgumentError("impl", "'gathered', or 'masked' without soft routing", impl)
        self.dim, self.heads, self.regions, self.topk = dim, heads, regions, topk
        self.soft_routing, self.pad, self.impl = soft_routing, pad, impl
        self.pool: Pool = pool
        self.pool_size = pool_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim) if lepe else None

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded cells of call.padding are hidden and left out of the means.

        The gathered form notes "routing": the chosen regions (B,T,k), best first, and the softmax
        of their A_rs.
        """
        check_tokens(x, self.dim, call)
        high, wide = image_sides(call, x.shape[1], "biformer")
        x = real_tokens(x, call.padding)
        s = self.regions
        if self.pad != "masked":
            refuse(call, f"biformer(pad={self.pad!r})", "padding")
        if self.pad == "nchw":
            return self.proj(self._mixed(x, Tiling((high, wide), (high // s, wide // s)), call))
        tile = (max(-(-high // s), 1), max(-(-wide // s), 1))
        if self.pad == "masked":
            return self.proj(self._mixed(x, Tiling((high, wide), tile), call))
        whole = Tiling((high, wide), (tile[0] * s, tile[1] * s))
        mixed = self._mixed(whole.filled(x), Tiling(whole.full, tile), call)
        return self.proj(whole.cropped(mixed))

    def _mixed(self, x: Tensor, tiling: Tiling, call: Call) -> Tensor:
        """Heads joined, values' convolution included: x (B,h*w,C) -> (B,h*w,C)."""
        q, kv = self.qkv(x).split([self.dim, 2 * self.dim], -1)
        values = real_tokens(kv[..., self.dim :], call.padding)
        real = tiling.real(call.padding, x)
        q, kv = tiling.split(q), tiling.split(kv)  # (B,T,area,C) and (B,T,area,2C)
        scale = self.dim**-0.5 if call.scale is None else call.scale
        ours = tile_means(q.detach(), real)
        logits = scale * ours @ tile_means(kv[..., : self.dim].detach(), real).transpose(-1, -2)
        hidden = None if self.pad == "nchw" else real
        kv, keys = region_pool(kv, hidden, tiling.tile, self.pool, self.pool_size)
        keep = logits.shape[-1] if self.topk is None else self.topk
        regions = Regions(q, kv, logits, keep, hidden, keys)
        if self.impl == "masked":
            mixed = masked(regions, self.heads, scale)
        else:
            mixed, index, weights = gathered(regions, self.heads, scale, soft=self.soft_routing)
            call.note("routing", (index, weights))
        mixed = tiling.join(mixed)
        return mixed if self.lepe is None else mixed + convolved(values, self.lepe, tiling.grid)


_POOLS: dict[str, Pool] = {
    "identity": "none",
    "avgpool": "avg",
    "maxpool": "max",
    "ada_avgpool": "adaptive_avg",
    "ada_maxpool": "adaptive_max",
}


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> BiFormer:
    """A layer with the authors' weights, of either of their versions."""
    legacy = "qkv.qkv.weight" in state
    pool = _POOLS[config.get("kv_downsample_mode", "identity")]
    adaptive = pool.startswith("adaptive")
    module = BiFormer(
        config["dim"],
        config.get("num_heads", 8),
        regions=config.get("n_win", 7),
        topk=config.get("topk", 4),
        lepe=config.get("side_dwconv", 3),
        soft_routing=config.get("soft_routing", False),
        pool=pool,
        pool_size=config.get("kv_per_win" if adaptive else "kv_downsample_ratio", 4),
        pad="legacy" if legacy else "nchw",
    )
    names = {"qkv.qkv.": "qkv.", "qkv_linear.": "qkv.", "wo.": "proj.", "output_linear.": "proj."}
    own = {}
    for name, tensor in state.items():
        start = next((s for s in names if name.startswith(s)), "")
        own[names.get(start, "") + name.removeprefix(start)] = tensor
    linear = {n: t.flatten(1) for n, t in own.items() if n in ("qkv.weight", "proj.weight")}
    module.load_state_dict(own | linear)
    return module


def _legacy(case: Mapping[str, Any]) -> dict[str, Any]:
    x, notes = case["inputs"]["x"], {}
    call = Call(grid=tuple(x.shape[1:3]), notes=notes)
    y = convert(case["config"], case["state_dict"])(x.flatten(1, 2), call)
    index, weights = notes["routing"][0]
    return {"y": y.unflatten(1, x.shape[1:3]), "r_idx": index, "r_weight": weights}


def _nchw(case: Mapping[str, Any]) -> dict[str, Any]:
    x = case["inputs"]["x"]
    module = convert(case["config"], case["state_dict"])
    y = module(x.flatten(2).transpose(1, 2), Call(grid=tuple(x.shape[2:])))
    return {"y": y.transpose(1, 2).unflatten(2, x.shape[2:])}


_SOURCE, _COMMIT = "rayleizhu/BiFormer", "1697bbb"

BIFORMER = Card(
    name="biformer",
    kind="layer",
    build=BiFormer,
    papers=(
        Paper("2303.08810", "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023),
    ),
    family="selected",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "reads digits although a token sees a quarter of the regions",
        "regard compare --task digits --mechanisms 'softmax,biformer(regions=4,topk=4)'",
    ),
    example=Example(grid=(5, 6), options={"regions": 2, "topk": 2, "lepe": 3}),
    limits=(
        Limit(
            {"regions": 2, "topk": None, "lepe": 0},
            "window_attention",
            {"window": 6},
            {"scale": 32**-0.5},
        ),
    ),
    forms=("impl", ("masked", "gathered")),
    goldens=(
        Golden("169_bra_legacy.pt", _legacy, _SOURCE, _COMMIT),
        Golden("169_bra_nchw.pt", _nchw, _SOURCE, _COMMIT),
    ),
    convert=convert,
    deviations=("cells that fill the last regions are hidden; `pad` gives both published forms",),
)
