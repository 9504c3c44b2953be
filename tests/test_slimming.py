"""Smaller models: what is left out equals what is silenced, and they run without this library."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.linears import blocks_of, root_mean_square, weight_of
from regard.searchers.amp import amp, sizes
from regard.searchers.configuring import admits
from regard.searchers.gate_costs import costs_of, everything_of
from regard.searchers.information_gates import FAMILIES, Factors, InformationGates, multiplied
from regard.searchers.settling import folded, settled
from regard.searchers.slimming import Kept, everything, parameters_of, slim
from regard.searchers.vtrans import Bottleneck, Gating, vtrans
from regard.testing.tiny import SHAPE, prompt, tiny_decoder, tiny_encoder

IDS = prompt(14, batch=2)
LAYERS, HEADS, UNITS, WIDTH = 3, 4, 48, 32
EVEN = tuple(range(0, UNITS, 2))


@pytest.fixture
def _precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that work in the precision they are given, and not in single."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def built(kind: Any, config: Any) -> Any:
    """A model in float64 whose biases are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config).double().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama(**more: Any) -> Any:
    return built(LlamaForCausalLM, LlamaConfig(**SHAPE, **more))


@torch.no_grad()
def silenced(model: Any, kept: Kept) -> Any:
    """The model of the same size whose other heads and units give nothing, and whose other layers
    and channels are zero.
    """
    model = copy.deepcopy(model)
    gone = [c for c in range(WIDTH) if kept.channels is not None and c not in kept.channels]
    for layer, one in enumerate(blocks_of(model)):
        joined, back = weight_of(one.joined), weight_of(one.back)
        size = joined.shape[1] // one.site.heads
        for head in set(range(one.site.heads)) - set(kept.heads[layer]):
            joined[:, head * size : (head + 1) * size] = 0
        back[:, sorted(set(range(one.width)) - set(kept.units[layer]))] = 0
        for weight in (joined, back):
            weight[gone] = 0
            if kept.layers is not None and layer not in kept.layers:
                weight.zero_()
    model.get_input_embeddings().weight[:, gone] = 0
    return model


EVERY_HEAD = (tuple(range(HEADS)),) * LAYERS
EVERY_UNIT = (tuple(range(UNITS)),) * LAYERS
CHOICES = {
    "groups": Kept(((0, 1), (2, 3), (0, 1)), EVERY_UNIT),
    "members": Kept(((0, 2), (1, 2), (1, 3)), EVERY_UNIT),
    "units": Kept(EVERY_HEAD, (EVEN, tuple(range(24)), EVEN)),
    "layers": Kept(EVERY_HEAD, EVERY_UNIT, layers=(0, 2)),
    "channels": Kept(EVERY_HEAD, EVERY_UNIT, channels=tuple(range(3, WIDTH, 2))[:12]),
    "all": Kept(
        ((0, 1), (0,), (2, 3)), (EVEN, (0,), EVEN), layers=(0, 2), channels=tuple(range(20))
    ),
}


@pytest.mark.parametrize("make", [tiny_decoder, tiny_encoder, lambda: llama(attention_bias=True)])
def test_all_of_a_model_is_the_model(make: Any) -> None:
    model = make()
    if make is tiny_encoder:
        with pytest.raises(UnsupportedError, match="feed-forward"):
            everything(model)
        return
    small = slim(model, everything(model))
    assert torch.equal(logits(small), logits(model))
    assert small is not model
    assert parameters_of(small) == parameters_of(model)


@pytest.mark.usefixtures("_precise")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_left_out_is_silenced(name: str, tied: bool) -> None:
    kept = CHOICES[name]
    model = llama(num_key_value_heads=2, tie_word_embeddings=tied)
    small = slim(model, kept)
    assert parameters_of(small) < parameters_of(model)
    torch.testing.assert_close(logits(small), logits(silenced(model, kept)), atol=1e-11, rtol=1e-11)


