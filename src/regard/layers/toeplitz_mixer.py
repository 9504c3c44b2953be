r"""Toeplitz mixer: a matrix per head whose entries depend on the distance of two tokens alone.

    y_t = 1/(2 sqrt(L)) sum_s K_{t-s} x_s + x_t        x, y: (B,N,C)

K (H,2L-1) is learned, or (`data_dependent`) read off the tokens: K_d = f(x_d) for d >= 0 and
K_{-d} = r(x_d) for d > 0, f and r linear, so the tokens say how far to look, not where.

The published code aligns kernel and tokens one step apart, K'_d = K_{d+1}, wrapping round at the
end. For a learned K that only renames its entries; for one read off the tokens `shifted` repeats
it, which leaks the next token, so it is noncausal and takes no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.boundary import refuse
from regard.core.call import Call
from regard.core.card import Card, Claim, Cost, Limit
from regard.layers.justdense import EXAMPLE, PAPERS, MatrixMixer, mixer_golden, mixer_sizes, xavier


def toeplitz(kernel: Tensor) -> Tensor:
    """Kernel (…,2N-1) over distances -(N-1)..N-1 -> matrix (…,N,N), entry (t,s) at distance t-s."""
    tokens = (kernel.shape[-1] + 1) // 2
    rows = torch.arange(tokens, device=kernel.device)
    return kernel[..., rows[:, None] - rows + tokens - 1]


class ToeplitzMixer(MatrixMixer):
    """A matrix of distances per head, (B,N,C) -> (B,N,C).

    Args:
        dim: width C. heads: heads H. length: L, the largest number of tokens. data_dependent: read
            the kernel off the tokens. shifted: as published, see above. inner_residual: add the
            input.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        length: int = 512,
        data_dependent: bool = True,
        shifted: bool = False,
        inner_residual: bool = True,
    ) -> None:
        super().__init__(
            dim, heads, length, scale=0.5 * length**-0.5, inner_residual=inner_residual
        )
        self.shifted = shifted and data_dependent
        self.data_dependent = data_dependent
        if data_dependent:
            self.kernel_proj = nn.Linear(dim, 2 * heads, bias=False)
        else:
            self.kernel = xavier(heads, 2 * length - 1)

    def forward(self, x: Tensor, call: Call = Call()) -> Tensor:
        """Noncausal or causal; `shifted` noncausal only and without padding."""
        if self.shifted:
            refuse(call, "ToeplitzMixer(shifted=True)", "mask", "padding")
        return super().forward(x, call)

    def matrix(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B or 1, H, N, N)."""
        if self.data_dependent:
            return self.of_kernels(*self.kernel_proj(x).chunk(2, -1))
        spare = self.length - x.shape[1]
        return toeplitz(self.kernel[None, :, spare : self.kernel.shape[1] - spare])

    def of_kernels(self, forward: Tensor, reverse: Tensor) -> Tensor:
        """Matrices (B,H,N,N) from the kernels f and r, each (B,N,H)."""
        kernel = torch.cat([reverse[:, 1:].flip(1), forward], 1).transpose(1, 2)
        return toeplitz(kernel.roll(-1, -1) if self.shifted else kernel)


def convert(config: Mapping[str, Any], state: Mapping[str, Any]) -> ToeplitzMixer:
    """A mixer with the authors' weights."""
    dim, heads, length = mixer_sizes(config)
    dependent = config["is_data_dependent"]
    module = ToeplitzMixer(dim, heads, length=length, data_dependent=dependent, shifted=dependent)
    if not dependent:
        module.load_state_dict({"kernel": state["conv_params"].roll(-1, -1)})
    return module


def _replay(case: Mapping[str, Any]) -> dict[str, Any]:
    module, inputs = convert(case["config"], case["state_dict"]), case["inputs"]
    x = inputs["x"] if "x" in inputs else inputs["hidden_states"]
    if not case["config"]["is_data_dependent"]:
        return {"y": module(x)}
    matrix = module.of_kernels(inputs["forward_conv"], inputs["reverse_conv"])
    return {"y": module.mixed(x, matrix, torch.ones_like(matrix, dtype=torch.bool))}


TOEPLITZ_MIXER = Card(
    name="toeplitz_mixer",
    kind="layer",
    build=ToeplitzMixer,
    papers=PAPERS,
    family="free",
    patterns=("noncausal self", "causal self"),
    cost=Cost(time=2, state="none"),
    claim=Claim(
        "solves plain copying, which is a fixed delay, and not the selective kind",
        'regard compare --task "copying(selective=False)" --mechanisms '
        "'softmax,toeplitz_mixer(data_dependent=False)'",
    ),
    example=EXAMPLE,
    limits=(
        Limit(
            {"data_dependent": False},
            "justdense",
            {"length": 16},
            weights=lambda state: {"weight": 0.5 * toeplitz(state["kernel"])},
        ),
    ),
    goldens=(mixer_golden("Toeplitz", _replay),),
    convert=convert,
    deviations=("kernel and tokens are aligned; `shifted` gives the published step between them",),
)
