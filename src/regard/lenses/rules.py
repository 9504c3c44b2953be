r"""Rules of layer-wise relevance propagation, as another way of differentiating a forward.

    R_i = x_i dS/dx_i        S: the score that is explained, x: any tensor on the way to it

is conserved from the score down to the input wherever each function is, once some of its factors
are held fixed, linear. So every function keeps its value, and only its derivative is replaced:

    softmax, sigmoid         constant: relevance passes through what is weighed, not the weights
    1/sigma of a norm        constant; the mean that is taken away is linear anyway
    ReLU, GELU, SiLU, x^p    y = x (y/x), y/x fixed: relevance passes unchanged
    product of n tensors     1/n of the relevance to each
    Wx + b, convolutions     y = z (y/z), y/z fixed
        epsilon              z = y + epsilon sign y: in proportion to w_ij x_i; b absorbs its share
        positive             z_j = sum_i max(w_ij x_i, 0): negative parts and b get nothing

Sums, pooling, reshaping and gathering are linear already: a residual sum splits in proportion, the
maximum passes to the one that was largest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard.core.errors import UnsupportedError

Linear = Literal["epsilon", "positive"]
Attention = Literal["values", "all"]

WEIGHTS = {"softmax", "sigmoid"}
INVERSES = {"rsqrt", "reciprocal", "rtruediv", "rdiv"}
QUOTIENTS = {"div", "divide", "truediv", "true_divide"}
POWERS = {"pow", "square"}
PASSING = {
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "hardtanh", "tanh", "rms_norm", "normalize"),
}
MIXING = {"matmul", "rmatmul", "bmm", "mm", "einsum"}
PRODUCTS = {"mul", "multiply", "rmul", *MIXING}
LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}
HIDDEN = {"multi_head_attention_forward", "instance_norm"}
KERNEL = "scaled_dot_product_attention"


def rewired(value: Tensor, z: Tensor, factor: Tensor | float) -> Tensor:
    """`value`, with the derivative of z times a fixed factor of the same shape."""
    linear = z * (factor.detach() if isinstance(factor, Tensor) else factor)
    return value.detach() + (linear - linear.detach())


def passed(value: Tensor, z: Tensor) -> Tensor:
    """`value`, with the relevance of z (of the same shape): z (value / z), the ratio held fixed, 0
    where z is 0.
    """
    return rewired(value, z, (value / z).masked_fill(z == 0, 0.0))


class Rules(TorchFunctionMode):
    """While active, everything that depends on a tensor with a gradient obeys the rules.

    linear, epsilon: the rule of linear maps. attention: relevance through values alone, or through
    queries and keys too (a fourth each, softmax by its own derivative), which conserves it no more.
    Parameters must not require gradients meanwhile. weighed: how many times something was weighed:
    by a softmax, a sigmoid, the fused kernel, or a matrix that the input makes.
    """

    def __init__(self, linear: Linear, epsilon: float, attention: Attention) -> None:
        super().__init__()
        self.linear = linear
        self.epsilon = epsilon
        self.attention = attention
        self.weighed = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        name = getattr(func, "__name__", "").strip("_")
        following = _following((*args, *kwargs.values()))
        if name not in RULED or not following:
            return func(*args, **kwargs)
        if name in HIDDEN:
            raise UnsupportedError("relevance", f"{name} has no rule")
        if name == KERNEL:
            return self.attended(func, args, kwargs)
        if name in QUOTIENTS:
            divisor = args[1].detach() if isinstance(args[1], Tensor) else args[1]
            return func(args[0], divisor, *args[2:], **kwargs)
        if name in LINEAR:
            return self.mapped(func, args, kwargs)
        value = func(*args, **kwargs)
        if name in NORMS:
            return NORMS[name](value, inspect.signature(func).bind(*args, **kwargs))
        if name in PRODUCTS:  # its relevance in equal parts to its factors
            self.weighed += following > 1 and name in MIXING
            return rewired(value, value, 1 / following) if following > 1 else value
        if name in PASSING or (name in POWERS and _exponent(args) > 0):
            return passed(value, args[0])
        return self.held(name, value)

    def attended(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """The fused kernel on q, k, v."""
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        self.weighed += 1
        if self.attention == "values":
            return func(q.detach(), k.detach(), v, *args[3:], **given)
        parts = (rewired(x, x, factor) for x, factor in ((q, 0.25), (k, 0.25), (v, 0.5)))
        return func(*parts, *args[3:], **given)

    def held(self, name: str, value: Tensor) -> Tensor:
        """Weights and inverses, held fixed."""
        self.weighed += name in WEIGHTS
        return value if name == "softmax" and self.attention == "all" else value.detach()

    def mapped(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """A linear map or convolution."""
        value = func(*args, **kwargs)
        if self.linear == "epsilon":
            stable = value + self.epsilon * torch.where(value < 0, -1.0, 1.0)
            return rewired(value, value, value / stable) if self.epsilon else value
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight = given.pop("input"), given.pop("weight")
        given.pop("bias", None)
        up = func(x.clamp(min=0), weight.clamp(min=0), None, *args[3:], **given)
        return passed(
            value, up + func(x.clamp(max=0), weight.clamp(max=0), None, *args[3:], **given)
        )


def _following(given: Iterable[Any]) -> int:
    """How many tensors with a gradient are among these, or in lists among these."""
    flat = (x for g in given for x in (g if isinstance(g, list | tuple) else (g,)))
    return sum(isinstance(x, Tensor) and x.requires_grad for x in flat)


def _exponent(args: Any) -> float:
    """The exponent of a power; 0 for one that is not a number."""
    power = args[1] if len(args) > 1 else 2
    return 0.0 if isinstance(power, Tensor) else power


def layer_norm(value: Tensor, bound: inspect.BoundArguments) -> Tensor:
    """Layer normalisation at a fixed standard deviation."""
    bound.apply_defaults()
    x, weight = bound.arguments["input"], bound.arguments["weight"]
    axes = tuple(range(-len(bound.arguments["normalized_shape"]), 0))
    scale = (x.var(axes, correction=0, keepdim=True) + bound.arguments["eps"]).rsqrt()
    factor = scale if weight is None else scale * weight
    return rewired(value, x - x.mean(axes, keepdim=True), factor)


def group_norm(value: Tensor, bound: inspect.BoundArguments) -> Tensor:
    """Group normalisation of (B,C,…) at fixed standard deviations."""
    bound.apply_defaults()
    x, weight = bound.arguments["input"], bound.arguments["weight"]
    grouped = x.unflatten(1, (bound.arguments["num_groups"], -1)).flatten(2)
    scale = (grouped.var(-1, correction=0, keepdim=True) + bound.arguments["eps"]).rsqrt()
    even = (grouped - grouped.mean(-1, keepdim=True)) * scale.detach()
    shape = (-1, *(1,) * (x.ndim - 2))
    return rewired(value, even.view_as(x), 1.0 if weight is None else weight.view(shape))


NORMS = {"layer_norm": layer_norm, "group_norm": group_norm}
RULED = frozenset().union(
    *(WEIGHTS, INVERSES, QUOTIENTS, POWERS, PASSING, PRODUCTS, LINEAR, HIDDEN, NORMS, {KERNEL})
)
