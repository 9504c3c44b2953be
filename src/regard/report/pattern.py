r"""The mixing pattern of a mechanism, measured on random input, and a picture of it.

    operator, per head: A_ij = E |(d o_i / d v_j)^T u|        layer: A_ij = E |(d y_i / d x_j)^T u|

u is a random unit vector. For an operator that is linear in v, as softmax attention is, A_ij is the
mean size of the weight itself. A picture shows each row relative to its largest entry, so that late
rows, which share their weight among many tokens, can be read as well as early ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.core.call import Call
from regard.core.card import Card
from regard.core.errors import ArgumentError, RegardError, UnknownNameError, UnsupportedError
from regard.core.mask import Causal
from regard.layers.attention import bind_card

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES = 64
SUFFIXES = (".png", ".svg")
COLOURS = "cividis"  # grows in brightness alone: the same to every kind of colour vision
LONGEST = 512  # tokens; a longer matrix has more entries than a picture has room for
INCHES = 2.7  # of one panel
REACH = "read by the middle token"


@dataclass(frozen=True, eq=False)
class MixingPattern:
    """What was measured.

    weights: (H, N, M), one matrix per head; a layer has one. visible: (N, M), the fraction of heads
    whose own mask lets query i see key j; None without a mask that says all. grid: shape of
    the token grid that stands after `prefix` tokens.
    """

    label: str
    causal: bool
    grid: tuple[int, ...]
    prefix: int
    weights: Tensor
    visible: Tensor | None


def measure_pattern(
    card: Card, options: Mapping[str, Any], grid: tuple[int, ...] | None = None
) -> MixingPattern:
    """Measure a mechanism, freshly initialised, with its card's example and the given options.

    It is causal where it can be and the grid has one axis. `grid`: side lengths, (length,) for a
    sequence; by default the example's.

    Raises:
        UnknownNameError: an option it does not have.
        ArgumentError: a grid it does not know, or an option out of range.
    """
    grid = _checked(card, options, grid)
    example = card.example
    given = {**(example.sized(grid) if example.sized else {}), **options}
    chosen = {**example.options, **given}
    text = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    label = f"{card.name}({text})" if text else card.name
    causal = card.causal and (len(grid) == 1 or "noncausal self" not in card.patterns)
    call = Call(
        mask=Causal() if causal else None,
        grid=grid if len(grid) > 1 or 1 not in card.grids else None,
        prefix=example.prefix,
    )
    tokens = prod(grid) + example.prefix
    measure = _operator_weights if card.kind == "operator" else _layer_weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = measure(card, chosen, call, tokens)
        visible = _visible(card, chosen, call, tokens)
    except RegardError:
        raise
    except (TypeError, RuntimeError) as error:
        raise ArgumentError("options", "values the mechanism can run with", label) from error
    if visible is not None and weights[:, visible == 0].any():
        visible = None  # the card's mask tells caches what to drop, and is wider than this call's
    return MixingPattern(label, causal, grid, example.prefix, weights, visible)


def _checked(
    card: Card, options: Mapping[str, Any], grid: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The grid to measure on, if the mechanism knows such a grid and all the options."""
    for option in options:
        if option not in card.options:
            raise UnknownNameError(f"option of {card.name}", option, list(card.options))
    grid = grid or card.example.grid or (card.example.length,)
    if len(grid) not in card.grids or min(grid) < 1:
        raise ArgumentError("grid", f"{card.grids} axes, each 1 or longer", grid)
    if prod(grid) > LONGEST:
        raise ArgumentError("grid", f"at most {LONGEST} tokens", prod(grid))
    return grid


