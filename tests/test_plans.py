"""Plans on models: what is refused, what is undone, what is really saved."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core.errors import ArgumentError, RegardError, UnknownNameError, UnsupportedError
from regard.plan import Plan, PlanError, Step, Storage, signature
from regard.testing.tiny import prompt, tiny_decoder, tiny_encoder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model() -> Any:
    return tiny_decoder()


def stream(**where: Any) -> Plan:
    options = {"sinks": 2, "recent": 6}
    return Plan(steps=(Step(treatment="stream", options=options, **where),))


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


BAD_PLANS: list[tuple[str, str]] = [
    ("no JSON", "{"),
    ("a list", "[]"),
    ("another object", json.dumps({"a": 1})),
    ("a newer version", json.dumps({"schema_version": 2, "steps": []})),
    ("an unknown field", json.dumps({"schema_version": 1, "steps": [], "more": 1})),
    (
        "an unknown treatment",
        json.dumps({"schema_version": 1, "steps": [{"treatment": "snapkw"}]}),
    ),
    (
        "an unknown option",
        json.dumps({"schema_version": 1, "steps": [{"treatment": "stream", "options": {"x": 1}}]}),
    ),
    (
        "a budget above one",
        json.dumps(
            {"schema_version": 1, "steps": [{"treatment": "snapkv", "options": {"budget": 1.5}}]}
        ),
    ),
    (
        "an option of another type",
        json.dumps(
            {"schema_version": 1, "steps": [{"treatment": "stream", "options": {"recent": "x"}}]}
        ),
    ),
    (
        "a phase that is none",
        json.dumps({"schema_version": 1, "steps": [{"treatment": "stream", "phases": ["now"]}]}),
    ),
]


@pytest.mark.parametrize(("what", "text"), BAD_PLANS, ids=[what for what, _ in BAD_PLANS])
def test_files_that_are_no_plans(what: str, text: str) -> None:
    with pytest.raises(RegardError):
        Plan.read(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a JSON file"):
        Plan.load(tmp_path / "none.json")


def test_save_and_load(tmp_path: Path) -> None:
    plan = stream(layers="1-", kv_heads=[0])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "where",
    [
        {"layers": [3]},
        {"layers": "5-"},
        {"layers": "x"},
        {"heads": [7], "layers": [0]},
        {"heads": "0"},  # half a group of two
        {"heads": "0,1", "kv_heads": "0"},
        {"modules": "*vision*"},
    ],
)
def test_choices_that_do_not_fit(model: Any, where: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        stream(**where).resolve(model)


def test_numbers_from_the_end(model: Any) -> None:
    table = stream(layers="-2-", kv_heads="-1").resolve(model).table
    assert sorted(table) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert all(step.heads == (2, 3) for steps in table.values() for step in steps)


def test_made_for_another_model(model: Any) -> None:
    plan = stream().model_copy(update={"made_for": signature(tiny_encoder())})
    with pytest.raises(PlanError, match="made_for"), plan.applied(model):
        pass
    with stream().model_copy(update={"made_for": signature(model)}).applied(model):
        pass


def test_models_no_host_knows() -> None:
    with pytest.raises(UnsupportedError, match="no host"):
        stream().resolve(object())


def test_model_without_reachable_attention() -> None:
    config = transformers.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=8)
    with pytest.raises(UnsupportedError, match="can be reached"):
        stream().resolve(transformers.RwkvForCausalLM(config))


def test_implementation_without_dense_masks(model: Any) -> None:
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="flex_attention"), stream().applied(model):
        pass


def test_static_cache(model: Any) -> None:
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ArgumentError, match="StaticCache"), stream().applied(model):
        model(prompt(8), past_key_values=cache)


def test_cache_filled_before(model: Any) -> None:
    cache = model(prompt(8), use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="before the plan"), stream().applied(model):
        model(prompt(1), past_key_values=cache)


def test_cache_of_another_plan(model: Any) -> None:
    with stream().applied(model):
        cache = model(prompt(20), use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="another"), stream().applied(model):
        model(prompt(1), past_key_values=cache)


def test_dropout_is_refused(model: Any) -> None:
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(UnsupportedError, match="dropout"), stream().applied(model):
        model(prompt(20))


def test_nested_plans_do_not_mix(model: Any) -> None:
    ids, inner, outer = prompt(20), stream(layers=[0]), stream(layers=[2])
    with inner.applied(model):
        expected = generated(model, ids, return_dict_in_generate=True, output_logits=True)
    with outer.applied(model):
        alone = model(ids).logits
        with inner.applied(model) as run:
            got = generated(model, ids, return_dict_in_generate=True, output_logits=True)
            assert [len(x["buckets"][0]["heads"]) for x in run.report()["layers"]] == [2, 2, 2]
        assert torch.equal(model(ids).logits, alone)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_threads_do_not_mix(model: Any) -> None:
    """One thread under a plan, one under another, one without any, all on one model at once."""
    ids = prompt(24)
    plans: list[Plan | None] = [None, stream(layers=[0]), stream(layers=[1, 2])]

    def logits(plan: Plan | None) -> Tensor:
        if plan is None:
            return torch.stack(_decoded(model, ids))
        with plan.applied(model):
            return torch.stack(_decoded(model, ids))

    expected = [logits(plan) for plan in plans]
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(len(plans))

    def work(i: int) -> None:
        gate.wait(timeout=60)
        found[i] = logits(plans[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for i, value in enumerate(expected):
        assert torch.equal(found[i], value)
    assert model.config._attn_implementation == "sdpa"


def _decoded(model: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(ids, use_cache=True)
        found = [out.logits[:, -1]]
        for token in range(5, 12):
            step = torch.full((len(ids), 1), token)
            out = model(step, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return found


def test_sampling_runs_under_a_plan(model: Any) -> None:
    with stream().applied(model):
        torch.manual_seed(0)
        first = generated(model, prompt(20), do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(generated(model, prompt(20), do_sample=True), first)


def test_assisted_decoding_is_refused(model: Any) -> None:
    with pytest.raises((ValueError, UnsupportedError)), stream().applied(model):
        generated(model, prompt(20), assistant_model=tiny_decoder(seed=5))


def test_empty_plan_changes_nothing(model: Any) -> None:
    ids = prompt(20)
    before = model(ids).logits
    with Plan().applied(model):
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_bytes_drop_with_the_budget(model: Any, budget: float) -> None:
    plan = Plan(
        steps=(Step(treatment="snapkv", options={"budget": budget, "window": 8, "kernel": 1}),)
    )
    with plan.applied(model) as run, torch.no_grad():
        model(prompt(200, batch=2), use_cache=True)
    report = run.report()
    assert report["bytes"] <= (budget + 0.05) * report["dense_bytes"]
    assert report["compression_ratio"] == pytest.approx(1 - report["budget"])


def test_heads_hold_as_much_as_their_own_steps_say(model: Any) -> None:
    plan = Plan(
        steps=(
            Step(treatment="stream", options={"sinks": 2, "recent": 18}, kv_heads="0"),
            Step(treatment="stream", options={"sinks": 2, "recent": 48}, kv_heads="1", layers="0"),
        )
    )
    with plan.applied(model) as run, torch.no_grad():
        model(prompt(200), use_cache=True)
    held = [{tuple(b["heads"]): b["keys"] for b in x["buckets"]} for x in run.report()["layers"]]
    assert held == [{(0,): 20, (1,): 50}, {(0,): 20, (1,): 200}, {(0,): 20, (1,): 200}]


def test_padding_is_never_kept(model: Any) -> None:
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    with stream().applied(model), torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for layer in cache.layers:
        for bucket in layer.memory.buckets:
            slots = bucket.views()[2]
            assert ((slots[0] < 0) | (slots[0] >= 25)).all()


def test_explain_and_diff(model: Any) -> None:
    plan, other = stream(layers="1-", kv_heads="0"), stream(layers="1-")
    text = plan.explain(model)
    assert "model.layers.*.self_attn" in text
    assert "    1  0 0 . ." in text
    assert plan.diff(plan) == []
    assert [line[0] for line in plan.diff(other)] == ["-", "+"]


def test_a_prompt_shorter_than_the_window(model: Any) -> None:
    plan = Plan(steps=(Step(treatment="snapkv", options={"tokens": 64, "window": 32}),))
    ids = prompt(5)
    before = _decoded(model, ids)
    with plan.applied(model):
        assert torch.equal(torch.stack(_decoded(model, ids)), torch.stack(before))


def test_own_masks_are_refused_where_they_hide_the_padding(model: Any) -> None:
    mask = torch.ones(1, 1, 4, 24, dtype=torch.bool)
    with stream().applied(model), torch.no_grad():
        cache = model(prompt(20), use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="4-D mask"):
            model(prompt(4), attention_mask=mask, past_key_values=cache)


def test_unknown_treatment_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="snapkv"):
        Step(treatment="snapkw").build()


def test_submodule_alone(model: Any) -> None:
    """The base model called without its head goes through the plan too."""
    ids = prompt(20)
    with stream().applied(model) as run, torch.no_grad():
        model.model(ids, use_cache=True)
    assert run.report()["budget"] < 1


def test_quantised_storage_is_the_library_s_own(model: Any) -> None:
    model = model.float()
    ids, plan = prompt(40), Plan(storage=Storage(backend="fp8"))
    try:
        own = transformers.QuantizedCache(backend="fp8", config=model.config)
    except ValueError:
        pytest.skip("this version of transformers has no fp8 layers")
    with torch.no_grad():
        model(ids, past_key_values=own)
        expected = model(prompt(1), past_key_values=own).logits
        with plan.applied(model) as run:
            cache = model(ids, use_cache=True).past_key_values
            got = model(prompt(1), past_key_values=cache).logits
    assert torch.equal(got, expected)
    assert run.report()["budget"] == pytest.approx(0.25, abs=0.01)


def test_storage_and_eviction_exclude_each_other(model: Any) -> None:
    plan = stream(layers=[0]).model_copy(update={"storage": Storage(backend="fp8")})
    with pytest.raises(PlanError, match="storage"):
        plan.resolve(model)
    Plan(steps=plan.steps, storage=Storage(backend="fp8", layers="1-")).resolve(model)


def test_left_out_layers_count_as_saved(model: Any) -> None:
    plan = Plan(steps=(Step(treatment="layer_drop", layers=[0]),))
    with plan.applied(model) as run, torch.no_grad():
        model(prompt(30), use_cache=True)
    assert run.report()["budget"] == pytest.approx(2 / 3)


def test_what_is_left_out_is_left_out_in_both_phases(model: Any) -> None:
    plan = Plan(steps=(Step(treatment="layer_drop", layers=[0], phases=("decode",)),))
    with pytest.raises(PlanError, match="both phases"):
        plan.resolve(model)


def test_a_plan_that_was_never_asked_says_so(model: Any) -> None:
    def unheard() -> None:
        with stream().applied(model):
            model.set_attn_implementation("sdpa")
            model(prompt(8))

    with pytest.raises(UnsupportedError, match="never called"):
        unheard()
