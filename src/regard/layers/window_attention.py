r"""Window attention: softmax attention among the tokens of one window of the image.

    o_i = sum_{j in window(i)} softmax_j(q_i . k_j / sqrt(D)) v_j        x: (B, h*w, C)

Windows of w x w cells tile the image without overlap (Swin without shifts and position bias, the
spatial half of DaViT).

Differs from the published code: cells added to fill the last windows are hidden
(`pad="published"`: zeros, which become keys and values by their bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.scored import attend
from regard.core.weights import Scored
from regard.features.grid import Sides, Tiling, image_sides
from regard.layers.attention import join_heads, real_tokens, split_heads
from regard.layers.block import Block
from regard.layers.feedforward import FeedForward


def attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, heads: int, tiling: Tiling, call: Call
) -> Tensor:
    """Softmax attention among the real cells of each tile; q, k, v and output are (B,h*w,H*D)."""
    real = tiling.real(call.padding, q)
    seen = None if real is None else real.flatten(0, 1)
    tiles = [tiling.split(x) for x in (q, k, v)]  # (B,T,area,H*D)
    q, k, v = (split_heads(x.flatten(0, 1), heads) for x in tiles)
    inner = Call(padding=seen, query_padding=seen, scale=call.scale)
    mixed = join_heads(attend(q, k, v, inner, Scored()).output)  # (B*T,area,H*D)
    return tiling.join(mixed.reshape(tiles[2].shape))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, (B,h*w,C) -> (B,h*w,C) on call.grid = (h,w).

    Args:
        dim: width C. heads: heads H. window: side length w in cells. pad: what the cells beyond
            the border are, "masked" or "published". bias: on q, k, v.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 7,
        pad: Literal["masked", "published"] = "masked",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        if window < 1:
            raise ArgumentError("window", "at least 1", window)
        if pad not in ("masked", "published"):
            raise ArgumentError("pad", "'masked' or 'published'", pad)
        self.dim, self.heads, self.window, self.pad = dim, heads, window, pad
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal; padded cells of call.padding are hidden."""
        check_tokens(x, self.dim, call)
        grid = image_sides(call, x.shape[1], "window_attention")
        x = real_tokens(x, call.padding)
        if self.pad == "masked":
            return self.proj(self._mixed(x, grid, call))
        refuse(call, "window_attention(pad='published')", "padding")
        tiling = Tiling(grid, (self.window, self.window))
        return self.proj(tiling.cropped(self._mixed(tiling.filled(x), tiling.full, call)))

    def _mixed(self, x: Tensor, grid: Sides, call: Call) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        tiling = Tiling(grid, (self.window, self.window))
        return attend_in_tiles(q, k, v, self.heads, tiling, call)


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> WindowAttention:
    """A window attention with the weights of DaViT's spatial block."""
    module = WindowAttention(
        config["dim"],
        config["num_heads"],
        window=config.get("window_size", 7),
        pad="published",
        bias="attn.qkv.bias" in state,
    )
    module.load_state_dict(within(state, "attn."))
    return module


def within(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict whose names start with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def davit_block(case: Mapping[str, Any], mixer: nn.Module) -> dict[str, Any]:
    """Run one case of DaViT's block, a grid convolution before each of its halves."""
    config, state, inputs = case["config"], case["state_dict"], case["inputs"]
    dim = config["dim"]
    feed_forward = FeedForward(dim, int(dim * config.get("mlp_ratio", 4.0)))
    block = Block(dim, mixer, feed_forward, cpe_first=3, cpe_second=3).eval()
    own = {f"mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    for ours, theirs in _BLOCK_NAMES.items():
        own |= {ours + name: tensor for name, tensor in within(state, theirs).items()}
    block.load_state_dict(own)
    height, width = (int(side) for side in inputs["size"])
    return {"y": block(inputs["x"], Call(grid=(height, width)))}


_BLOCK_NAMES = {
    "cpe_first.conv.": "cpe.0.proj.",
    "cpe_second.conv.": "cpe.1.proj.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "feed_forward.": "mlp.",
}


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    return davit_block(case, convert(case["config"], case["state_dict"]))


WINDOW_ATTENTION = Card(
    name="window_attention",
    kind="layer",
    build=WindowAttention,
    papers=(
        Paper("2103.14030", "Swin Transformer: Hierarchical Vision Transformer", 2021),
        Paper("2204.03645", "DaViT: Dual Attention Vision Transformers", 2022),
    ),
    family="scored",
    patterns=("noncausal self",),
    grids=(2,),
    cost=Cost(time=1, state="none"),
    claim=Claim(
        "reads digits although no token sees beyond its window",
        "regard compare --task digits --mechanisms 'softmax,window_attention(window=2)'",
    ),
    example=Example(grid=(5, 6), options={"window": 4}),
    goldens=(Golden("80_spatial_block.pt", _replay, "dingmyu/davit", "fc79470"),),
    convert=convert,
    deviations=("cells that fill the last windows are hidden; `pad='published'` lets them in",),
)
