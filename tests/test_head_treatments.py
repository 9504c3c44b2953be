"""Treatments of single heads, against what they are by definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import GROUPED
from torch import Tensor

from regard.core.cutting import moment_of
from regard.core.errors import ArgumentError, UnsupportedError
from regard.core.incoming import Chosen, Memory, bare
from regard.core.maps import treated_maps
from regard.plan import Plan, PlanError, Step
from regard.testing.compare import close, same
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder
from regard.treatments.initial_token import InitialToken
from regard.treatments.mean_ablation import running_mean
from regard.treatments.sink_calibration import SinkCalibration, moved

transformers = pytest.importorskip("transformers")


def maps(tokens: int = 12, *, sink: int | None = None) -> Tensor:
    """Causal maps (2,3,N,N) in float64; one column may draw weight."""
    scores = torch.randn(2, 3, tokens, tokens, dtype=torch.float64)
    if sink is not None:
        scores[..., sink] += 5.0
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def run(model: Any, plan: Plan | None, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of one forward without a cache."""
    extra = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    with torch.no_grad():
        if plan is None:
            return model(ids, **inputs, **extra).logits
        with plan.applied(model):
            return model(ids, **inputs, **extra).logits


def plan_of(treatment: str, options: dict[str, Any] | None = None, **where: Any) -> Plan:
    return Plan(steps=(Step(treatment=treatment, options=options or {}, **where),))


@pytest.mark.parametrize("gamma", [0.3, 4.0])
def test_initial_token_scales_the_first_column_and_keeps_proportions(gamma: float) -> None:
    before = maps()
    after = treated_maps(before, InitialToken(gamma))
    expected = before.clone()
    expected[..., 0] *= gamma
    close(after, expected / expected.sum(-1, keepdim=True), "initial token", 1e-12)
    close(
        after[..., 5, 1:4] / after[..., 5, 4:5], before[..., 5, 1:4] / before[..., 5, 4:5], "", 1e-9
    )


def test_initial_token_at_zero_hides_it_where_there_is_another() -> None:
    before = maps()
    after = treated_maps(before, InitialToken(0.0))
    assert (after[:, :, 1:, 0] == 0).all()
    assert (after[:, :, 0, 0] == 1).all()
    rest = before[:, :, 1:, 1:]
    close(after[:, :, 1:, 1:], rest / rest.sum(-1, keepdim=True), "hidden", 1e-12)
    near = treated_maps(before, InitialToken(1e-12))
    close(after, near, "the limit of small gamma", 1e-9)


def test_sink_calibration_keeps_sums_and_the_first_token() -> None:
    before = maps(20, sink=4)
    after = treated_maps(before, SinkCalibration(beta=0.4, threshold=0.3))
    close(after.sum(-1), torch.ones(2, 3, 20).double(), "row sums", 1e-12)
    close(after[:, :, 4:, 4], 0.4 * before[:, :, 4:, 4], "the sink", 1e-9)
    assert (after[:, :, 5:, 0] > before[:, :, 5:, 0]).all()


def test_sink_calibration_to_nothing_is_a_hidden_key() -> None:
    before = maps(20, sink=4)
    after = treated_maps(before, SinkCalibration(beta=0.0, threshold=0.3))
    rest = before.clone()
    rest[..., 4] = 0
    close(after, rest / rest.sum(-1, keepdim=True), "masked", 1e-12)


def test_last_keys_are_judged_as_published_alone() -> None:
    """The last token's weight on itself is no mean."""
    before = maps(20, sink=0)
    before[:, :, -1] = torch.tensor([0.1, *[0.0] * 18, 0.9], dtype=torch.float64)
    close(treated_maps(before, SinkCalibration(threshold=0.5)), before, "ours", 1e-9)
    published = treated_maps(before, SinkCalibration(threshold=0.5, published=True))
    close(published[:, :, -1, -1], torch.full((2, 3), 0.36).double(), "published", 1e-6)


def test_published_sinks_spare_the_first_by_order() -> None:
    """A first token below the threshold leaves a real sink alone, as published; not here."""
    before = maps(20, sink=4)
    before[..., 0] *= 0.01
    before[:, :, 0, 0] = 1.0
    before = before / before.sum(-1, keepdim=True)
    published = treated_maps(before, SinkCalibration(threshold=0.3, published=True))
    close(published, before, "spared", 1e-9)
    assert (treated_maps(before, SinkCalibration(threshold=0.3))[:, :, 9:, 4] < 0.9).all()


def test_a_row_on_sinks_alone_stays() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.5, 0.3]])[None, None]
    sinks = torch.tensor([False, True, False])[None, None]
    after = moved(weights, weights.masked_fill(sinks[:, :, None], 0.0), sinks, 0.0)
    same(after[0, 0, 0], weights[0, 0, 0], "all on the sink")
    close(after[0, 0, 1], torch.tensor([0.4, 0.0, 0.6]), "dealt out", 1e-6)


