r"""JustDense: a learned matrix per head mixes the tokens; neither queries nor keys exist.

    y_t = 1/sqrt(L) sum_s M_ts x_s + x_t        x, y: (B,N,C)  M: (H,L,L)

Head h mixes its C/H channels. L is the largest number of tokens; fewer tokens use the corner of M.
With a causal mask M is its lower triangle. The added x is the mixer's own (`inner_residual`),
besides that of a surrounding block.

Beyond the paper: fewer tokens than L, padding, and causal calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import check_tokens, refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Example, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.padding import front_aligned
from regard.core.recurrent import is_causal
from regard.layers.attention import join_heads, real_tokens, split_heads


class MatrixMixer(nn.Module):
    """Mixing by a matrix per head, (B,N,C) -> (B,N,C); a subclass says which matrix.

    Args:
        dim: width C. heads: heads H. length: L, the largest number of tokens. scale: factor on the
            matrix. inner_residual: add the input.
    """

    def __init__(
        self, dim: int, heads: int, length: int, *, scale: float, inner_residual: bool
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError("heads", f"a divisor of dim={dim}", heads)
        if length < 1:
            raise ArgumentError("length", "at least 1 token", length)
        self.dim, self.heads, self.length = dim, heads, length
        self.scale, self.inner_residual = scale, inner_residual

    def matrix(self, x: Tensor, visible: Tensor) -> Tensor:
        """The matrices (B or 1, H, N, N) for x (B,N,C), whose real tokens come first; visible
        (B or 1, 1, N, N).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal or causal; tokens count by their rank among real ones."""
        who = type(self).__name__
        check_tokens(x, self.dim, call)
        refuse(call, who, "scale", "query_positions", "key_positions")
        causal, tokens = is_causal(call, who), x.shape[1]
        if tokens > self.length:
            raise ArgumentError("x", f"at most length={self.length} tokens", tokens)
        x = real_tokens(x, call.padding)
        visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=x.device)
        visible = visible.tril() if causal else visible
        if call.padding is None:
            return self.mixed(x, self.matrix(x, visible), visible)
        aligned = front_aligned(call.padding)
        front, visible = aligned.front(x), visible & aligned.padding[:, None, None]
        return aligned.back(self.mixed(front, self.matrix(front, visible), visible))

    def mixed(self, x: Tensor, matrix: Tensor, visible: Tensor) -> Tensor:
        """x (B,N,C) mixed by matrices (B or 1, H, N, N) where visible, the residual included."""
        weights = matrix.masked_fill(~visible, 0.0) * self.scale
        y = join_heads(weights @ split_heads(x, self.heads))
        return x + y if self.inner_residual else y


class JustDense(MatrixMixer):
    """A free matrix per head, (B,N,C) -> (B,N,C).

    Args:
        dim: width C. heads: heads H. length: L, the largest number of tokens. inner_residual: add
            the input.
    """

    def __init__(
        self, dim: int, heads: int, *, length: int = 512, inner_residual: bool = True
    ) -> None:
        super().__init__(dim, heads, length, scale=length**-0.5, inner_residual=inner_residual)
        self.weight = xavier(heads, length, length)

    def matrix(self, x: Tensor, visible: Tensor) -> Tensor:
        """The corner of the weight, whatever x holds."""
        return self.weight[None, :, : x.shape[1], : x.shape[1]]


def xavier(*shape: int) -> nn.Parameter:
    """A parameter drawn from Glorot's normal distribution."""
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(shape)))


def mixer_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width, heads and length of the authors' mixer."""
    width = config["d_model"] * config.get("expand", 2)
    return width, width // config.get("headdim", 128), config["max_seq_len"]


def of_class(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a case was made by the authors' mixer of that name."""
    return lambda case: case["config"]["cls"] == name


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> JustDense:
    """A mixer with the authors' weights."""
    dim, heads, length = mixer_sizes(config)
    module = JustDense(dim, heads, length=length)
    module.load_state_dict({"weight": state["M"]})
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    module = convert(case["config"], case["state_dict"])
    return {"y": module(case["inputs"]["hidden_states"])}


PAPERS = (
    Paper(
        "2508.09153",
        "JustDense: Just using Dense instead of Sequence Mixer for Time Series analysis",
        2025,
    ),
    Paper(
        "2407.09941",
        "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers",
        2024,
    ),
)
SOURCE = ("38_justdense_mixers.pt", "Thrillcrazyer/JustDense", "28285e3")
EXAMPLE = Example(
    dim=8,
    heads=2,
    length=12,
    options={"length": 16},
    sized=lambda size: {"length": max(16, size[0])},
)


def mixer_golden(name: str, replay: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Golden:
    """The cases of the authors' mixer of that name."""
    file, source, commit = SOURCE
    return Golden(file, replay, source, commit, only=of_class(name))


JUSTDENSE = Card(
    name="justdense",
    kind="layer",
    build=JustDense,
    papers=PAPERS,
    family="free",
    patterns=("noncausal self", "causal self"),
    grids=(1, 2, 3),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "solves plain copying, where the place tells what to read, and not the selective kind",
        'regard compare --task "copying(selective=False)" --mechanisms softmax,justdense',
    ),
    example=EXAMPLE,
    goldens=(mixer_golden("Dense", _replay),),
    convert=convert,
    deviations=("fewer tokens than `length`, padding and causal calls are served",),
)
