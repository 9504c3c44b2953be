"""Gates of SeerAttention: what they learn, how they are kept, where they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.mask import Causal
from regard.features.block_gate import BlockGate
from regard.importance.block_maxima import block_maxima
from regard.importance.gate_file import load_gates, save_gates
from regard.importance.gated_blocks import gate_logits
from regard.plan import Plan, Step
from regard.recipes.seer_gate import SeerTraining, gate_loss
from regard.testing.compare import close
from regard.testing.tiny import prompt, tiny_decoder

pytest.importorskip("transformers")


def test_target_is_the_largest_weight_of_a_block() -> None:
    q, k = torch.randn(2, 1, 2, 11, 4, dtype=torch.float64)
    real = torch.arange(12)[None] < 11
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 1), value=9.0) for x in (q, k)]
    target = block_maxima(padded[0], padded[1], real, 4, 0.5)
    scores = (q @ k.mT * 0.5).masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1)
    for a in range(3):
        row = [weights[0, 0, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4].max() for b in range(3)]
        close(target[0, 0, a], torch.stack(row) / sum(row), "row of blocks")


def test_gate_learns_one_sequence() -> None:
    """Overfitted, the three blocks it likes best hold nearly what the three largest do."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 2, 64, 8)
    k = k + 2 * torch.randn(1, 2, 16, 1, 8).expand(-1, -1, -1, 4, -1).flatten(2, 3)
    q = q + 2 * torch.randn(1, 2, 16, 1, 8).expand(-1, -1, -1, 4, -1).flatten(2, 3)
    gate, call = BlockGate(2, 8, block=4, width=64), Call(mask=Causal())
    optimiser = torch.optim.Adam(gate.parameters(), 1e-2)
    target = block_maxima(q, k, torch.ones(1, 64, dtype=torch.bool), 4, 8**-0.5)

    def share() -> float:
        guess = gate_logits(gate, q, k, call)[0]
        best, found = (target.gather(-1, x.topk(3).indices).sum(-1) for x in (target, guess))
        return (found / best)[:, :, 8:].mean().item()

    before = share()
    for _ in range(300):
        loss = gate_loss(gate, q, k, call, 8**-0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before < 0.5
    assert share() > 0.98


def batches() -> Iterator[Tensor]:
    while True:
        yield prompt(40, batch=2)


def test_training_and_file(tmp_path: Path) -> None:
    model, losses = tiny_decoder(), []
    before = {name: x.clone() for name, x in model.state_dict().items()}
    training = SeerTraining(model, block=4)
    gates = training.run(batches(), 40, lambda done, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    path = tmp_path / "gates.safetensors"
    save_gates(path, gates)
    again = load_gates(path)
    assert set(again) == set(gates) == {f"model.layers.{i}.self_attn" for i in range(3)}
    for name, gate in gates.items():
        close(again[name].k_maps.double(), gate.k_maps, name, 1e-6)
    found = []
    for file in (str(path), None):
        options = {"density": 0.4, "dense_rows": 1, "block": 4, "file": file}
        plan = Plan(steps=(Step(treatment="seer_attention", options=options),))
        with plan.applied(model), torch.no_grad():
            found.append(model(prompt(40)).logits)
    assert not torch.allclose(found[0], found[1], atol=1e-6), "the file's gates are not read"


def test_queries_mapped_too(tmp_path: Path) -> None:
    gate = BlockGate(4, 8, kv_heads=2, block=4, width=6, queries=("avg", "max"))
    save_gates(tmp_path / "one", {"a": gate})
    again = load_gates(tmp_path / "one")["a"]
    q, k = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
    real = torch.ones(1, 12, dtype=torch.bool)
    assert torch.equal(again(q, k, real), gate(q, k, real))
    assert torch.equal(again(q[:, 2:], k[:, 1:], real, heads=(2, 3)), gate(q, k, real)[:, 2:])


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no")
    with pytest.raises(ArgumentError, match="gates"):
        load_gates(wrong)
    save_gates(wrong, {"elsewhere": BlockGate(4, 8, block=4)})
    options = {"density": 0.4, "file": str(wrong)}
    with pytest.raises(ArgumentError, match="a gate of 4 heads"):
        Plan(steps=(Step(treatment="seer_attention", options=options),)).resolve(tiny_decoder())
    with pytest.raises(ArgumentError):
        save_gates(wrong, {})
