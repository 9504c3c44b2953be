"""The probe of the delta rule: our chunked form beside that of transformers, on the same input.

transformers is no part of this package; where it is not installed the probe says so. Its function
scales queries by 1/sqrt(D) and takes the layout (B,N,H,D), given as a view, so that it need not
copy. Both are compared with our token-by-token form in float64 before they are timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.bench.clock import clocked
from regard.bench.gate import LENGTH, judged
from regard.bench.probes import STANDARD, Found, Missing, passed, timed_fields
from regard.bench.rivals import Mode, Rivals
from regard.bench.timing import Pace
from regard.core.call import Call
from regard.core.delta import DeltaForm, DeltaRule, delta, unit
from regard.core.mask import Causal

MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"
FUNCTION = "torch_chunk_gated_delta_rule"


@dataclass(frozen=True)
class GatedDelta:
    """How many times faster than transformers our gated delta rule is."""

    length: int
    mode: Mode = "forward"

    @property
    def unit(self) -> str:
        return "× faster than transformers"

    @property
    def setting(self) -> str:
        return f"N={self.length}, {'forward + ' if self.mode == 'backward' else ''}{self.mode}"

    def measure(self, pace: Pace) -> Found:
        theirs = peer()
        truth = both(theirs, LENGTH, torch.float64, "scan")
        small = both(theirs, LENGTH, torch.float32)
        checked = passed("the delta rule", judged(small, truth, self.mode))
        passed(FUNCTION, judged(replace(small, mechanism=small.baseline), truth, self.mode))
        timed = both(theirs, self.length, torch.float32)
        found = clocked(timed.works(self.mode), pace)
        return Found(found["speedup"].median, timed_fields(found, checked))


def peer() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of transformers.

    Raises:
        Missing: it is not installed, or its function went elsewhere.
    """
    try:
        return getattr(importlib.import_module(MODULE), FUNCTION)
    except ImportError as error:
        raise Missing("transformers is not installed (pip install transformers)") from error
    except AttributeError as error:
        raise Missing(f"this version of transformers has no {FUNCTION}") from error


def both(
    theirs: Callable[..., tuple[Tensor, Tensor | None]],
    length: int,
    dtype: torch.dtype,
    form: DeltaForm = "auto",
) -> Rivals:
    """Ours and theirs on beta and log decay (1,H,N), q, unit k and v (1,H,N,D)."""
    draw = torch.Generator().manual_seed(0)
    heads, width = STANDARD.heads, STANDARD.head_dim
    q, k, v = torch.randn(3, 1, heads, length, width, generator=draw).unbind(0)
    beta, fade = torch.rand(2, 1, heads, length, generator=draw).unbind(0)
    inputs = tuple(x.to(dtype) for x in (beta, -0.1 * fade, q, unit(k), v))

    def our_run(beta: Tensor, decay: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rule = DeltaRule(beta, decay)
        return delta(q * width**-0.5, k, v, Call(mask=Causal()), rule, form=form).output

    def their_run(beta: Tensor, decay: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = (x.transpose(1, 2) for x in (q, k, v, decay, beta))
        return theirs(*given)[0].transpose(1, 2)

    return Rivals((length,), True, inputs, our_run, their_run)
