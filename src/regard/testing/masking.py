"""Checks of visibility: the future, masks, scale, padding, empty rows."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.card import Card
from regard.core.errors import UnsupportedError
from regard.core.mask import Mask, both
from regard.masks.document import Document
from regard.testing.compare import close, finite, same
from regard.testing.subject import Subject


def _replaced(
    inputs: list[Tensor], which: list[int], rows: Tensor | slice, value: float | None
) -> list[Tensor]:
    """Copies of the inputs with some token rows overwritten (None: by large random numbers)."""
    changed = [x.clone() for x in inputs]
    for i in which:
        part = changed[i][..., rows, :]
        changed[i][..., rows, :] = 10 * torch.randn_like(part) if value is None else value
    return changed


def future_invisible(card: Card) -> None:
    """Whatever comes later changes nothing at all in earlier rows."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        if not subject.causal or subject.cross:
            continue
        inputs = subject.inputs()
        before = subject.run(inputs)
        for t in range(1, subject.tokens):
            changed = _replaced(inputs, list(range(len(inputs))), slice(t, None), None)
            same(subject.run(changed)[..., :t, :], before[..., :t, :], f"rows before {t}")


def past_visible(card: Card) -> None:
    """Somewhere, other tokens do matter: a mechanism that mixes nothing does not pass for one."""
    if card.family == "free" and "past_visible" in card.gaps:
        raise AssertionError(card.gaps["past_visible"])
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        changed = _replaced(inputs, subject.sources(inputs), slice(0, 1), None)
        moved = (subject.run(changed) - subject.run(inputs)).abs().amax(-1)
        assert moved[..., 1:].max() > 1e-6, f"{pattern}: the first token reaches no other row"


def _halves(n: int, m: int, batch: int) -> Mask:
    queries, keys = torch.arange(n) >= n // 2, torch.arange(m) >= m // 2
    return Document(queries.long().expand(batch, n), keys.long().expand(batch, m))


def mask_honoured(card: Card) -> None:
    """A mask of the call is obeyed (hidden keys change nothing) or refused; never ignored."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        n, m = inputs[0].shape[-2], inputs[-1].shape[-2]
        call = subject.call()
        call = call.but(mask=both(call.mask, _halves(n, m, 2)))
        try:
            before = subject.run(inputs, call)
        except UnsupportedError:
            continue
        changed = _replaced(inputs, subject.sources(inputs), slice(m // 2, None), None)
        after = subject.run(changed, call)
        close(after[..., : n // 2, :], before[..., : n // 2, :], f"{pattern}: hidden keys", 1e-12)
        assert not torch.equal(after, before), f"{pattern}: visible keys do not matter"


def scale_honoured(card: Card) -> None:
    """call.scale changes the output or is refused; never ignored."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        inputs = subject.inputs()
        try:
            scaled = subject.run(inputs, subject.call(scale=0.83))
        except UnsupportedError:
            continue
        other = subject.run(inputs, subject.call(scale=0.29))
        assert not torch.allclose(scaled, other, rtol=1e-9), f"{pattern}: scale is ignored"


def _padded(subject: Subject, padding: Tensor) -> Call:
    return subject.padded_call(padding)


