r"""Relevance: which parts of an input a score came from, so that the parts sum to the score.

    R = x dS/dx        under the rules of layer-wise relevance propagation (see rules.py)

sum R = S where nothing is added that does not depend on x: a bias, or the 1 of elu + 1, keeps the
share that it gave (the positive rule gives biases none). Attention is a constant weighing of values
unless its queries and keys are asked about too.

    embed = model.get_input_embeddings()
    score = lambda x: model(inputs_embeds=x).logits[:, -1, answer]
    relevance(model, score, embed(ids)).sum(-1)        # (B,N), one number per token

Differs from the paper: its convolutions divide by the signed output, which is near zero for some;
here epsilon or the positive rule serves them as it does linear maps. Attention, norms and gates,
which its networks have not, follow the rules for transformers (arXiv 2202.07304, 2402.05602).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.hosting import host_of
from regard.lenses.rules import Attention, Linear, Rules, passed

ACTIVATION = re.compile(r"GELU|SiLU|ReLU|Swish|Mish")


def relevance(
    model: nn.Module,
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    linear: Linear = "epsilon",
    epsilon: float = 0.0,
    attention: Attention = "values",
) -> Tensor:
    """Relevance of each entry of x for score(x), of the shape of x.

    score: runs the model on x, of any shape with the batch first, and gives what is explained,
    (B,) or a scalar: a logit or a difference of logits, not a probability. linear: "epsilon" (with
    0, in proportion to what each input gave) or "positive" (the z+ rule, for networks of ReLU).
    attention: "values", or "all": through queries and keys too, where relevance is not conserved.

    Raises:
        ArgumentError: a model in training mode, a negative epsilon, a score that does not depend
            on x under the rules.
        UnsupportedError: a model with attention of which nothing is seen: a kernel of its own.
    """
    if model.training:
        raise ArgumentError("model", "a model in evaluation mode", "training mode")
    if epsilon < 0:
        raise ArgumentError("epsilon", "0 or more", epsilon)
    given = x.detach().clone().requires_grad_()
    rules = Rules(linear, epsilon, attention)
    with _frozen(model), torch.enable_grad(), _in_one_piece(model), rules:
        value = score(given)
    _check_seen(model, rules)
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
    if gradient is None:
        raise ArgumentError("score", "something that depends on x through the model", "a constant")
    return x.detach() * gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _in_one_piece(model: nn.Module) -> Iterator[None]:
    """Inside, activations written out by hand pass relevance as a whole."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return passed(output, args[0])

    leaves = (m for m in model.modules() if not any(m.children()))
    found = [m for m in leaves if ACTIVATION.search(type(m).__name__)]
    handles = [m.register_forward_hook(hook) for m in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_seen(model: nn.Module, rules: Rules) -> None:
    """Raise UnsupportedError if the model has attention, but none was seen."""
    if rules.weighed:
        return
    host = host_of(model)
    named = [site.name for site in host.sites(model)] or list(host.unreached(model))
    if named:
        who = named[0] or type(model).__name__
        raise UnsupportedError("relevance", f"{who} uses a kernel that it cannot see into")