def test_new_tokens_are_no_sinks_even_where_the_last_of_the_prompt_was() -> None:
    method, memory, x = SinkCalibration(threshold=0.5, margin=1), Memory(), torch.zeros(1, 1, 8, 4)
    step = Chosen(0, method, (0,), frozenset({"prefill", "decode"}))
    prompt_map = torch.eye(6)[None, None]
    prompt_map[:, :, :5] = torch.eye(6)[0]
    call = bare(*(x[:, :, :6],) * 3)
    found = method.weights(prompt_map, moment_of(call, (0,), None, memory, step))
    close(found[0, 0, 5], prompt_map[0, 0, 5], "nothing beside the sink", 1e-9)
    later = replace(bare(x[:, :, 7:], x, x), phase="decode")
    row = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0, 0.5, 0.3, 0.1])[None, None, None]
    after = method.weights(row, moment_of(later, (0,), None, memory, step))
    gain = 1 + 0.6 * 0.5 / 0.5
    expected = row * torch.tensor([gain, 1.0, 1.0, 1.0, 1.0, 0.4, gain, gain])
    close(after, expected, "slots 6 and 7 are new", 1e-6)


def test_published_decoding_judges_one_row_and_writes_one() -> None:
    method = SinkCalibration(threshold=0.2, published=True)
    x = torch.zeros(1, 1, 4, 4)
    call = replace(bare(x[:, :, 3:], x, x), phase="decode")
    row = torch.tensor([0.3, 0.25, 0.4, 0.05])[None, None, None]
    after = method.weights(row, moment_of(call, (0,), None, Memory(), None))
    freed = 0.6 * 0.65
    expected = [1.0, 0.4 * 0.25 + freed * 0.25, 0.4 * 0.4 + freed * 0.4, 0.05 + freed * 0.05]
    close(after[0, 0, 0], torch.tensor(expected), "as published", 1e-6)


def test_sinks_from_the_prompt_are_needed_in_decoding() -> None:
    model, ids = tiny_decoder(), prompt(20)
    plan = plan_of("sink_calibration", phases=("decode",))
    with plan.applied(model), torch.no_grad():
        out = model(ids, use_cache=True)
        with pytest.raises(UnsupportedError, match="prompt"):
            model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)


def test_temperature_is_a_scaled_query_projection() -> None:
    model, ids = tiny_encoder(), prompt(15, batch=2)
    got = run(model, plan_of("temperature", {"tau": 0.7}), ids)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if ".query." in name:
                x /= 0.7
    close(got, run(model, None, ids), "scaled queries", 1e-9)


def tiny_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    return transformers.T5EncoderModel(config).double().eval()


