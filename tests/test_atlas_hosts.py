"""The atlas on every family that hosts support: tiny models, saved, opened by what they are, and
shown data of their kind.
"""

from __future__ import annotations

import importlib
import json
import math
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CALLERS, DECODERS, ENCODERS, Built, library
from subjects import byte_tokenizer, small_llama
from typer.testing import CliRunner, Result

from regard.atlases.record import Atlas
from regard.atlases.survey import atlas
from regard.bench.showing.exhibit import Source
from regard.bench.showing.needles import questions
from regard.bench.showing.opening import open_model
from regard.bench.showing.speech import recordings, resampled
from regard.bench.subject import Subject
from regard.cli.atlas import told
from regard.cli.main import app
from regard.core.catalog import probe_cards
from regard.core.hosting import host_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own, about its defaults
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,:?'()"
QUICK = ("Llama", "GPT-2", "T5", "Whisper", "LLaVA", "BERT", "ViT", "CLIP")
"""Families of which one stands for each kind; the rest is slow."""
Text = "The cat sat on the mat, and the dog sat on the cat. " * 40


def tokenizer() -> Any:
    """One token per letter."""
    made = importlib.import_module("tokenizers")
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *LETTERS])}
    inner = made.Tokenizer(made.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = made.pre_tokenizers.Split("", "isolated")
    inner.normalizer = made.normalizers.Lowercase()
    return library().PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def save(family: str, built: Built, folder: Path) -> Path:
    """A family's model with the parts that turn data into its inputs."""
    model, inputs = built
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if "image_grid_thw" in inputs:
        part = library().Qwen2VLImageProcessor(
            patch_size=8,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32},
        )
        part.save_pretrained(folder)
    elif "pixel_values" in inputs:
        square = {"height": 32, "width": 32}
        library().ViTImageProcessor(size=square).save_pretrained(folder)
    if "input_features" in inputs:
        part = library().WhisperFeatureExtractor(feature_size=8, hop_length=400, chunk_length=1)
        part.save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["atlas", *map(str, arguments), "--no-progress"])


def heads_of(model: Any) -> dict[str, int]:
    """Heads of every tower."""
    found: dict[str, int] = {}
    for site in host_of(model).sites(model):
        found[site.tower] = found.get(site.tower, 0) + site.heads
    return found


def check(found: Atlas, model: Any, examples: int) -> None:
    """Every head of every tower has finite numbers of every sequence."""
    heads = heads_of(model)
    assert set(found.towers) == set(heads)
    entropy = [row for row in found.rows if row.metric == "entropy"]
    for tower, count in heads.items():
        mine = [row for row in entropy if row.tower == tower]
        assert len(mine) == count
        assert all(row.n >= examples for row in mine)
    assert all(math.isfinite(row.value) for row in found.rows if row.n)
    assert all(bool(torch.isfinite(profile).all()) for profile in found.profiles.values())


def opened(folder: Path, examples: int = 2, length: int = 24) -> tuple[Atlas, Any]:
    """The atlas of a saved model on what is at hand."""
    exhibit = open_model(str(folder))
    passages = exhibit.passages([Source()], examples, length)
    return atlas(exhibit.model, passages, examples=1), exhibit.model


def marked(names: Any) -> list[Any]:
    return [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in names]


@pytest.mark.parametrize("family", marked([*DECODERS, *ENCODERS]))
def test_family_of_transformers(family: str, tmp_path: Path) -> None:
    build = {**DECODERS, **ENCODERS}[family]
    found, model = opened(save(family, build(), tmp_path))
    check(found, model, 2)
    sites = host_of(model).sites(model)
    asked = family in ("LLaVA", "Qwen2.5-VL")
    expected = {
        f"{probe} at {site.tower}"
        for site in sites
        for probe, needs in (
            ("copying", not site.cross),
            ("distance", not site.cross),
            ("image_heads", asked and "language_model" in site.tower),
        )
        if not needs
    }
    known = ("copying", "distance", "image_heads")
    assert {note for note in found.notes if note.startswith(known)} == expected


