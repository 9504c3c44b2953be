"""Front alignment: real tokens first, padding last, so that methods built on indices treat left and
right padding alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Alignment:
    """A stable reordering of the tokens of each sequence. `order` (B,N): the token that stands at
    each place.
    """

    order: Tensor
    padding: Tensor

    def front(self, x: Tensor) -> Tensor:
        """x (B,N,C) or (B,H,N,D) with real tokens moved to the front, in their order."""
        return _take(x, self.order)

    def back(self, x: Tensor) -> Tensor:
        """Undo `front`."""
        return _take(x, self.order.argsort(-1))


def front_aligned(padding: Tensor) -> Alignment:
    """The alignment of a padding mask (B,N), True = real; its `padding` is the mask after
    alignment.
    """
    order = (~padding).long().argsort(dim=-1, stable=True)
    return Alignment(order, padding.gather(-1, order))


def _take(x: Tensor, order: Tensor) -> Tensor:
    index = order.reshape(order.shape[0], *(1,) * (x.ndim - 3), order.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))