def padding_content(card: Card) -> None:
    """What stands in padded tokens, NaN included, changes neither real rows nor any gradient."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        clean = subject.inputs()
        m = clean[-1].shape[-2]
        padding = torch.ones(2, m, dtype=torch.bool)
        padding[0, m - 3 :] = False
        padding[1, m // 2] = False
        call = _padded(subject, padding)
        outputs, gradients = [], []
        for value in (0.0, float("nan")):
            inputs = [x.clone() for x in clean]
            which = subject.sources(inputs) if subject.cross else range(len(inputs))
            for i in which:
                inputs[i] = inputs[i].masked_fill(~_token_mask(padding, inputs[i]), value)
            inputs = [x.requires_grad_() for x in inputs]
            try:
                out = subject.run(inputs, call)
            except UnsupportedError:
                break
            real = out if subject.cross else out.masked_fill(~_token_mask(padding, out), 0.0)
            real.square().sum().backward()
            outputs.append(real)
            gradients.append([x.grad for x in inputs])
            _parameters_finite(subject, pattern)
        if not outputs:
            continue
        same(outputs[1], outputs[0], f"{pattern}: content of padding")
        for with_nan, without in zip(gradients[1], gradients[0], strict=True):
            if with_nan is None or without is None:
                assert with_nan is without, f"{pattern}: a gradient appears under padding"
                continue
            close(with_nan, without, f"{pattern}: gradient under padding", 1e-12)


def _token_mask(padding: Tensor, x: Tensor) -> Tensor:
    return padding[..., None] if x.ndim == 3 else padding[:, None, :, None]


def _parameters_finite(subject: Subject, what: str) -> None:
    if isinstance(subject.built, torch.nn.Module):
        for name, parameter in subject.built.named_parameters():
            finite(parameter.grad, f"{what}: gradient of {name} under padding")


def left_right_padding(card: Card) -> None:
    """The same tokens padded on the left, on the right, or not at all give the same rows."""
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        content = subject.inputs(n=card.example.length)
        n, m = content[0].shape[-2], content[-1].shape[-2]
        call = subject.call(grid=None)
        try:
            alone = subject.run(content, call)
            right = _run_padded(subject, content, 0, 4)
            left = _run_padded(subject, content, 4, 0)
        except UnsupportedError:
            continue
        rows = slice(None) if subject.cross else slice(0, n)
        late = slice(None) if subject.cross else slice(4, 4 + n)
        close(right[..., rows, :], alone, f"{pattern}: right padding ({m} keys)", 1e-10)
        close(left[..., late, :], alone, f"{pattern}: left padding ({m} keys)", 1e-10)


def _run_padded(subject: Subject, content: list[Tensor], left: int, right: int) -> Tensor:
    m = content[-1].shape[-2]
    padding = torch.zeros(2, left + m + right, dtype=torch.bool)
    padding[:, left : left + m] = True
    inputs = list(content)
    which = subject.sources(inputs) if subject.cross else range(len(inputs))
    for i in which:
        inputs[i] = torch.nn.functional.pad(inputs[i], (0, 0, left, right), value=3.7)
    call = subject.padded_call(padding).but(grid=None)
    if subject.cross and subject.causal:
        n = inputs[0].shape[-2]
        call = call.but(query_positions=torch.arange(m - n, m))
    return subject.run(inputs, call)


def empty_rows(card: Card) -> None:
    """A query that may see nothing, through padding or mask, gives zeros (operators) or numbers
    (layers), and finite gradients.
    """
    for pattern in card.patterns:
        subject = Subject(card, pattern)
        n, m = subject.inputs()[0].shape[-2], subject.inputs()[-1].shape[-2]
        padding = torch.ones(2, m, dtype=torch.bool)
        padding[1] = False
        _empty(subject, _padded(subject, padding))
        strangers = Document(torch.arange(2)[:, None].expand(2, n), torch.zeros(2, m).long())
        hidden = subject.call()
        _empty(subject, hidden.but(mask=both(hidden.mask, strangers)))


def _empty(subject: Subject, call: Call) -> None:
    """Row 1 of the batch sees nothing under this call."""
    inputs = [x.requires_grad_() for x in subject.inputs()]
    try:
        out = subject.run(inputs, call)
    except UnsupportedError:
        return
    if subject.card.kind == "operator":
        assert not out[1].any(), f"{subject.pattern}: an empty row is not zero"
    finite(out, f"{subject.pattern}: empty rows")
    out.square().sum().backward()
    for x in inputs:
        finite(x.grad, f"{subject.pattern}: gradient with empty rows")
    _parameters_finite(subject, subject.pattern)
