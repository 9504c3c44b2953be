"""Activations of a model's modules and the gradient of a score with respect to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Activation:
    """What one module gave, and dS/d of it: both of one shape, batch first."""

    value: Tensor
    gradient: Tensor


def activations(
    model: nn.Module, score: Callable[[], Tensor], modules: Sequence[str]
) -> dict[str, Activation]:
    """Output and gradient of named modules in one forward and one backward pass.

    score: runs the model and gives (B,) or a scalar. modules: names as in `named_modules`; of one
    that gives several tensors the first counts, of one that runs several times the last run.

    Raises:
        ArgumentError: a name the model lacks, or a module on which the score does not depend.
    """
    known = dict(model.named_modules())
    strange = [name for name in modules if name not in known]
    if strange or not modules:
        raise ArgumentError("modules", "names of the model's modules", strange or "none")
    found: dict[str, Tensor] = {}
    handles = [known[name].register_forward_hook(_keep(found, name)) for name in modules]
    try:
        with torch.enable_grad():
            value = score()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in found]
    if missing or not value.requires_grad:
        raise ArgumentError("modules", "modules that the score depends on", missing or modules)
    gradients = torch.autograd.grad(
        value.sum(), [found[name] for name in modules], allow_unused=True
    )
    idle = [name for name, g in zip(modules, gradients, strict=True) if g is None]
    if idle:
        raise ArgumentError("modules", "modules that the score depends on", idle)
    return {
        name: Activation(found[name].detach(), g)
        for name, g in zip(modules, gradients, strict=True)
        if g is not None
    }


def _keep(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that keeps a module's first tensor and passes on a view of it, so that what
    changes it in place later does not change what was kept.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise ArgumentError("modules", f"{name} to give a tensor or a tuple of them", output)
        if not first.requires_grad:
            first = first.detach().requires_grad_()
        found[name] = first
        passed_on = first.clone()
        return (passed_on, *output[1:]) if isinstance(output, tuple) else passed_on

    return hook
