r"""A dictionary of what attention gives: a sparse autoencoder on the concatenated outputs of a
layer's heads, before the output projection.

    f = relu((x - b_dec) W_enc + b_enc)         x: (…,H E), heads one after the other    f: (…,F)
    x' = f W_dec + b_dec                        rows of W_dec have norm 1
    loss = |x - x'|^2 + lambda sum f            mean over tokens

Who makes a feature, and from where:

    weight of head h    |W_dec[f,h]| / sum_h |W_dec[f,h]|
    from source s       d[t,s] = sum_h A_h[t,s] (v_h[s] . W_enc[h,f])

d sums over s to x_t . W_enc[:,f], which is what the encoder reads, less both biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Claim, Golden, Paper
from regard.core.errors import ArgumentError
from regard.core.lens import LensCard
from regard.core.weights import repeat_heads


@dataclass(frozen=True, eq=False)
class Coded:
    """features (…,F), not negative; reconstruction (…,H E)."""

    features: Tensor
    reconstruction: Tensor


@dataclass(frozen=True, eq=False)
class Loss:
    """Means over tokens: squared error, lambda times the sum of features, and both together."""

    error: Tensor
    sparsity: Tensor

    @property
    def total(self) -> Tensor:
        """What training lowers."""
        return self.error + self.sparsity


class Dictionary(nn.Module):
    """A dictionary of `features` features for heads of some width.

    heads, head_dim: of the attention layer. features: the paper takes 32 or 64 times the width of
    all heads. seed: of the first weights.

    Raises:
        ArgumentError: a size below 1.
    """

    def __init__(self, heads: int, head_dim: int, features: int, *, seed: int = 0) -> None:
        super().__init__()
        if min(heads, head_dim, features) < 1:
            raise ArgumentError("sizes", "1 or more", (heads, head_dim, features))
        self.heads = heads
        width = heads * head_dim
        source = torch.Generator().manual_seed(seed)
        encoder, decoder = torch.empty(width, features), torch.empty(features, width)
        for weight in (encoder, decoder):
            nn.init.kaiming_uniform_(weight, generator=source)
        self.encoder = nn.Parameter(encoder)
        self.decoder = nn.Parameter(decoder)
        self.encoder_bias = nn.Parameter(torch.zeros(features))
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.normalise()

    @property
    def features(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def forward(self, x: Tensor) -> Coded:
        """Code and reconstruct x (…,H E)."""
        features = ((x - self.decoder_bias) @ self.encoder + self.encoder_bias).relu()
        return Coded(features, features @ self.decoder + self.decoder_bias)

    def loss(self, x: Tensor, coded: Coded, sparsity: float) -> Loss:
        """The loss of x (T,H E) and its code; sparsity: lambda."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        error = (coded.reconstruction.to(dtype) - x.to(dtype)).square().sum(-1).mean()
        return Loss(error, sparsity * coded.features.to(dtype).sum(-1).mean())

    @torch.no_grad()
    def normalise(self) -> None:
        """Give the decoder's rows norm 1."""
        self.decoder.div_(self.decoder.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def head_weights(self) -> Tensor:
        """Each head's share of a feature (F,H): of the norms of its parts of the decoder row."""
        norms = self.decoder.detach().unflatten(1, (self.heads, -1)).norm(dim=-1)
        return norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)

    def by_head(self, x: Tensor, feature: int) -> Tensor:
        """What each head adds to the encoder's reading of a feature: x (…,H E) to (…,H)."""
        reader = self._reader(feature)
        return (x.unflatten(-1, reader.shape) * reader).sum(-1)

    def by_source(self, weights: Tensor, values: Tensor, feature: int) -> Tensor:
        """What each source position adds to the encoder's reading of a feature at each query:
        weights (B,H,N,M) and values (B,H_k,M,E) of the layer to (B,N,M).

        Raises:
            ArgumentError: shapes that do not belong to this dictionary, or no such feature.
        """
        reader = self._reader(feature)
        shape = (weights.shape[1], values.shape[-1])
        if shape != tuple(reader.shape) or weights.shape[-1] != values.shape[2]:
            got = tuple(weights.shape), tuple(values.shape)
            raise ArgumentError("weights and values", f"{self.heads} heads of this layer", got)
        told = (repeat_heads(values, self.heads) * reader[:, None]).sum(-1)  # (B,H,M)
        return torch.einsum("bhnm,bhm->bnm", weights, told)

    def _reader(self, feature: int) -> Tensor:
        """The encoder's column of a feature by head, (H,E)."""
        if not 0 <= feature < self.features:
            raise ArgumentError("feature", f"0 to {self.features - 1}", feature)
        return self.encoder.detach()[:, feature].unflatten(0, (self.heads, -1))


def joined(outputs: Tensor) -> Tensor:
    """Outputs of heads (B,H,N,E) one after the other: (B,N,H E)."""
    return outputs.transpose(1, 2).flatten(2)


def parted(x: Tensor, heads: int) -> Tensor:
    """(B,N,H E) as outputs of heads (B,H,N,E)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def convert(heads: int, state_dict: Mapping[str, Tensor]) -> Dictionary:
    """A dictionary with the authors' weights, for a layer of so many heads."""
    width, features = state_dict["W_enc"].shape
    found = Dictionary(heads, width // heads, features)
    names = {"W_enc": "encoder", "W_dec": "decoder", "b_enc": "encoder_bias"}
    names["b_dec"] = "decoder_bias"
    found.load_state_dict({ours: state_dict[theirs] for theirs, ours in names.items()})
    return found


def replay(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' losses, code and attributions."""
    given = case["inputs"]
    found = convert(given["v"].shape[2], case["state_dict"])
    coded = found(given["z"])
    loss = found.loss(given["z"], coded, case["config"]["l1_coeff"])
    values = given["v"].transpose(1, 2)  # theirs are (B,M,H,E)
    return {
        "loss": loss.total,
        "recons": coded.reconstruction,
        "acts": coded.features,
        "l2": loss.error,
        "l1": loss.sparsity,
        "dfa": found.by_source(given["pattern"], values, int(given["feature"])),
        "head_weights": found.head_weights(),
    }


CARD = LensCard(
    name="dictionary",
    build=Dictionary,
    papers=(
        Paper(
            "2406.17759",
            "Interpreting Attention Layer Outputs with Sparse Autoencoders",
            2024,
        ),
    ),
    claim=Claim(
        "what heads say together comes apart into a few features, each traced to heads and tokens",
        "regard atlas",
    ),
    goldens=(
        Golden(
            "227_attn_sae.pt",
            replay,
            "https://github.com/ckkissane/attention-output-saes",
            "03b2bc2",
        ),
    ),
)
