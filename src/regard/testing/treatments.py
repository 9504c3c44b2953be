"""The contract of treatments, on tiny transformers models in float64: every check runs on every
card, none names a treatment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.core.treatment import Treatment
from regard.plan import Plan, Step
from regard.testing.compare import close
from regard.testing.patient import STEPS, Patient
from regard.testing.tiny import prompt
from regard.testing.treatment_decoding import (
    check_beams,
    check_decoding,
    check_evicting_is_masking,
    check_future,
    check_no_padding_kept,
    check_reordering,
)


def check_json(patient: Patient) -> None:
    """A plan survives JSON, and an unknown option or a foreign version is refused."""
    plan = patient.plan()
    assert Plan.read(plan.text()) == plan
    for text in (
        plan.text().replace('"schema_version": 1', '"schema_version": 99'),
        plan.text().replace('"treatment"', '"unheard_of": 1, "treatment"'),
    ):
        try:
            Plan.read(text)
        except ValueError:
            continue
        raise AssertionError("a foreign version or field was read without an error")


def check_acts(patient: Patient) -> None:
    """The example changes the output, in the prompt or in what follows."""
    if patient.decodes:
        changed, plain = (patient.decoded(p, patient.ids) for p in (patient.plan(), None))
    else:
        changed, plain = (patient.logits(p, patient.ids) for p in (patient.plan(), None))
    assert changed.isfinite().all()
    assert not torch.allclose(changed, plain, rtol=0, atol=1e-6)


def check_other_heads(patient: Patient) -> None:
    """Heads that are not chosen give, bit for bit, what they gave."""
    if patient.card.build.removes is not Treatment.removes:
        return
    site = patient.plan().resolve(patient.model).sites[1]
    group = site.group
    plan = patient.plan(layers=(1,), heads=tuple(range(group)))
    with torch.no_grad():
        plain = _head_outputs(patient, None, site.name)
        changed = _head_outputs(patient, plan, site.name)
    width = plain.shape[-1] // site.heads
    assert torch.equal(changed[..., group * width :], plain[..., group * width :])


def _head_outputs(patient: Patient, plan: Plan | None, name: str) -> Tensor:
    """What enters the output projection of one layer, (B,N,H*E)."""
    module = patient.model.get_submodule(name)
    seen: list[Tensor] = []
    projection = next((c for n, c in module.named_children() if n in ("o_proj", "out_proj")), None)
    if projection is None:
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    else:
        handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    patient.logits(plan, patient.ids)
    handle.remove()
    return seen[0]


def check_neutral(patient: Patient) -> None:
    """Neutral options change no bit."""
    if patient.card.neutral is None:
        return
    plan = patient.plan(patient.card.neutral)
    assert torch.equal(patient.logits(plan, patient.ids), patient.logits(None, patient.ids))
    if patient.decodes:
        changed, plain = (patient.decoded(p, patient.ids) for p in (plan, None))
        assert torch.equal(changed, plain)


def check_restored(patient: Patient) -> None:
    """Afterwards the model is as before, also after an exception inside."""
    model, ids = patient.model, patient.ids
    before = patient.logits(None, ids)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    implementation = model.config._attn_implementation
    with patient.plan().applied(model), torch.no_grad():
        model(ids)
    try:
        with patient.plan().applied(model):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(patient.logits(None, ids), before)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def check_padding(patient: Patient) -> None:
    """Unequal prompts in a batch, left- or right-padded, give what each gives alone."""
    length = patient.card.example.length
    long, short = prompt(length, seed=3), prompt(length - length // 3, seed=4)
    pads = torch.zeros(1, length - short.shape[1], dtype=torch.long)
    ones = torch.ones_like(short)
    for side in ("left", "right"):
        parts = [(pads, short), (pads, ones)] if side == "left" else [(short, pads), (ones, pads)]
        row, real = (torch.cat(part, 1) for part in parts)
        ids, mask = torch.cat([long, row]), torch.cat([torch.ones_like(long), real])
        for i, (got, alone) in enumerate(_together_and_alone(patient, ids, mask)):
            close(got, alone, f"row {i}, padded {side}", 1e-9)


def _together_and_alone(patient: Patient, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each row's logits in the padded batch and by itself."""
    plan, rows = patient.plan(), range(len(ids))
    if patient.decodes:
        both = patient.decoded(plan, ids, mask=mask)
        return [(both[i], _alone(patient, ids, mask, i)) for i in rows]
    found, real = patient.logits(plan, ids, mask), mask.bool()
    return [(found[i, real[i]], patient.logits(plan, ids[i : i + 1, real[i]])[0]) for i in rows]


def _alone(patient: Patient, ids: Tensor, mask: Tensor, row: int) -> Tensor:
    """One row of a padded batch by itself, without its padding."""
    real = mask[row].bool()
    later = prompt(STEPS, batch=2, seed=2)[row : row + 1]
    mine = ids[row : row + 1, real]
    with patient.plan().applied(patient.model), torch.no_grad():
        out = patient.model(mine, use_cache=True)
        found = [out.logits[:, -1:]]
        for t in range(STEPS):
            out = patient.model(
                later[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits)
    return torch.cat(found, 1)[0]


def check_limits(patient: Patient) -> None:
    """Where the card says that it coincides with something else, it does."""
    for limit in patient.card.limits:
        other = None
        if limit.other is not None:
            step = Step(treatment=limit.other, options=dict(limit.other_options))
            other = Plan(steps=(step.model_copy(update={"layers": patient.card.example.layers}),))
        plan = patient.plan(limit.options)
        if patient.decodes:
            got, expected = (patient.decoded(p, patient.ids) for p in (plan, other))
        else:
            got, expected = (patient.logits(p, patient.ids) for p in (plan, other))
        close(got, expected, f"limit {dict(limit.options)}", 1e-9)


Check = Callable[[Patient], None]
TREATMENT_CHECKS: dict[str, Check] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_json,
        check_acts,
        check_other_heads,
        check_neutral,
        check_restored,
        check_padding,
        check_evicting_is_masking,
        check_decoding,
        check_limits,
        check_reordering,
        check_future,
        check_no_padding_kept,
        check_beams,
    )
}
