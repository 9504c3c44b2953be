"""Tiny models with random weights of the families that hosts support: name -> (model, inputs)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
Built = tuple[Any, dict[str, Any]]


def library() -> Any:
    """transformers, imported late: tests that need it are skipped without it."""
    return importlib.import_module("transformers")


def ids(length: int = 24) -> Tensor:
    """Random tokens (1, N), none of them special."""
    return torch.randint(5, VOCABULARY, (1, length))


def pixels() -> Tensor:
    """One random image (1, 3, 32, 32)."""
    return torch.randn(1, 3, 32, 32)


def text(model: str, config: str, **options: Any) -> Callable[[], Built]:
    """A language model by the names of its classes."""

    def build() -> Built:
        built = getattr(library(), model)(getattr(library(), config)(**options))
        return built.eval(), {"input_ids": ids()}

    return build


def image(model: str, config: str) -> Callable[[], Built]:
    """A vision model by the names of its classes."""

    def build() -> Built:
        built = getattr(library(), model)(getattr(library(), config)(**IMAGE))
        return built.eval(), {"pixel_values": pixels()}

    return build


def two_towers(model: str, config: str, **options: Any) -> Callable[[], Built]:
    """A text and a vision encoder in one model."""

    def build() -> Built:
        made = getattr(library(), config)(text_config=TEXT, vision_config=IMAGE, **options)
        built = getattr(library(), model)(made).eval()
        return built, {"input_ids": ids(), "pixel_values": pixels()}

    return build


def llava() -> Built:
    """A vision–language model whose image tokens stand in front."""
    t = library()
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**IMAGE),
        text_config=t.LlamaConfig(**GROUPED),
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    tokens = torch.cat([torch.full((1, 16), 3), ids(12)], 1)
    model = t.LlavaForConditionalGeneration(config).eval()
    return model, {"input_ids": tokens, "pixel_values": pixels()}


def qwen2_5_vl() -> Built:
    """A vision–language model with windowed vision attention and 3-D rotary positions."""
    t = library()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 8,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = t.Qwen2_5_VLConfig(
        text_config={**GROUPED, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        vision_start_token_id=2,
        vision_end_token_id=1,
        video_token_id=4,
    )
    tokens = torch.cat([torch.tensor([[2, 3, 3, 3, 3, 1]]), ids(12)], 1)
    model = t.Qwen2_5_VLForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (tokens == 3).long()
    return model, inputs


def whisper() -> Built:
    """Speech: an encoder, and a decoder with cross attention."""
    config = library().WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = library().WhisperForConditionalGeneration(config).eval()
    return model, {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": ids(12)}


def t5() -> Built:
    """An encoder–decoder with relative position biases."""
    config = library().T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = library().T5ForConditionalGeneration(config).eval()
    return model, {"input_ids": ids(20), "decoder_input_ids": ids(12)}


GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 8}
DECODERS: Mapping[str, Callable[[], Built]] = {
    "Llama": text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mistral": text("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=8),
    "Qwen2": text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "Qwen3": text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
    "Gemma 2": text(
        "Gemma2ForCausalLM", "Gemma2Config", **GEMMA, attn_implementation="eager"
    ),  # its soft cap is known to its eager attention alone
    "Gemma 3": text("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA),
    "Phi-3": text("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0),
    "GPT-2": text(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
    ),
    "GPT-NeoX": text("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "OLMo 2": text("Olmo2ForCausalLM", "Olmo2Config", **GROUPED, pad_token_id=0),
    "Mixtral": text("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=2),
    "LLaVA": llava,
    "Qwen2.5-VL": qwen2_5_vl,
    "Whisper": whisper,
    "T5": t5,
}
ENCODERS: Mapping[str, Callable[[], Built]] = {
    "BERT": text("BertModel", "BertConfig", **TEXT),
    "ModernBERT": text(
        "ModernBertModel",
        "ModernBertConfig",
        **TEXT,
        pad_token_id=0,
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    "ViT": image("ViTModel", "ViTConfig"),
    "DINOv2": image("Dinov2Model", "Dinov2Config"),
    "CLIP": two_towers("CLIPModel", "CLIPConfig", projection_dim=16),
    "SigLIP": two_towers("SiglipModel", "SiglipConfig"),
}


def timm_model(name: str, **options: Any) -> Callable[[], Built]:
    """A timm model on a small image."""

    def build() -> Built:
        model = importlib.import_module("timm").create_model(name, num_classes=10, **options)
        size = options["img_size"]
        return model.eval(), {"x": torch.randn(1, 3, size, size)}

    return build


def unet() -> Built:
    """The UNet of latent diffusion, with cross attention to text."""
    model = importlib.import_module("diffusers").UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        layers_per_block=1,
    )
    return model.eval(), {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }


def sd3() -> Built:
    """The transformer of Stable Diffusion 3, image and text in one attention."""
    model = importlib.import_module("diffusers").SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([1]),
    }


CALLERS: Mapping[str, tuple[str, Callable[[], Built]]] = {
    "timm ViT": ("timm", timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)),
    "timm MaxViT": ("timm", timm_model("maxvit_rmlp_pico_rw_256", img_size=64)),
    "diffusers UNet": ("diffusers", unet),
    "diffusers SD3 transformer": ("diffusers", sd3),
}
"""Models that call the fused kernel themselves, with the library they need."""
