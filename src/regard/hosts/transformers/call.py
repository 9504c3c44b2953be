"""One attention call of a transformers model, in the library's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from regard.core.errors import UnsupportedError
from regard.core.incoming import Incoming, split_mask
from regard.core.moment import Phase, Site
from regard.hosts.transformers.cache import KeptLayer

Noted = tuple[Tensor | None, str]
"""Padding (B, T) as the model got it, or None, and the mask's pattern: causal, full or given."""
UNKNOWN: Noted = (None, "unknown")
REFUSED = ("s_aux", "cache", "block_indices")
"""Keyword arguments of attention functions that change the result and that we do not know."""


def incoming(
    site: Site,
    qkv: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    noted: Noted,
    kwargs: Mapping[str, Any],
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    layer: KeptLayer | None,
    phase: Phase,
) -> Incoming:
    """The call as the runner wants it.

    Raises:
        UnsupportedError: dropout, or an argument that is not known.
    """
    query, key, value = qkv
    _check(kwargs)
    n = query.shape[2]
    total = key.shape[2] if layer is None else layer.seen
    visible, bias = split_mask(attention_mask)
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    causal = kwargs.get("is_causal")
    causal = site.causal if causal is None else bool(causal)
    return Incoming(
        site,
        phase,
        query,
        key,
        value,
        kwargs.get("scaling") or query.shape[-1] ** -0.5,
        kernel,
        visible=visible,
        causal=causal and visible is None and n > 1,
        padding=None if site.cross else _padding(noted, visible, total, n),
        query_slot=total - n,
        first_slot=0 if attention_mask is None or site.cross else total - attention_mask.shape[-1],
        softcap=kwargs.get("softcap"),
        bias=bias,
        pattern=_pattern(noted, causal, visible),
    )


def _check(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("dropout"):
        raise UnsupportedError("plan", "attention dropout is on; call model.eval()")
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError("plan", f"the model passes {name!r} to its attention")


def _padding(noted: Noted, visible: Tensor | None, total: int, n: int) -> Tensor | None:
    """Which of the `total` slots are real tokens, (B, T); None: all."""
    padding, pattern = noted
    if pattern != "unknown":
        if padding is None or padding.ndim != 2:
            return None
        real = padding[:, :total].bool()
        return None if bool(real.all()) else real
    if visible is None:
        return None
    if visible.shape[-2] != visible.shape[-1]:
        raise UnsupportedError("plan", "a 4-D mask of your own does not say which keys are padding")
    real = visible.any(1).any(1)
    return None if bool(real.all()) else real


def _pattern(
    noted: Noted, causal: bool, visible: Tensor | None
) -> Literal["causal", "full", "given"]:
    if visible is None:
        return "causal" if causal else "full"
    return noted[1] if noted[1] in ("causal", "full") else "given"  # type: ignore[return-value]