def test_biases_go_with_their_heads_and_units() -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    kept = Kept(((0, 1), (2, 3), (1, 3)), (EVEN,) * LAYERS)
    small = slim(model, kept)
    torch.testing.assert_close(logits(small), logits(silenced(model, kept)), atol=1e-12, rtol=0)


def test_a_configuration_that_is_given_the_width_of_heads() -> None:
    model = built(Qwen2ForCausalLM, Qwen2Config(**SHAPE, num_key_value_heads=2))
    kept = CHOICES["groups"]
    small = slim(model, kept)
    assert (small.config.num_attention_heads, small.config.head_dim) == (2, 8)
    torch.testing.assert_close(logits(small), logits(silenced(model, kept)), atol=1e-12, rtol=0)


def test_units_of_turned_weights() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64)
    model = built(GPT2LMHeadModel, config)
    kept = Kept(EVERY_HEAD, (EVEN,) * LAYERS)
    small = slim(model, kept)
    assert small.config.n_inner == len(EVEN)
    torch.testing.assert_close(logits(small), logits(silenced(model, kept)), atol=1e-12, rtol=0)
    with pytest.raises(UnsupportedError, match="together"):
        slim(model, Kept(((0, 1),) * LAYERS, EVERY_UNIT))


def test_three_heads_of_a_llama_are_a_mistral() -> None:
    model, kept = llama(), Kept(((0, 1, 2), (0, 1, 3), (1, 2, 3)), EVERY_UNIT)
    assert not admits(model, {"num_attention_heads": 3, "num_key_value_heads": 3})
    with pytest.raises(UnsupportedError, match="not a multiple"):
        slim(model, kept)
    small = slim(model, kept, into=MistralForCausalLM)
    assert isinstance(small, MistralForCausalLM)
    assert small.config.sliding_window is None
    torch.testing.assert_close(logits(small), logits(silenced(model, kept)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (Kept(((0, 1), (0, 1, 2, 3), (0, 1)), EVERY_UNIT), "layers would keep"),
        (Kept(((0, 1, 2),) * LAYERS, EVERY_UNIT), "groups of layer 0 would keep"),
        (Kept(EVERY_HEAD, ((0,), (0, 1), (0,))), "layers would keep"),
    ],
)
def test_what_a_configuration_cannot_say(kept: Kept, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        slim(tiny_decoder(), kept)


@pytest.mark.parametrize(
    "kept",
    [
        Kept(EVERY_HEAD[:2], EVERY_UNIT),
        Kept(((), (0,), (0,)), EVERY_UNIT),
        Kept(((1, 0),) * LAYERS, EVERY_UNIT),
        Kept(EVERY_HEAD, ((UNITS,),) * LAYERS),
        Kept(EVERY_HEAD, EVERY_UNIT, layers=(0, 3)),
        Kept(EVERY_HEAD, EVERY_UNIT, channels=(-1, 2)),
    ],
)
def test_numbers_that_are_out_of_order(kept: Kept) -> None:
    with pytest.raises(ArgumentError):
        slim(tiny_decoder(), kept)


def test_a_norm_that_takes_a_mean_off_keeps_its_channels() -> None:
    assert root_mean_square(torch.nn.RMSNorm(8), 8)
    assert not root_mean_square(torch.nn.LayerNorm(8), 8)
    assert not root_mean_square(torch.nn.LayerNorm(8, bias=False), 8)


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
given = torch.load(sys.argv[1] + "/case.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(input_ids=given["ids"]).logits, given["logits"])
assert not any(name.startswith("regard") for name in sys.modules)
"""


@pytest.mark.parametrize("into", [None, MistralForCausalLM])
def test_it_runs_elsewhere_without_this_library(into: type | None, tmp_path: Path) -> None:
    heads = ((0, 1), (0, 1), (2, 3)) if into is None else ((0, 1, 2),) * LAYERS
    model = llama(num_key_value_heads=2 if into is None else 4, tie_word_embeddings=True).float()
    small = slim(model, Kept(heads, (EVEN,) * LAYERS, layers=(0, 2)), into=into)
    small.save_pretrained(tmp_path)
    torch.save({"ids": IDS, "logits": logits(small)}, tmp_path / "case.pt")
    code = [sys.executable, "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# AMP


def passages(padded: bool = False) -> list[dict[str, Tensor]]:
    given: dict[str, Tensor] = {"input_ids": IDS}
    if padded:
        mask = torch.ones_like(IDS)
        mask[0, :5] = 0
        given["attention_mask"] = mask
    return [given, {"input_ids": prompt(9, seed=4)}]


def test_a_silent_head_and_unit_have_no_size() -> None:
    model = tiny_decoder()
    with torch.no_grad():
        blocks_of(model)[1].joined.weight[:, 8:16] = 0  # type: ignore[index]
        blocks_of(model)[2].units[1].weight[5] = 0  # type: ignore[index]
    found = sizes(model, passages())
    assert found.heads[1, 1] == 0
    assert found.units[2, 5] == 0
    assert int((found.heads == 0).sum()) == int((found.units == 0).sum()) == 1


def test_sizes_do_not_depend_on_padding() -> None:
    model = tiny_decoder()
    alone = [{"input_ids": IDS[:1, 5:]}, {"input_ids": IDS[1:]}, passages()[1]]
    for name in ("heads", "units"):
        torch.testing.assert_close(
            getattr(sizes(model, passages(padded=True)), name),
            getattr(sizes(model, alone), name),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("keys", ["groups", "members"])
@pytest.mark.parametrize("ratio", [0.1, 0.35])
def test_amp_removes_what_is_asked(keys: Any, ratio: float) -> None:
    model = tiny_decoder()
    found = amp(model, passages(), ratio, keys=keys)
    per_unit = LAYERS * 3 * WIDTH
    assert abs(found.ratio - ratio) * found.parameters_before <= per_unit / 2 + 1
    assert parameters_of(found.model) == found.parameters
    torch.testing.assert_close(
        logits(found.model), logits(silenced(model, found.kept)), atol=1e-12, rtol=0
    )


def test_amp_as_published_counts_a_head_as_a_unit() -> None:
    model = llama()
    found = amp(model, passages(), 0.2, balance="published", into=MistralForCausalLM)
    total = parameters_of(model)
    room = sum(p.numel() for one in blocks_of(model) for m in one.all for p in m.parameters())
    part = 0.2 * total / room
    gone = round(part * HEADS)
    assert {len(heads) for heads in found.kept.heads} == {HEADS - gone}
    cut = round(UNITS * ((HEADS / UNITS) * (part - gone / HEADS) + part))
    assert {len(units) for units in found.kept.units} == {UNITS - cut}


def test_amp_keeps_the_largest() -> None:
    model = llama()
    found, size = amp(model, passages(), 0.3), sizes(model, passages())
    for layer, heads in enumerate(found.kept.heads):
        weakest = size.heads[layer, list(heads)].min()
        others = [h for h in range(HEADS) if h not in heads]
        assert bool((size.heads[layer, others] <= weakest).all())


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.95])
def test_amp_refuses_ratios(ratio: float) -> None:
    with pytest.raises(ArgumentError, match="ratio"):
        amp(tiny_decoder(), passages(), ratio)


# VTrans


def gates_of(model: Any, **ratios: list[int]) -> InformationGates:
    """Gates of every family without noise; those that are named are shut."""
    gates = InformationGates(model, blocks_of(model), FAMILIES)
    with torch.no_grad():
        for name in FAMILIES:
            gates.mu[name].normal_(1.0, 0.1, generator=gates.random)
            gates.log_noise[name].fill_(-20.0)
            gates.log_noise[name].view(-1)[ratios.get(name, [])] = 20.0
    return gates.double()


def test_open_gates_of_one_without_noise_change_nothing() -> None:
    model = tiny_decoder()
    gates = InformationGates(model, blocks_of(model), FAMILIES).double()
    with torch.no_grad():
        for name in FAMILIES:
            gates.mu[name].fill_(1.0)
            gates.log_noise[name].fill_(-200.0)
        with multiplied(model, blocks_of(model), gates.drawn(2)):
            found = logits(model)
    assert torch.equal(found, logits(model))


def test_information_falls_to_zero_with_the_signal() -> None:
    model = tiny_decoder()
    gates, weights = gates_of(model), dict.fromkeys(FAMILIES, 1.0)
    before = float(gates.information(weights).detach())
    with torch.no_grad():
        for name in FAMILIES:
            gates.mu[name].zero_()
    assert before > float(gates.information(weights).detach()) == 0.0


@pytest.mark.usefixtures("_precise")
@pytest.mark.parametrize("tied", [False, True])
def test_gates_that_are_folded_in_are_the_gates(tied: bool) -> None:
    model = llama(num_key_value_heads=2, tie_word_embeddings=tied)
    shut = {"heads": [0, 3, 5], "units": [3, 50, 99], "channels": [1, 2, 7, 30], "layers": [1]}
    means = gates_of(model, **shut).means()
    zeroed = Factors(*(x.clone() for x in vars(means).values()))
    for name, places in shut.items():
        getattr(zeroed, name).view(-1)[places] = 0
    kept = Kept(
        ((2, 3), (0, 1), (0, 1)),
        tuple(tuple(u for u in range(UNITS) if u != gone) for gone in (3, 2, 3)),
        (0, 2),
        tuple(c for c in range(WIDTH) if c not in shut["channels"]),
    )
    small = slim(folded(model, means), kept)
    with multiplied(model, blocks_of(model), zeroed):
        found = logits(model)
    torch.testing.assert_close(logits(small), found, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_expected_cost_of_settled_gates_is_the_cost(measure: Any) -> None:
    model = llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    shut = {"heads": [0, 2, 4], "units": [3, 50, 99], "channels": [1, 2, 7, 30], "layers": [1]}
    gates, costs = gates_of(model, **shut), costs_of(model, blocks_of(model), measure, 64)
    kept = Kept(
        ((2, 3), (2, 3), (2, 3)),
        tuple(tuple(u for u in range(UNITS) if u != gone) for gone in (3, 2, 3)),
        (0, 2),
        tuple(c for c in range(WIDTH) if c not in shut["channels"]),
    )
    small = slim(model, kept)
    wanted: float = parameters_of(small)
    if measure == "flops":
        wanted = float(
            everything_of(costs_of(small, blocks_of(small), measure, 64), small, blocks_of(small))
        )
    assert float(costs.expected(gates.soft()).detach()) == pytest.approx(wanted, rel=1e-9)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = llama(num_key_value_heads=2)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=prompt(64))
    costs = costs_of(model, blocks_of(model), "flops", 64)
    scores = 4 * 32 * WIDTH * LAYERS  # causal: half of what a matrix of all pairs takes
    rotary = 2 * 4  # the positions' angles
    found = counter.get_total_flops() / 64
    assert float(everything_of(costs, model, blocks_of(model))) + scores + rotary == pytest.approx(
        found, rel=1e-3
    )


def test_the_target_is_reached() -> None:
    model = tiny_decoder().float()
    batches = repeat({"input_ids": prompt(20, batch=4)})
    ratios = []
    lesson: list[Gating] = []
    original = Gating.__init__

    def noted(self: Gating, *args: Any) -> None:
        original(self, *args)
        lesson.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gating, "__init__", noted)
        found = vtrans(
            model,
            batches,
            300,
            0.4,
            variant="faster",
            options=Bottleneck(
                weights={"heads": 256.0, "units": 1.0, "channels": 1.0, "layers": 1.0},
                gate_rate=0.1,
            ),
            watch=lambda _: ratios.append(float(lesson[0].expected_ratio().detach())),
        )
    assert abs(ratios[-1] - 0.4) < 0.01
    assert abs(found.ratio - 0.4) < 0.02
    assert logits(found.model).shape == (2, 14, 61)


def test_a_head_that_gives_nothing_is_shut_and_a_needed_one_is_not() -> None:
    model = llama().float()
    silent = ((0, 1), (1, 2), (0, 3))
    with torch.no_grad():
        for one, heads in zip(blocks_of(model), silent, strict=True):
            for head in heads:
                weight_of(one.joined)[:, 8 * head : 8 * head + 8] = 0
    found = vtrans(
        model,
        repeat({"input_ids": prompt(16, batch=4)}),
        200,
        LAYERS * 2 * 4 * 8 * WIDTH / parameters_of(model),
        variant="faster",
        options=Bottleneck(families=("heads",), weights={"heads": 1.0}, gate_rate=0.3),
        teacher=model,
    )
    wanted = tuple(tuple(h for h in range(HEADS) if h not in heads) for heads in silent)
    assert found.kept.heads == wanted
    assert found.ratio == pytest.approx(LAYERS * 2 * 4 * 8 * WIDTH / parameters_of(model))


@pytest.mark.parametrize("variant", ["full", "fast", "faster"])
def test_variants(variant: Any) -> None:
    model = tiny_decoder()
    before = logits(model)
    seen: list[int] = []

    def stream() -> Any:
        for number in range(40):
            seen.append(number)
            yield {"input_ids": prompt(8, seed=number)}

    found = vtrans(model, stream(), 40, 0.3, variant=variant, teacher=model)
    assert len(seen) == (40 if variant == "full" else 2)
    assert torch.equal(logits(model), before)
    assert found.parameters < found.parameters_before


def test_vtrans_is_the_same_under_a_seed() -> None:
    model = tiny_decoder()
    first, second = (vtrans(model, repeat({"input_ids": IDS}), 10, 0.3, seed=5) for _ in range(2))
    assert first.kept == second.kept
    assert torch.equal(logits(first.model), logits(second.model))


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.0}, {"variant": "slow"}])
def test_vtrans_refuses(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"ratio": 0.3, **wrong}
    with pytest.raises(ArgumentError):
        vtrans(tiny_decoder(), repeat({"input_ids": IDS}), 4, **given)
    with pytest.raises(ArgumentError):
        vtrans(tiny_decoder(), [{"input_ids": IDS}], 4, 0.3)
    with pytest.raises(ArgumentError):
        vtrans(
            tiny_decoder(),
            repeat({"input_ids": IDS}),
            4,
            0.3,
            options=Bottleneck(families=("words",)),
        )


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6])
@pytest.mark.parametrize(
    "shut",
    [{}, {"layers": [0, 2]}, {"heads": [0, 1, 2, 3, 4]}, {"channels": list(range(24))}],
    ids=lambda shut: "-".join(shut) or "none",
)
def test_whatever_gates_are_shut_the_target_is_met(
    shut: dict[str, list[int]], ratio: float
) -> None:
    model = llama(num_key_value_heads=2)
    gates, costs = gates_of(model, **shut), costs_of(model, blocks_of(model), "parameters")
    kept = settled(gates, costs, (1 - ratio) * parameters_of(model), model)
    left = parameters_of(slim(model, kept)) / parameters_of(model)
    assert left == pytest.approx(1 - ratio, abs=0.02)


@pytest.mark.slow
def test_a_pocket_model_without_its_weakest_parts_reads_better_than_without_random_ones() -> None:
    import regard.pocket
    from regard.recipes.pocket_language import losses
    from regard.tasks.needle import Needle

    model, _ = regard.pocket.language()
    stream = Needle(256, facts=8, asked=8).batches("train", 8)
    given = [{"input_ids": next(stream).inputs} for _ in range(4)]
    test = next(iter(Needle(512, facts=20, asked=20).batches("test", 8)))

    @torch.no_grad()
    def text(one: Any) -> float:
        return losses(one, test.inputs, test.targets)[1].item()

    found = amp(model, given, 0.35)
    units = len(found.kept.units[0])
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        heads = tuple(
            tuple(2 * group + i for i in (0, 1))
            for group in torch.randint(0, 2, (4,), generator=random).tolist()
        )
        drawn = (torch.randperm(256, generator=random)[:units].sort().values for _ in range(4))
        other = slim(model, Kept(heads, tuple(tuple(x.tolist()) for x in drawn)))
        assert text(model) < text(found.model) < text(other)