@pytest.mark.parametrize("family", marked([*DECODERS, *ENCODERS]))
def test_every_probe_serves_or_says_why(family: str, tmp_path: Path) -> None:
    exhibit = open_model(str(save(family, {**DECODERS, **ENCODERS}[family](), tmp_path)))
    found = atlas(exhibit.model, exhibit.passages([Source()], 1, 16), "all", examples=0)
    served = {n for n, card in probe_cards().items() if set(card.metrics) & set(found.metrics)}
    assert {"entropy", "sinks"} <= served
    assert all(reason for reason in found.notes.values())
    assert ("cross_saliency" in served) == (family in ("T5", "Whisper"))
    assert ("vision_divergence" in served) == (family in ("LLaVA", "Qwen2.5-VL"))


@pytest.fixture
def kernel_callers(torchvision_schemas: None) -> Callable[[str], Built]:
    """Models of libraries that call the fused kernel themselves, where they are installed."""

    def build(family: str) -> Built:
        needs, made = CALLERS[family]
        try:
            importlib.import_module(needs)
        except ImportError:
            pytest.skip(f"{needs} is not installed")
        return made()

    return build


@pytest.mark.parametrize(
    "family", ["timm ViT", pytest.param("timm MaxViT", marks=[pytest.mark.slow])]
)
def test_timm(family: str, kernel_callers: Any, tmp_path: Path) -> None:
    model = kernel_callers(family)[0]
    given = (
        {"img_size": 32, "patch_size": 8, "depth": 2}
        if "MaxViT" not in family
        else {"img_size": 64}
    )
    hub = importlib.import_module("timm.models")
    hub.save_for_hf(model, tmp_path, model_args=given, safe_serialization=True)
    done = run(tmp_path, "--examples", "2", "--out", tmp_path / "atlas")
    assert done.exit_code == 0, done.output
    found = Atlas.load(tmp_path / "atlas")
    check(found, model, 2)
    windows = {"rings"} if "MaxViT" in family else set()  # in which patches are no image
    assert {note.split()[0] for note in found.notes} <= {"image_heads", *windows}
    assert run(tmp_path, "--probes", "all", "--examples", "1").exit_code == 0
    if family == "timm ViT":
        assert found.examples[0].grid == (4, 4)
        assert {len(example.spans[0].words) for example in found.examples} == {16}


