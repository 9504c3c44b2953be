"""Whether a mask hides every later key, however it is composed."""

from __future__ import annotations

from regard.core.mask import Both, Causal, Either, Mask
from regard.masks.elastic import Elastic
from regard.masks.power import PowerReach
from regard.masks.sinks import Sinks


def hides_future(mask: Mask | None) -> bool:
    """True where no query can see a key at a later position, as far as the algebra can tell."""
    if isinstance(mask, Both):
        return hides_future(mask.left) or hides_future(mask.right)
    if isinstance(mask, Either):
        return hides_future(mask.left) and hides_future(mask.right)
    return isinstance(mask, (Causal, Sinks, PowerReach, Elastic))