def test_temperature_divides_the_position_bias_too() -> None:
    """T5: dividing queries and the table of biases alike is the same."""
    model, ids = tiny_t5(), prompt(15, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    with torch.no_grad():
        with plan_of("temperature", {"tau": 0.7}).applied(model):
            got = model(ids, attention_mask=mask).last_hidden_state
        for name, x in model.named_parameters():
            if name.endswith("SelfAttention.q.weight") or "relative_attention_bias" in name:
                x /= 0.7
        expected = model(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    close(got[real], expected[real], "T5", 1e-9)


def test_uniform_heads_cancel_the_position_bias() -> None:
    model, ids = tiny_t5(), prompt(15, batch=2)
    with torch.no_grad():
        with plan_of("uniform_heads").applied(model):
            got = model(ids).last_hidden_state
        for name, x in model.named_parameters():
            if name.endswith("SelfAttention.q.weight") or "relative_attention_bias" in name:
                x.zero_()
        close(got, model(ids).last_hidden_state, "T5", 1e-9)


def test_temperature_divides_capped_scores() -> None:
    """Gemma 2 caps its scores; the temperature comes after."""
    config = transformers.Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=2.0,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(config).double().eval()
    ids = prompt(12)
    with torch.no_grad(), plan_of("temperature", {"tau": 0.5}).applied(model):
        got = model(ids, use_cache=False).logits
    module = model.model.layers[0].self_attn
    home = type(module).__module__

    def colder(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        cap = kwargs["softcap"]
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = cap * torch.tanh(q @ k.mT * kwargs["scaling"] / cap) / 0.5
        return ((scores + mask).softmax(-1) @ v).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(f"{home}.eager_attention_forward", colder)
        expected = model(ids, use_cache=False).logits
    close(got, expected, "softcap", 1e-9)


def test_queries_may_change_where_keys_were_evicted() -> None:
    """Temperature beside an eviction: as hiding the evicted keys."""
    steps = (
        Step(treatment="stream", options={"sinks": 2, "recent": 6}, kv_heads="0"),
        Step(treatment="temperature", options={"tau": 0.5}),
    )
    model, ids, found = tiny_decoder(), prompt(20), []
    for masked_only in (False, True):
        with Plan(steps=steps).applied(model, masked_only=masked_only), torch.no_grad():
            out = model(ids, use_cache=True)
            out = model(ids[:, :3], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    close(found[0], found[1], "evicted", 1e-9)


def head_outputs(model: Any, plan: Plan | None, ids: Tensor, **inputs: Any) -> Tensor:
    """What enters layer 1's output projection, (B,N,H,E)."""
    seen: list[Tensor] = []
    layer = model.model.layers[1].self_attn.o_proj
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run(model, plan, ids, **inputs)
    handle.remove()
    return seen[0].unflatten(-1, (4, -1))


def test_mean_ablation_is_the_running_mean_of_real_tokens() -> None:
    model, ids = tiny_decoder(), prompt(12, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    plain = head_outputs(model, None, ids, **inputs)
    plan = plan_of("mean_ablation", layers=[1], heads=[2])
    got = head_outputs(model, plan, ids, **inputs)
    same(got[:, :, [0, 1, 3]][0], plain[:, :, [0, 1, 3]][0], "other heads")
    for row, start in ((0, 0), (1, 4)):
        own = plain[row, start:, 2]
        expected = own.cumsum(0) / torch.arange(1, len(own) + 1)[:, None]
        close(got[row, start:, 2], expected, f"row {row}", 1e-9)


def test_what_padded_queries_give_never_counts() -> None:
    output, x = torch.randn(2, 1, 6, 4), torch.zeros(2, 1, 6, 4)
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    output[1, :, :2] = torch.nan
    at = moment_of(replace(bare(x, x, x), padding=real), (0,), None, Memory(), None)
    expected = output[1, 0, 2:].cumsum(0) / torch.arange(1, 5)[:, None]
    close(running_mean(output, at)[1, 0, 2:], expected, "padded", 1e-6)


def test_means_from_a_file(tmp_path: Path) -> None:
    from regard.recipes.head_means import head_means, save_head_means

    model, ids = tiny_decoder(), prompt(12, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    means = head_means(model, [{"input_ids": ids, "attention_mask": mask}])
    plain = head_outputs(model, None, ids, attention_mask=mask)
    name = "model.layers.1.self_attn"
    close(means[name].double(), plain[mask.bool()].mean(0), "mean over real tokens", 1e-6)
    path = save_head_means(model, [{"input_ids": ids, "attention_mask": mask}], tmp_path / "m.st")
    plan = plan_of("mean_ablation", {"file": str(path)}, layers=[1], heads=[2])
    got = head_outputs(model, plan, ids)
    close(got[:, :, 2], means[name][2].double().expand(2, 12, -1), "given mean", 1e-9)


def test_means_of_another_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.layers.1.self_attn": torch.zeros(3, 8)}, tmp_path / "other.st")
    (tmp_path / "text.st").write_text("no tensors here, only words that are long enough")
    for name in ("other.st", "text.st"):
        plan = plan_of("mean_ablation", {"file": str(tmp_path / name)}, layers=[1])
        with pytest.raises(ArgumentError, match="file"):
            plan.resolve(tiny_decoder())
    with pytest.raises(PlanError, match="file"):
        plan_of("mean_ablation", {"file": str(tmp_path / "missing")}).resolve(tiny_decoder())


def test_bidirectional_is_the_model_with_an_open_mask() -> None:
    model, ids = tiny_decoder(), prompt(12)
    opened = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    expected = run(model, None, ids, attention_mask=opened)
    close(run(model, plan_of("bidirectional"), ids), expected, "open", 1e-9)


@pytest.mark.parametrize("ahead", [None, 2])
def test_bidirectional_makes_a_window_symmetric(ahead: int | None) -> None:
    config = transformers.MistralConfig(
        **GROUPED,
        sliding_window=4,
    )
    model = transformers.MistralForCausalLM(config).double().eval()
    ids, place = prompt(12), torch.arange(12)
    distance = place[:, None] - place
    shown = distance.abs() < 4
    if ahead is not None:
        shown &= -distance <= ahead
    expected = run(model, None, ids, attention_mask=shown[None, None])
    close(run(model, plan_of("bidirectional", {"ahead": ahead}), ids), expected, "window", 1e-9)


def test_bidirectional_refuses_an_encoder() -> None:
    with pytest.raises(UnsupportedError, match="causal"):
        plan_of("bidirectional").resolve(tiny_encoder())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("initial_token", {"gamma": -1.0}),
        ("initial_token", {"gamma": float("inf")}),
        ("temperature", {"tau": 0.0}),
        ("head_gain", {"gamma": float("nan")}),
        ("mean_ablation", {"share": 1.5}),
        ("sink_calibration", {"beta": 2.0}),
        ("sink_calibration", {"margin": 0}),
        ("sink_calibration", {"threshold": 0.0}),
        ("shared_maps", {"block": 0}),
        ("layer_drop", {"sublayer": "norm"}),
        ("bidirectional", {"ahead": -1}),
    ],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        plan_of(name, options).resolve(tiny_decoder())


@pytest.mark.parametrize("name", ["head_gain", "mean_ablation", "uniform_heads", "initial_token"])
def test_gradients_pass(name: str) -> None:
    """A treated model can be trained."""
    options = {"gamma": 0.5} if name in ("head_gain", "initial_token") else {}
    model, ids = tiny_decoder(), prompt(12)
    with plan_of(name, options, heads=[1, 2]).applied(model):
        model(ids, use_cache=False).logits.square().mean().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