@pytest.mark.parametrize("family", ["diffusers UNet", "diffusers SD3 transformer"])
def test_diffusers(family: str, kernel_callers: Any, tmp_path: Path) -> None:
    model = kernel_callers(family)[0]
    part = "unet" if "UNet" in family else "transformer"
    model.save_pretrained(tmp_path / part)
    index = {"_class_name": "AnyPipeline", part: ["diffusers", type(model).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in (tmp_path, tmp_path / part):
        done = run(folder, "--examples", "2", "--out", tmp_path / "atlas")
        assert done.exit_code == 0, done.output
        assert "random numbers" in done.stderr
        check(Atlas.load(tmp_path / "atlas"), model, 2)
    assert run(tmp_path, "--probes", "all", "--examples", "1").exit_code == 0


def test_prompts_of_a_pipeline(kernel_callers: Any, tmp_path: Path) -> None:
    """With its text encoder at hand, a pipeline is shown prompts, and they matter."""
    model = kernel_callers("diffusers UNet")[0]
    model.save_pretrained(tmp_path / "unet")
    t = library()
    config = t.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=1,
        eos_token_id=2,
    )
    t.CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    names = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "tokenizer": "T"}
    index = {name: ["library", kind] for name, kind in names.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", **index}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    exhibit = open_model(str(tmp_path))
    first, second = exhibit.passages([Source(prompts)], 2, 8)
    states = [passage.inputs["encoder_hidden_states"] for passage in (first, second)]
    assert states[0].shape == (1, 20, 16)
    assert not torch.equal(*states)
    assert int(first.inputs["timestep"]) == 250
    done = run(tmp_path, "--data", prompts, "--examples", "3")
    assert (done.exit_code, "at most 2" in done.stderr) == (2, True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Llama", DECODERS["Llama"](), tmp_path_factory.mktemp("decoder"))


def test_the_verb_on_kinds_of_text(decoder: Path, tmp_path: Path) -> None:
    for name, text in (("a", Text), ("b", Text.upper() + "?"), ("c", Text[::-1])):
        (tmp_path / f"{name}.txt").write_text(text)
    given = [f"{name}={tmp_path / name}.txt" for name in ("b", "c")]
    common = ["--length", "32", "--examples", "1", "--probes", "entropy,copying"]
    done = run(
        decoder, "--data", tmp_path / "a.txt", "--domain", given[0], "--domain", given[1], *common,
        "--examples-kept", "0", "--out", tmp_path / "one",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = Atlas.load(tmp_path / "one")
    assert {"entropy", "entropy@b", "entropy@c", "induction@c"} <= set(found.metrics)
    assert "distance" not in found.metrics
    assert found.examples == ()
    assert all(row.n == 3 for row in found.rows if row.metric == "entropy")
    assert run(decoder, *common, "--out", tmp_path / "two").exit_code == 0
    compared = run(tmp_path / "one", "--compare", tmp_path / "two", "--top", "2")
    assert compared.exit_code == 0, compared.output
    rows = [line for line in compared.stdout.splitlines() if "self_attn" in line]
    assert len(rows) == 2 * len(Atlas.load(tmp_path / "two").metrics)
    gaps = [abs(float(line.split("│")[6])) for line in rows if line.split()[1] == "entropy"]
    assert gaps[0] >= gaps[1] > 0


def test_captions_and_pictures(tmp_path: Path) -> None:
    folder = save("CLIP", ENCODERS["CLIP"](), tmp_path / "model")
    pillow = importlib.import_module("PIL.Image")
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a_red_wall.png", (200, 0, 0)), ("the sea.jpg", (0, 0, 99))):
        pillow.new("RGB", (40, 30), colour).save(tmp_path / "pictures" / name)
    exhibit = open_model(str(folder))
    passages = exhibit.passages([Source(tmp_path / "pictures")], 2, 24)
    assert [passage.grid for passage in passages] == [(4, 4), (4, 4)]
    assert [passage.prefix for passage in passages] == [1, 1]
    assert "".join(passages[0].words[0]) == "a red wall"
    done = run(folder, "--data", tmp_path / "pictures", "--examples", "3")
    assert (done.exit_code, "at most 2" in done.stderr) == (2, True)


@pytest.mark.parametrize("family", ["LLaVA", "Qwen2.5-VL"])
def test_pictures_with_a_question(family: str, tmp_path: Path) -> None:
    folder = save(family, DECODERS[family](), tmp_path)
    passage = open_model(str(folder)).passages([Source()], 1, 24)[0]
    image = passage.roles["image"]
    assert torch.equal(image, passage.tokens == 3)
    assert int(image.sum()) == (16 if family == "LLaVA" else 4)
    assert (passage.grid, passage.prefix) == (((4, 4), 1) if family == "LLaVA" else (None, 0))
    done = run(folder, "--examples", "1", "--out", tmp_path / "atlas")
    assert done.exit_code == 0, done.output
    check(Atlas.load(tmp_path / "atlas"), DECODERS[family]()[0], 1)


TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def test_a_question_in_the_template_of_a_model(tmp_path: Path) -> None:
    folder = save("LLaVA", DECODERS["LLaVA"](), tmp_path)
    assert len(open_model(str(folder)).notes) == 1
    text = tokenizer()
    text.chat_template = TEMPLATE
    text.save_pretrained(folder)
    exhibit = open_model(str(folder))
    assert exhibit.notes == ()
    words = exhibit.passages([Source()], 1, 24)[0].words[0]
    assert "".join(words) == f"user: {'<image>' * 16}what is in this picture?"
    text.chat_template = TEMPLATE.replace("<image>", "a picture")
    text.save_pretrained(folder)
    done = run(folder, "--examples", "1")
    assert (done.exit_code, "one token for a picture" in done.stderr) == (2, True)


def tone(path: Path, rate: int, width: int, pitch: float = 440.0) -> torch.Tensor:
    """A file of half a second, in stereo; what was written, in [-1, 1]."""
    time = torch.arange(rate // 2, dtype=torch.float64) / rate
    wanted = 0.5 * torch.sin(2 * math.pi * pitch * time)
    most = 1 << (8 * width - 1)
    whole = (wanted * (most - 1)).round().long() + (most if width == 1 else 0)
    raw = b"".join(int(x).to_bytes(width, "little", signed=width > 1) * 2 for x in whole.tolist())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return wanted


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings(width: int, tmp_path: Path) -> None:
    wanted = tone(tmp_path / "tone.wav", 8000, width)
    parts = recordings(tmp_path / "tone.wav", 8000, 2)
    assert [len(part) for part in parts] == [2000, 2000]
    assert torch.allclose(
        torch.cat(parts).double(), wanted, rtol=0, atol=2.0 ** (1 - 8 * width) + 1e-7
    )
    half = resampled(wanted, 8000, 4000)
    assert torch.allclose(half.double(), wanted[::2], rtol=0, atol=1e-6)


def test_speech(tmp_path: Path) -> None:
    folder = save("Whisper", DECODERS["Whisper"](), tmp_path / "model")
    tone(tmp_path / "tone.wav", 8000, 2)
    done = run(folder, "--data", tmp_path / "tone.wav", "--examples", "1", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    check(Atlas.load(tmp_path / "a"), DECODERS["Whisper"]()[0], 1)


def test_bad_input(decoder: Path, tmp_path: Path) -> None:
    """One line, exit code 2."""
    vision = save("ViT", ENCODERS["ViT"](), tmp_path / "vit")
    text, picture = tmp_path / "text.txt", tmp_path / "picture.png"
    text.write_text(Text)
    importlib.import_module("PIL.Image").new("RGB", (8, 8)).save(picture)
    for name, config in (
        ("empty", {}),
        ("plain", {"model_type": "resnet", "architectures": ["ResNetModel"]}),
        ("strange", {"model_type": "llama", "architectures": ["StrangeForCausalLM"]}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for given, reason in (
        ((vision, "--data", text), "pictures"),
        ((vision, "--data", tmp_path / "nothing"), "pictures"),
        ((vision, "--examples", "2", "--data", tmp_path), "at most 1"),
        ((decoder, "--data", picture, "--length", "24"), "text"),
        ((decoder, "--data", tmp_path / "none.txt", "--length", "24"), "text file"),
        ((decoder, "--data", text, "--length", "500"), "at most 128"),
        ((decoder, "--domain", "text.txt"), "NAME=FILE"),
        ((decoder, "--probes", "entropie", "--length", "8"), "entropy"),
        ((decoder, "--compare", tmp_path), "atlas.json"),
        ((tmp_path / "empty",), "transformers, timm or diffusers"),
        ((tmp_path / "strange",), "StrangeForCausalLM"),
        ((tmp_path / "broken",), "JSON"),
        ((tmp_path / "plain",), "plain"),
    ):
        done = run(*given)
        assert done.exit_code == 2, (given, done.output)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert reason in done.stderr, done.stderr


def test_notes_of_one_reason_are_one_line() -> None:
    notes = {"a at t.*.x": "a cannot serve this call: why", "a at t.*.y": "why", "b": "other"}
    assert told(notes) == ["a at t.*.x, t.*.y: why", "b: other"]


def test_names_of_timm(kernel_callers: Any) -> None:
    kernel_callers("timm ViT")
    done = run("timm:no_such_model")
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "no_such_model" in done.stderr


def test_a_model_without_attention(tmp_path: Path) -> None:
    config = library().ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    library().ResNetModel(config).save_pretrained(tmp_path)
    library().ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "no attention module" in done.stderr.strip().splitlines()[-1]


def test_questions_of_the_pocket_model(tmp_path: Path) -> None:
    done = run(
        "pocket", "--data", "needle", "--length", "128", "--examples", "3",
        "--probes", "retrieval,logit_lens", "--out", tmp_path / "atlas",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = Atlas.load(tmp_path / "atlas")
    assert {layer for layer, _ in found.select("retrieval", top=4)} == {1}


def test_questions_of_a_model_with_a_tokenizer() -> None:
    """The place is where the number stands, and the contrast holds another's."""
    subject = Subject("bytes", small_llama(257), byte_tokenizer())
    (passage,) = questions(subject, 3, 120)
    needle, answer = passage.roles["needle"], passage.answer
    assert passage.tokens is not None
    assert passage.contrast is not None
    assert answer is not None
    assert torch.equal(passage.tokens[needle].view_as(answer), answer)
    assert torch.equal(passage.contrast["input_ids"][needle].view_as(answer), answer.roll(1, 0))
    assert passage.words is not None
    assert "".join(passage.words[0]).endswith("The pass key is")
