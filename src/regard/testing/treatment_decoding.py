"""The part of the contract of treatments that concerns caches and decoding."""

from __future__ import annotations

import torch

from regard.testing.compare import close
from regard.testing.patient import STEPS, Patient
from regard.testing.tiny import prompt


def check_evicting_is_masking(patient: Patient) -> None:
    """Dropping keys gives what hiding them gives, for one-token and multi-token steps."""
    if "keep" not in patient.card.places or not patient.decodes:
        return
    for chunks in ((1,) * STEPS, (3, 1, 2)):
        dropped = patient.decoded(patient.plan(), patient.ids, chunks=chunks)
        hidden = patient.decoded(patient.plan(), patient.ids, chunks=chunks, masked_only=True)
        close(dropped, hidden, f"chunks {chunks}", 1e-9)


def check_decoding(patient: Patient) -> None:
    """Decoding token by token gives what one forward over the whole sequence gives."""
    if "keep" in patient.card.places or not patient.decodes:
        return
    ids = patient.ids
    whole = torch.cat([ids, prompt(STEPS, batch=2, seed=2)], 1)
    expected = patient.logits(patient.plan(), whole)[:, ids.shape[1] - 1 :]
    close(patient.decoded(patient.plan(), ids), expected, "decoding", 1e-9)


def check_reordering(patient: Patient) -> None:
    """When the rows of the cache change places, as beams do, so does all that follows."""
    if not patient.decodes:
        return
    ids, later = patient.ids, prompt(STEPS, batch=2, seed=2)
    straight, swapped = patient.decoded(patient.plan(), ids), []
    with patient.plan().applied(patient.model), torch.no_grad():
        cache = patient.model(ids, use_cache=True).past_key_values
        for t in range(STEPS):
            cache.reorder_cache(torch.tensor([1, 0]))
            rows = [0, 1] if t % 2 else [1, 0]
            out = patient.model(later[rows, t : t + 1], past_key_values=cache, use_cache=True)
            swapped.append(out.logits[rows])
    close(torch.cat(swapped, 1), straight[:, 1:], "rows that change places", 1e-9)


def check_future(patient: Patient) -> None:
    """Within a step of several tokens none sees a later one."""
    if not patient.decodes:
        return
    found = []
    for last in (7, 8):
        with patient.plan().applied(patient.model), torch.no_grad():
            cache = patient.model(patient.ids, use_cache=True).past_key_values
            step = torch.tensor([[4, 5, 6, last]] * 2)
            found.append(patient.model(step, past_key_values=cache, use_cache=True).logits)
    assert torch.equal(found[0][:, :3], found[1][:, :3])
    assert not torch.equal(found[0][:, 3], found[1][:, 3])


def check_no_padding_kept(patient: Patient) -> None:
    """After evictions no slot of the cache holds a padding token."""
    if "keep" not in patient.card.places:
        return
    ids, mask = patient.ids, torch.ones_like(patient.ids)
    mask[0, : ids.shape[1] // 2] = 0
    with patient.plan().applied(patient.model), torch.no_grad():
        cache = patient.model(ids, attention_mask=mask, use_cache=True).past_key_values
    for layer in cache.layers:
        for bucket in layer.memory.buckets or ():
            slots = bucket.views()[2]
            assert bool(((slots[0] < 0) | (slots[0] >= ids.shape[1] // 2)).all())


def check_beams(patient: Patient) -> None:
    """Beam search: the cache follows its beams, as hiding keys shows, or the untouched search."""
    if not patient.decodes:
        return
    ids, found = patient.ids, []
    for masked in (False, True):
        with patient.plan().applied(patient.model, masked_only=masked), torch.no_grad():
            found.append(
                patient.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=STEPS,
                    num_beams=3,
                    do_sample=False,
                    pad_token_id=0,
                )
            )
    assert torch.equal(found[0], found[1])