def draw_pattern(pattern: MixingPattern, path: Path) -> None:
    """Draw a pattern into a .png or .svg file: its mask if it has one, the mean over heads, each
    head, and on a 2-D grid what the token in the middle reads.

    Raises:
        ArgumentError: another kind of file, or one that cannot be written.
        UnsupportedError: matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError("out", f"a file that ends in {' or '.join(SUFFIXES)}", str(path))
    figure = _figure(pattern)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise ArgumentError("out", "a file that can be written", str(path)) from error


def _operator_weights(card: Card, options: Mapping[str, Any], call: Call, tokens: int) -> Tensor:
    example = card.example
    width = example.dim // example.heads
    run = bind_card(card, example.heads, width, options)
    if isinstance(run, nn.Module):
        run.eval()
    q, k, v = torch.randn(3, SAMPLES, example.heads, tokens, width)
    v.requires_grad_()
    return _reach(run(q, k, v, call).output, v)


def _layer_weights(card: Card, options: Mapping[str, Any], call: Call, tokens: int) -> Tensor:
    example = card.example
    layer = card.build(dim=example.dim, heads=example.heads, **options).eval()
    x, context = torch.randn(2, SAMPLES, tokens, example.dim)
    if any(pattern.endswith("self") for pattern in card.patterns):
        x.requires_grad_()
        return _reach(layer(x, call)[:, None], x)[None]
    context.requires_grad_()
    return _reach(layer(x, call, context=context)[:, None], context)[None]


def _reach(outputs: Tensor, source: Tensor) -> Tensor:
    """How much each row of outputs (S,H,N,E) depends on each row of the source (S,…,M,D): the mean
    over samples of the gradient's length, (…,N,M).
    """
    rows = []
    for i in range(outputs.shape[2]):
        u = nn.functional.normalize(torch.randn_like(outputs[:, :, i]), dim=-1)
        (found,) = torch.autograd.grad(
            (outputs[:, :, i] * u).sum(), source, retain_graph=True, materialize_grads=True
        )
        rows.append(found.norm(dim=-1).mean(0))
    return torch.stack(rows, -2)


def _visible(card: Card, options: Mapping[str, Any], call: Call, tokens: int) -> Tensor | None:
    if card.mask is None:
        return None
    known = inspect.signature(card.mask).parameters
    own = card.mask(**{name: value for name, value in options.items() if name in known})
    mask = call.visibility(own)
    if mask is None:
        return None
    rows = torch.empty(1, card.example.heads, tokens, 1)
    return mask.dense(call.frame(rows, rows))[0].float().mean(0)


def _figure(pattern: MixingPattern) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "regard show", "matplotlib is missing (pip install 'regard[plot]')"
        ) from error
    panels = _panels(pattern)
    columns = min(len(panels), min((3, 4), key=lambda count: -len(panels) % count))
    rows = -(-len(panels) // columns)
    size = (INCHES * columns + 0.9, INCHES * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_title(pattern))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for place, (title, values) in zip(axes, panels.items(), strict=False):
        image = place.imshow(values.numpy(), cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
        _dress(place, title, title == REACH)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes, label="relative to the row's largest", shrink=0.8)
    return figure


def _title(pattern: MixingPattern) -> str:
    parts = [pattern.label, "causal" if pattern.causal else "not causal"]
    if len(pattern.grid) > 1:
        parts.append(f"{' × '.join(map(str, pattern.grid))} tokens")
    if pattern.prefix:
        parts.append(f"{pattern.prefix} before them")
    return ", ".join(parts)


def _panels(pattern: MixingPattern) -> dict[str, Tensor]:
    """Titles and matrices in [0, 1], in the order they are drawn."""
    panels: dict[str, Tensor] = {}
    mean = _relative(pattern.weights.mean(0))
    if pattern.visible is not None:
        alike = bool(((pattern.visible == 0) | (pattern.visible == 1)).all())
        panels["may attend" if alike else "may attend, share of heads"] = pattern.visible
    panels["measured, mean of heads" if len(pattern.weights) > 1 else "measured"] = mean
    if len(pattern.grid) == 2:
        height, width = pattern.grid
        middle = pattern.prefix + height // 2 * width + width // 2
        panels[REACH] = mean[middle, pattern.prefix :].reshape(height, width)
    if len(pattern.weights) > 1:
        for head, weights in enumerate(pattern.weights):
            panels[f"head {head}"] = _relative(weights)
    return panels


def _relative(weights: Tensor) -> Tensor:
    largest = weights.amax(-1, keepdim=True)
    return weights / largest.masked_fill(largest == 0, 1.0)


def _dress(place: Axes, title: str, over_grid: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    place.set_title(title, fontsize="medium")
    place.set_xlabel("column" if over_grid else "key j")
    place.set_ylabel("row" if over_grid else "query i")
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
