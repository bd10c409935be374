"""Tiny models, and inputs for them, of every architecture of transformers that looks its attention up by name."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EXPERTS = 32, 40, 4, 2, 8, 99, 4
IMAGE, PATCH, LENGTH = 32, 8, 11


def modeling_files() -> dict[str, str]:
    """Name of every modeling file that mentions the interface, and the module that it is."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        if "ALL_ATTENTION_FUNCTIONS" in path.read_text(encoding="utf-8"):
            folder, name = path.parent.name, path.stem.removeprefix("modeling_")
            found[name] = f"transformers.models.{folder}.modeling_{name}"
    return found


# ---------------------------------------------------------------- configs

LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "indexer_types",
)
LAYERS = re.compile(
    r"(num_|n_|encoder_|decoder_|text_|mit_|pred_|num_hidden_|prompt_)*"
    r"(layers|layer|hidden_layers|blocks|decoder_depth|depth|num_layers_per_stack)"
)
RULES: list[tuple[str, Callable[[int], int]]] = [
    (r".*vocab_size.*", lambda v: min(v, VOCAB)),
    (
        r".*(num_key_value_heads|num_kv_heads|num_key_value_attention_heads|n_kv_heads|kv_n_heads|num_query_groups)",
        lambda v: KV_HEADS,
    ),
    (r".*(attention_heads|num_heads|n_heads?|_heads)", lambda v: HEADS),
    (r".*v_head_dim", lambda v: 6),
    (r".*qk_head_dim", lambda v: 16),
    (r".*qk_nope_head_dim", lambda v: 8),
    (r".*qk_rope_head_dim", lambda v: 8),
    (r".*(head_dim|d_kv|d_head|key_dim|headdim)", lambda v: HEAD_DIM),
    (r".*(lora_rank|_rank)", lambda v: 16),
    (r"chunk_size_feed_forward", lambda v: v),
    (
        r".*(intermediate|ffn|mlp_dim|mlp_hidden|d_ff|n_inner|feedforward|feed_forward).*",
        lambda v: FEED_FORWARD,
    ),
    (r".*(experts_per_tok|moe_topk|moe_k|top_k|num_selected_experts)", lambda v: min(v, 2)),
    (
        r".*(num_experts|routed_experts|local_experts|moe_num_experts)",
        lambda v: EXPERTS if v > 1 else v,
    ),
    (r"n_group|topk_group|moe_n_group", lambda v: 1),
    (r"index_topk|index_topk_blocks", lambda v: 4 if v > 64 else 2),
    (r"(sliding_window|attention_chunk_size|local_attention|attention_window_size)", lambda v: 4),
    (r".*(image_size|img_size|input_size)", lambda v: IMAGE),
    (r"patch_size", lambda v: min(v, PATCH)),
    (r".*temporal_patch_size|spatial_merge_size|merge_size", lambda v: v),
    (r"max_source_positions", lambda v: 20),
    (
        r".*(max_position_embeddings|n_positions|max_target_positions|seq_length|max_seq_len|n_ctx)",
        lambda v: min(v, 512),
    ),
    (
        r".*(hidden_size|hidden_dim|embed_dim|d_model|n_embd|embedding_size|projection_dim|_dim|hidden_sizes|output_size|embed_size|width|channels)",
        lambda v: min(v, HIDDEN) if v > 8 else v,
    ),
    (
        r"dim|num_codevectors_per_group|num_queries|num_query_tokens|num_frames",
        lambda v: min(v, HIDDEN if v > 64 else 8),
    ),
]
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES]
INDICES = re.compile(
    r".*(indexes|indices|_idxs|block_indices|target_layers|layer_ids|attention_layers|global_attention_blocks|_layers|no_rope_layers)"
)

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
LAST = {**RESNET, "out_features": ["stage4"]}
THREE = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
AS_DEFAULT = ("HGNetV2Config", "ResNetConfig")
SAME_HEADS = {"num_key_value_heads": HEADS}
SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "cardinality": [],
    "input_size": 1,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "ASTConfig": {"max_length": 64},
    "BailingHybridConfig": {"n_group": 2, "topk_group": 1, "num_experts": 8},
    "BambaConfig": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "JambaConfig": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "GraniteMoeHybridConfig": {
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "DeepseekV2Config": {"num_experts_per_tok": 2, **SAME_HEADS},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MoonshineConfig": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "NemotronConfig": {"num_key_value_heads": KV_HEADS},
    "NemotronHConfig": {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "MiniMaxM3VLTextConfig": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_n_heads": KV_HEADS,
        "index_head_dim": 8,
        "index_local_blocks": 1,
    },
    "UnlimitedOcrTextConfig": SAME_HEADS,
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 8,
        **SAME_HEADS,
    },
    "Phi4MultimodalAudioConfig": {
        "nemo_conv_channels": 32,
        "depthwise_separable_out_channel": 32,
        "ext_pw_out_channel": 32,
    },
    "ZambaConfig": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        **SAME_HEADS,
    },
    "Mistral4Config": {"head_dim": 16, **SAME_HEADS},
    "PatchTSMixerConfig": {"self_attn": True},
    "PatchTSTConfig": {"num_input_channels": 2},
    "FalconH1Config": {"mamba_d_ssm": 32},
    "BridgeTowerConfig": {"hidden_size": 64},
    "BridgeTowerTextConfig": {"hidden_size": 64},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5}},
    "Emu3Config": {"vocabulary_map": {"<image>": 5}},
    "ConditionalDetrConfig": {"backbone_config": LAST},
    "DetrConfig": {"backbone_config": LAST},
    "TableTransformerConfig": {"backbone_config": LAST},
    "MaskFormerConfig": {"backbone_config": THREE},
    "DabDetrConfig": {"backbone_config": LAST},
    "DeformableDetrConfig": {"backbone_config": THREE},
    "GroundingDinoConfig": {"backbone_config": THREE},
    "MMGroundingDinoConfig": {"backbone_config": THREE},
    "OmDetTurboConfig": {"backbone_config": THREE},
    "RTDetrConfig": {"backbone_config": THREE, "encoder_in_channels": [8, 16, 16]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "Dots1Config": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        **SAME_HEADS,
    },
    "EsmcConfig": SAME_HEADS,
    "Glm5NextTextConfig": {"index_kpool": 2, "qk_rope_head_dim": 0, "qk_head_dim": 8, **SAME_HEADS},
    "Dots3NoteTextConfig": SAME_HEADS,
    "Dots3NoteConfig": SAME_HEADS,
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "global_head_dim": 8,
        "per_layer_config": {},
    },
    "EsmConfig": {"vocab_size": 99, "mask_token_id": 4, "pad_token_id": 1},
    "Gemma3nTextConfig": {
        "intermediate_size": FEED_FORWARD,
        "activation_sparsity_pattern": None,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 2,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
    },
    "InformerConfig": SERIES,
    "TimeSeriesTransformerConfig": SERIES,
    "AutoformerConfig": SERIES,
    "Llama4VisionConfig": {
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "KimiLinearConfig": {"num_experts_per_token": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "Step3p7TextConfig": {"sliding_window": 4},
    "RfDetrDinov2Config": {
        "num_hidden_layers": 2,
        "out_features": ["stage1", "stage2"],
        "out_indices": [1, 2],
        "window_block_indexes": [0],
    },
    "LwDetrViTConfig": {
        "num_hidden_layers": 2,
        "num_windows": 4,
        "out_features": ["stage1", "stage2"],
        "out_indices": [1, 2],
        "window_block_indices": [0],
    },
    "MimiConfig": {"num_filters": 4, "hidden_size": 32, "upsample_groups": 32},
    "EfficientLoFTRConfig": {"hidden_size": 256},
    "Wav2Vec2BertConfig": {"feature_projection_input_dim": 80, "vocab_size": 99},
    "MobileBertConfig": {
        "true_hidden_size": 32,
        "intra_bottleneck_size": 32,
        "embedding_size": 32,
        "hidden_size": 32,
    },
    "HrmTextConfig": {"num_layers_per_stack": 1, "num_hidden_layers": 8, "layer_types": None},
    "NeoMMEConfig": {"head_dim": 16},
}
"""By class of the config: what the rules get wrong."""


def _count(default: Any) -> int:
    """Layers that show every kind of layer that the defaults have."""
    lists = [
        list(getattr(default, name))
        for name in LAYER_LISTS
        if isinstance(getattr(default, name, None), (list, tuple))
    ]
    lists = [x for x in lists if len(x) > 1]
    return max(2, *(len(set(map(str, x))) for x in lists)) if lists else 2


def _pick(default: Any, layers: int) -> dict[str, list[Any]]:
    names = [
        n
        for n in LAYER_LISTS
        if isinstance(getattr(default, n, None), (list, tuple)) and len(getattr(default, n)) > 1
    ]
    if not names:
        return {}
    rows = list(zip(*(getattr(default, n) for n in names), strict=False))
    kinds = list(dict.fromkeys(rows))
    chosen: list[Any] = []
    seen: list[set[str]] = [set() for _ in names]
    for row in kinds:  # each kind in each list at least once
        if any(str(x) not in s for x, s in zip(row, seen, strict=True)):
            chosen.append(row)
            for x, s in zip(row, seen, strict=True):
                s.add(str(x))
    while len(chosen) < layers:
        chosen.append(chosen[-1])
    return {n: [row[i] for row in chosen] for i, n in enumerate(names)}


@lru_cache(None)
def _uses_sections(module: str) -> bool:
    path = Path(str(importlib.import_module(module).__file__))
    return any(
        "mrope_section" in p.read_text(encoding="utf-8") for p in path.parent.glob("modeling*")
    )


def _rope(rope: Any, head_dim: int, sections: bool) -> Any:
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _rope(v, head_dim, sections) for k, v in rope.items()}
    rope = dict(rope)
    if "rope_theta" not in rope and "rope_type" not in rope:
        return rope
    if sections or "mrope_section" in rope:
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        n = len(rope.get("mrope_section", (1, 1, 1)))
        rope["mrope_section"] = [*[half // n] * (n - 1), half - (n - 1) * (half // n)]
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = list(rope[name])[: head_dim // 2]
    return rope


def shrink(default: Any) -> dict[str, Any]:
    """Keyword arguments of a tiny config like ``default``."""
    from transformers import PreTrainedConfig

    picked: dict[str, Any] = _pick(default, _count(default))
    layers = len(next(iter(picked.values()))) if picked else 2
    changed: dict[str, Any] = {}
    special = iter(range(3, 39))
    own = OVERRIDES.get(type(default).__name__, {})
    layers = own.get("num_hidden_layers", layers)
    for name, value in vars(default).items():
        if name.startswith("_") or name in (
            "id2label",
            "label2id",
            "transformers_version",
            "architectures",
        ):
            continue
        if name == "head_dim" and value is None and "num_attention_heads" in vars(default):
            changed[name] = HEAD_DIM
        elif name in own or (
            isinstance(value, PreTrainedConfig) and type(value).__name__ in AS_DEFAULT
        ):
            continue
        elif isinstance(value, PreTrainedConfig):
            inner = {k: v for k, v in value.to_dict().items() if k not in ("transformers_version",)}
            changed[name] = {**inner, **shrink(value), "model_type": value.model_type}
        elif name in picked:
            changed[name] = picked[name]
        elif name in ("rope_parameters", "rope_scaling"):
            changed[name] = _rope(value, HEAD_DIM, _uses_sections(type(default).__module__))
        elif isinstance(value, bool) or value is None or isinstance(value, (str, float)):
            continue
        elif re.fullmatch(r".*(_token_id|_token_index|token_id|_id|_token|_ids|start_index)", name):
            if isinstance(value, int) and value >= 39:
                changed[name] = next(special)
            elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
                changed[name] = type(value)(v if v < 39 else next(special) for v in value)
        elif isinstance(value, int):
            if LAYERS.fullmatch(name):
                changed[name] = min(value, layers) if value > 0 else value
                continue
            for pattern, rule in COMPILED:
                if pattern.fullmatch(name):
                    changed[name] = rule(value)
                    break
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            if name in ("depths", "num_blocks", "blocks_per_stage"):
                changed[name] = type(value)([1] * len(value))
            elif INDICES.fullmatch(name) and "conv" not in name:
                kept = [v for v in value if v < layers]
                changed[name] = type(value)(kept or [layers - 1])
            elif len(value) > 8 and "layer" in name:
                changed[name] = type(value)(value[:layers])
            else:
                for pattern, rule in COMPILED:
                    if pattern.fullmatch(name) and name not in ("patch_size", "pool_channels"):
                        changed[name] = type(value)(rule(v) for v in value)
                        break
    for name, value in own.items():
        changed[name] = value
    if "kv_lora_rank" in changed and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = HEADS
    return changed


def tiny_config(config_class: Any) -> Any:
    """A tiny config of this class."""
    return config_class(**shrink(config_class()))


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "MusicgenForCausalLM": {"input_ids": (8, LENGTH)},
    "MusicgenMelodyForCausalLM": {"input_ids": (8, LENGTH)},
    "DiaModel": {"input_ids": (2, LENGTH), "decoder_input_ids": (2, 7, 9)},
    "KyutaiSpeechToTextModel": {"input_ids": (2, LENGTH, 33)},
    "Pix2StructVisionModel": {"flattened_patches": (2, 12, 2 + 32)},
    "Kosmos2_5VisionModel": {"flattened_patches": (2, 12, 2 + 32)},
    "Pix2StructForConditionalGeneration": {
        "flattened_patches": (2, 12, 2 + 32),
        "decoder_input_ids": (2, 7),
    },
    "TimesFmModel": {"past_values": (2, 64), "past_values_padding": (2, 64), "freq": (2, 1)},
    "VideoLlama3VisionModel": {"pixel_values": (48, 192), "grid_thw": (2, 3), "merge_sizes": (2,)},
    "VoxtralRealtimeTextModel": {"inputs_embeds": (2, LENGTH, 32), "t_cond": (1, 1, 32)},
    "PatchTSTModel": {"past_values": (2, 32, 2)},
    "PatchTSMixerModel": {"past_values": (2, 32, 1)},
    "Phi4MultimodalAudioModel": {"hidden_states": (2, 64, 32), "mask": (2, 64)},
    "SeamlessM4TForSpeechToText": {"input_features": (2, 20, 32), "decoder_input_ids": (2, 7)},
    "SeamlessM4Tv2ForSpeechToText": {"input_features": (2, 20, 32), "decoder_input_ids": (2, 7)},
    "Wav2Vec2BertModel": {"input_features": (2, 20, 80)},
    "NeuCodecModel": {"input_values": (2, 1, 6400), "input_features": (2, 20, 80)},
    "Xcodec2Model": {"input_values": (2, 1, 6400), "input_features": (2, 20, 80)},
    "MuseGlimmerAssistantModel": {
        "noise_embeds": (2, 4, 32),
        "context_hidden_states": (2, LENGTH, 160),
    },
    "MllamaVisionModel": {
        "pixel_values": (2, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": (2, 1),
        "aspect_ratio_mask": (2, 1, 4),
    },
    "MllamaForCausalLM": {
        "input_ids": (2, LENGTH),
        "attention_mask": (2, LENGTH),
        "cross_attention_states": (2, 6, 32),
    },
    "Idefics2PerceiverResampler": {"context": (2, LENGTH, 32), "attention_mask": (2, LENGTH)},
    "IdeficsModel": {
        "input_ids": (2, LENGTH),
        "attention_mask": (2, LENGTH),
        "pixel_values": (2, 1, 3, 32, 32),
        "image_attention_mask": (2, LENGTH, 1),
    },
    "LightGlueForKeypointMatching": {"pixel_values": (1, 2, 3, 64, 64)},
    "EfficientLoFTRModel": {"pixel_values": (1, 2, 1, 64, 64)},
    "Qwen3OmniMoeCode2WavTransformerModel": {"inputs_embeds": (2, LENGTH, 32)},
    "Qwen3OmniMoeTalkerCodePredictorModel": {"inputs_embeds": (2, LENGTH, 32)},
    "PPOCRV5MobileRecModel": {"pixel_values": (1, 3, 48, 320)},
    "PPOCRV6SmallRecModel": {"pixel_values": (1, 3, 48, 320)},
    "NemotronAsrStreamingEncoder": {"input_features": (2, 64, 128)},
    "Qwen3ASREncoder": {"input_features": (2, 128, 200), "input_features_mask": (2, 200)},
}
"""Inputs that the rules do not guess."""

WITH_IMAGES = (
    "clip|blip|align|sigl|flava|vilt|bridgetower|Vision2Seq|owl|kosmos|florence|layoutlm|udop"
)
"""Models that want an image beside the text."""


# ---------------------------------------------------------------- models


def tiny_model(model_class: Any, config: Any | None = None) -> Any:
    """A tiny model with random weights in which nothing is zero or one everywhere, in evaluation mode."""
    torch.manual_seed(zlib.crc32(model_class.__name__.encode()))
    config = tiny_config(model_class.config_class) if config is None else config
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim < 2:
                noise = torch.randn_like(parameter)
                finite = parameter.nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10)
                parameter.copy_(finite + 0.2 * noise)
            else:
                fan = parameter.shape[-1] if parameter.ndim == 3 else math.prod(parameter.shape[1:])
                parameter.normal_(0.0, fan**-0.5)
    return model.eval()


def attention_modules(module: Any) -> set[str]:
    """The classes of a modeling file in whose code the interface is called."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(value)
    }


def candidates(module: Any) -> list[Any]:
    """Model classes of a modeling file, the plain ones first."""
    from transformers import PreTrainedModel

    found = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
        and value.config_class is not None
        and "forward" in vars(value)
    ]

    def order(model: Any) -> tuple[int, str]:
        name = model.__name__
        ends = ("ForCausalLM", "LMHeadModel", "TextModel", "Model", "ForConditionalGeneration")
        for rank, end in enumerate(ends):
            if name.endswith(end):
                return rank, name
        return len(ends), name

    return sorted(found, key=order)


# ---------------------------------------------------------------- inputs


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except Exception:  # several text configs
        return config


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes, in the config or in one of its parts."""
    from transformers import PreTrainedConfig

    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found = _find(value, *names)
            if found is not None:
                return found
    return default


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, (list, tuple)) else (value, value)


def _of_shapes(shapes: dict[str, tuple[int, ...]], padding: str | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    batch: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("mask"):
            batch[name] = torch.ones(shape, dtype=torch.long)
            if padding is not None:
                batch[name][-1, ..., slice(-3, None) if padding == "right" else slice(0, 3)] = 0
        elif name == "grid_thw":
            batch[name] = torch.tensor([[1, 4, 4], [1, 4, 8]])
        elif name in ("freq", "past_values_padding"):
            batch[name] = torch.zeros(shape, dtype=torch.long)
        elif name in ("aspect_ratio_ids", "merge_sizes"):
            batch[name] = torch.ones(shape, dtype=torch.long)
        elif name.endswith("_ids"):
            batch[name] = torch.randint(40, VOCAB, shape, generator=generator)
        else:
            batch[name] = torch.randn(shape, generator=generator)
        if name == "flattened_patches":
            batch[name][..., :2] = torch.arange(1, shape[1] + 1)[:, None] % 4 + 1
    return batch


def inputs(model: Any, padding: str | None = "right") -> Iterator[dict[str, Any]]:
    """Inputs to try, in turn, by the names of the arguments of forward."""
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    required = {
        n
        for n, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind is not inspect.Parameter.VAR_KEYWORD
        and p.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    main = model.main_input_name
    if type(model).__name__ in SHAPES:
        yield _of_shapes(SHAPES[type(model).__name__], padding)
        return
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(*shape: int) -> Tensor:
        top = min(VOCAB, int(_find(config, "vocab_size", default=VOCAB) or VOCAB))
        return torch.randint(min(40, top // 2), top, shape, generator=generator)

    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding == "right":
        mask[1, -3:] = 0
    elif padding == "left":
        mask[1, :3] = 0

    images = []
    size = _find(config, "image_size", "img_size", default=IMAGE)
    high, wide = _pair(size) if not isinstance(size, dict) else (size["height"], size["width"])
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    images.append(numbers(2, channels, high, wide))
    frames = _find(config, "num_frames", "frames_per_clip", default=2)
    frames = frames if isinstance(frames, int) else 2
    images.append(numbers(2, frames, channels, high, wide))
    images.append(numbers(2, channels, 64, 64))
    images.append(numbers(2, 2, channels, high, wide))
    patch = _pair(_find(config, "patch_size", default=PATCH))
    temporal = _find(config, "temporal_patch_size", default=1)
    temporal = temporal if isinstance(temporal, int) else 1
    rows = 4 * 4 + 4 * 8
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    flat = channels * temporal * patch[0] * patch[1]
    images.append(numbers(2, 16, flat))
    images.append(numbers(rows, flat))
    images.append(numbers(rows, channels, *patch))
    images.append(numbers(1, rows, channels, *patch))
    images.append(numbers(rows, temporal, channels, *patch))

    mel = int(
        _find(
            config,
            "num_mel_bins",
            "n_mels",
            "feature_size",
            "input_feat_per_channel",
            "n_mel_bins",
            "input_dim",
            default=80,
        )
        or 80
    )
    time = 2 * int(_find(config, "max_source_positions", default=20) or 20)
    time = 40 if time > 200 else time
    sounds = [
        numbers(2, mel, time),
        numbers(2, time, mel),
        numbers(2, 64, mel),
        numbers(2, LENGTH, mel),
        numbers(2, 128, mel),
        numbers(mel, time),
    ]
    waves = [numbers(2, 800), numbers(2, 1, 1920), numbers(2, 4000), numbers(2, 16000)]
    width = _find(config, "hidden_size", "d_model", "embed_dim", "n_embd", default=HIDDEN)
    width = width if isinstance(width, int) else HIDDEN

    choices: dict[str, list[Any]] = {
        "input_ids": [ids(2, LENGTH)],
        "decoder_input_ids": [ids(2, 7)],
        "pixel_values": images,
        "pixel_values_videos": images[1:2] + images[3:4],
        "input_features": sounds,
        "input_values": waves + sounds,
        "audio_values": waves,
        "hidden_states": [numbers(rows, flat), numbers(2, LENGTH, width), *sounds],
        "inputs_embeds": [numbers(2, LENGTH, width)],
        "query_embeds": [numbers(2, LENGTH, width)],
        "encoder_hidden_states": [numbers(2, 5, width)],
        "flattened_patches": [torch.cat([torch.ones(2, 12, 2), numbers(2, 12, flat)], -1)],
        "past_values": [
            numbers(2, 10),
            numbers(2, 64),
            numbers(2, 512),
            numbers(2, 32, 1),
            numbers(2, 512, 1),
        ],
        "audio_mel": sounds,
    }
    wanted = [n for n in parameters if n in required or n == main]
    if "inputs_embeds" in wanted and "input_ids" in parameters:
        wanted.remove("inputs_embeds")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    if not wanted:
        wanted = [
            n
            for n in (
                "input_ids",
                "pixel_values",
                "input_features",
                "input_values",
                "inputs_embeds",
            )
            if n in parameters
        ][:1]
    for extra in ("grid_thw", "image_grid_thw"):
        if extra in parameters and "input_ids" not in wanted and extra not in wanted:
            wanted.append(extra)
    if "bbox" in parameters and "bbox" not in wanted:
        wanted.append("bbox")
    if (
        "attention_mask" in parameters
        and padding is not None
        and any(n in wanted for n in ("input_ids", "inputs_embeds"))
    ):
        wanted.append("attention_mask")
    if (
        "pixel_values" in parameters
        and "pixel_values" not in wanted
        and re.search(
            WITH_IMAGES,
            type(model).__name__,
            re.I,
        )
    ):
        wanted.append("pixel_values")

    corners = torch.randint(0, 10, (2, LENGTH, 2), generator=generator)
    if (
        "add_cross_attention" in vars(config)
        and config.add_cross_attention
        and "encoder_hidden_states" in parameters
    ):
        wanted.append("encoder_hidden_states")
    for extra in (
        "input_features_mask",
        "feature_attention_mask",
        "audio_mel_mask",
        "past_observed_mask",
    ):
        if extra in parameters and main in ("input_features", "audio_mel", "past_values"):
            wanted.append(extra)
    if "past_values" in wanted:
        wanted += [
            n
            for n in ("past_time_features", "future_values", "future_time_features")
            if n in parameters
        ]
    wanted = list(dict.fromkeys(wanted))
    simple = {
        "past_time_features": torch.zeros(2, 10, 0),
        "future_time_features": torch.zeros(2, 4, 0),
        "future_values": numbers(2, 4),
        "past_observed_mask": torch.ones(2, 10),
        "attention_mask": mask,
        "bbox": torch.cat([corners, corners + 5], -1),
        "grid_thw": grid,
        "image_grid_thw": grid,
        "position_ids": torch.arange(LENGTH)[None].expand(2, -1),
    }
    lead = next((n for n in wanted if len(choices.get(n, ())) > 1), None)
    for value in choices[lead] if lead else [None]:
        batch: dict[str, Any] = {}
        for name in wanted:
            if name == lead:
                batch[name] = value
            elif name in choices:
                batch[name] = choices[name][0]
            elif name in simple:
                batch[name] = simple[name]
        for name in ("input_features_mask", "feature_attention_mask", "audio_mel_mask"):
            if name in wanted and value is not None:
                long = next((n for n in value.shape[1:] if n != mel), mel)
                batch[name] = torch.ones(value.shape[0], long, dtype=torch.long)
                if padding == "right":
                    batch[name][1, -8:] = 0
        yield copy.copy(batch)


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of an output, with its path."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            if "past_key_values" not in str(key):
                yield from tensors(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for key, value in enumerate(output):
            yield from tensors(value, f"{name}.{key}")


def load(name: str) -> Any:
    """The module of a modeling file."""
    return importlib.import_module(name)


# ---------------------------------------------------------------- what is tried

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "afmoe": ("AfmoeForCausalLM",),
    "aimv2": ("Aimv2TextModel",),
    "albert": ("AlbertModel",),
    "align": ("AlignTextModel",),
    "altclip": ("AltCLIPModel",),
    "apertus": ("ApertusForCausalLM",),
    "arcee": ("ArceeForCausalLM",),
    "aria": ("AriaTextForCausalLM",),
    "audio_spectrogram_transformer": ("ASTModel",),
    "audioflamingo3": ("AudioFlamingo3Encoder",),
    "axk1": ("AXK1ForCausalLM",),
    "axk2": ("AXK2ForCausalLM",),
    "bailing_hybrid": ("BailingHybridForCausalLM",),
    "bamba": ("BambaForCausalLM",),
    "bart": ("BartForCausalLM",),
    "beam": ("BeamForCausalLM",),
    "beit": ("BeitModel",),
    "bert": ("BertLMHeadModel+cross",),
    "bert_generation": ("BertGenerationDecoder+cross",),
    "bigbird_pegasus": ("BigBirdPegasusForCausalLM",),
    "biogpt": ("BioGptForCausalLM",),
    "bitnet": ("BitNetForCausalLM",),
    "blenderbot": ("BlenderbotForCausalLM",),
    "blenderbot_small": ("BlenderbotSmallForCausalLM",),
    "blip_2": ("Blip2VisionModelWithProjection",),
    "blt": ("BltPatcher",),
    "bridgetower": ("BridgeTowerModel",),
    "camembert": ("CamembertForCausalLM+cross",),
    "canary": ("CanaryModel",),
    "chameleon": ("ChameleonModel",),
    "chinese_clip": ("ChineseCLIPModel",),
    "clap": ("ClapTextModel",),
    "clip": ("CLIPTextModel",),
    "clipseg": ("CLIPSegTextModel",),
    "cohere": ("CohereForCausalLM",),
    "cohere2": ("Cohere2ForCausalLM",),
    "cohere2_moe": ("Cohere2MoeForCausalLM",),
    "cohere_asr": ("CohereAsrModel",),
    "cohere_compass": ("CohereCompassVisionModel",),
    "conditional_detr": ("ConditionalDetrModel",),
    "cosmos3_edge": ("Cosmos3EdgeTextModel", "Cosmos3EdgeVisionModel"),
    "csm": ("CsmDepthDecoderForCausalLM",),
    "ctrl": ("CTRLLMHeadModel",),
    "cwm": ("CwmForCausalLM",),
    "d_fine": ("DFineModel",),
    "data2vec_audio": ("Data2VecAudioModel",),
    "data2vec_text": ("Data2VecTextForCausalLM+cross",),
    "dbrx": ("DbrxForCausalLM",),
    "decision_transformer": ("DecisionTransformerGPT2Model",),
    "deepseek_ocr2": ("DeepseekOcr2TextModel", "DeepseekOcr2VisionModel"),
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "deepseek_v32": ("DeepseekV32ForCausalLM",),
    "deepseek_v4": ("DeepseekV4ForCausalLM",),
    "deformable_detr": ("DeformableDetrModel",),
    "deimv2": ("Deimv2Model",),
    "deit": ("DeiTModel",),
    "detr": ("DetrModel",),
    "dia": ("DiaModel",),
    "diffllama": ("DiffLlamaForCausalLM",),
    "diffusion_gemma": ("DiffusionGemmaModel",),
    "dinov2": ("Dinov2Model",),
    "dinov2_with_registers": ("Dinov2WithRegistersModel",),
    "dinov3_vit": ("DINOv3ViTModel",),
    "distilbert": ("DistilBertModel",),
    "doge": ("DogeForCausalLM",),
    "dots1": ("Dots1ForCausalLM",),
    "dots3_note": ("Dots3NoteForCausalLM", "Dots3NoteVisionModel"),
    "dpt": ("DPTModel",),
    "electra": ("ElectraForCausalLM+cross",),
    "embedding_gemma2": ("EmbeddingGemma2TextModel",),
    "emu3": ("Emu3ForCausalLM",),
    "eomt": ("EomtForUniversalSegmentation",),
    "eomt_dinov3": ("EomtDinov3ForUniversalSegmentation",),
    "ernie": ("ErnieForCausalLM+cross",),
    "ernie4_5": ("Ernie4_5ForCausalLM",),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM",),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextModel",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
    ),
    "esm": ("EsmModel",),
    "esmc": ("EsmcModel",),
    "eurobert": ("EuroBertModel",),
    "evolla": ("EvollaModel", "EvollaSaProtProteinEncoder"),
    "exaone4": ("Exaone4ForCausalLM",),
    "exaone4_5": ("Exaone4_5_VisionModel",),
    "exaone_moe": ("ExaoneMoeForCausalLM",),
    "falcon_h1": ("FalconH1ForCausalLM",),
    "flex_olmo": ("FlexOlmoForCausalLM",),
    "flint": ("FlintForCausalLM",),
    "fun_asr_nano": ("FunAsrNanoModel",),
    "gemma": ("GemmaForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "gemma3": ("Gemma3ForCausalLM",),
    "gemma3n": ("Gemma3nForCausalLM",),
    "gemma4": ("Gemma4ForCausalLM",),
    "gemma4_unified": ("Gemma4UnifiedForCausalLM",),
    "git": ("GitVisionModel",),
    "glm": ("GlmForCausalLM",),
    "glm4": ("Glm4ForCausalLM",),
    "glm4_moe": ("Glm4MoeForCausalLM",),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM",),
    "glm4v": ("Glm4vTextModel", "Glm4vVisionModel"),
    "glm4v_moe": ("Glm4vMoeTextModel", "Glm4vMoeVisionModel"),
    "glm5_next": ("Glm5NextTextModel", "Glm5NextVisionModel"),
    "glm_image": ("GlmImageTextModel", "GlmImageVisionModel"),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM",),
    "glm_ocr": ("GlmOcrTextModel", "GlmOcrVisionModel"),
    "glmasr": ("GlmAsrEncoder",),
    "gpt2": ("GPT2LMHeadModel",),
    "gpt_bigcode": ("GPTBigCodeForCausalLM",),
    "gpt_neox": ("GPTNeoXForCausalLM",),
    "gpt_oss": ("GptOssForCausalLM",),
    "gradium_phonon_tts": ("GradiumPhononTTSModel",),
    "granite": ("GraniteForCausalLM",),
    "granite4_vision": ("Granite4VisionTextModel",),
    "granite_docling": ("GraniteDoclingTextModel", "GraniteDoclingVisionModel"),
    "granite_swa": ("GraniteSWAForCausalLM",),
    "granitemoe": ("GraniteMoeForCausalLM",),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM",),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM",),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM",),
    "gte": ("GteModel",),
    "helium": ("HeliumForCausalLM",),
    "higgs_audio_v2": ("HiggsAudioV2Model",),
    "hrm_text": ("HrmTextForCausalLM",),
    "hubert": ("HubertModel",),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM",),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM",),
    "hunyuan_vl": ("HunYuanVLTextModel", "HunYuanVLVisionTransformer"),
    "hy_v3": ("HYV3ForCausalLM",),
    "hy_v4": ("HYV4ForCausalLM",),
    "hyperclovax": ("HyperCLOVAXForCausalLM",),
    "idefics": ("IdeficsModel",),
    "idefics2": ("Idefics2PerceiverResampler", "Idefics2VisionTransformer"),
    "idefics3": ("Idefics3VisionTransformer",),
    "ijepa": ("IJepaModel",),
    "informer": ("InformerModel",),
    "inkling": ("InklingForCausalLM",),
    "inkling2": ("Inkling2ForCausalLM",),
    "instructblip": ("InstructBlipQFormerModel", "InstructBlipVisionModel"),
    "instructblipvideo": ("InstructBlipVideoQFormerModel", "InstructBlipVideoVisionModel"),
    "internvl": ("InternVLVisionModel",),
    "jais2": ("Jais2ForCausalLM",),
    "jamba": ("JambaForCausalLM",),
    "janus": ("JanusVisionModel",),
    "jetmoe": ("JetMoeForCausalLM",),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model",),
    "kimi_k25": ("Kimi_K25Model",),
    "kimi_linear": ("KimiLinearForCausalLM",),
    "kolibri1": ("Kolibri1ForCausalLM",),
    "kosmos2": ("Kosmos2TextForCausalLM", "Kosmos2VisionModel"),
    "kosmos2_5": ("Kosmos2_5TextForCausalLM",),
    "kyutai_speech_to_text": ("KyutaiSpeechToTextModel",),
    "laguna": ("LagunaForCausalLM",),
    "lasr": ("LasrEncoder",),
    "layoutlm": ("LayoutLMModel",),
    "lfm2": ("Lfm2ForCausalLM",),
    "lfm2_moe": ("Lfm2MoeForCausalLM",),
    "lfm3": ("Lfm3ForCausalLM",),
    "lfm3_vl": ("Lfm3VlVisionModel",),
    "llama": ("LlamaForCausalLM",),
    "llama4": ("Llama4ForCausalLM", "Llama4VisionModel"),
    "longcat_flash": ("LongcatFlashForCausalLM",),
    "longt5": ("LongT5Model",),
    "lw_detr": ("LwDetrViTBackbone",),
    "m2m_100": ("M2M100Model",),
    "marian": ("MarianForCausalLM",),
    "markuplm": ("MarkupLMModel",),
    "maskformer": ("MaskFormerModel",),
    "mbart": ("MBartForCausalLM",),
    "mellum": ("MellumForCausalLM",),
    "metaclip_2": ("MetaClip2TextModel",),
    "mimi": ("MimiEncoderModel",),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM",),
    "minicpm3": ("MiniCPM3ForCausalLM",),
    "minicpm_ocr": ("MiniCPMOcrModel",),
    "minicpmv4_6": ("MiniCPMV4_6Model",),
    "minicpmv4_7": ("MiniCPMV4_7Model",),
    "minimax": ("MiniMaxForCausalLM",),
    "minimax_m2": ("MiniMaxM2ForCausalLM",),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", "MiniMaxM3VLVisionModel"),
    "ministral": ("MinistralForCausalLM",),
    "ministral3": ("Ministral3ForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "mistral4": ("Mistral4ForCausalLM",),
    "mistral_large4": ("MistralLarge4TextModel",),
    "mixtral": ("MixtralForCausalLM",),
    "mlcd": ("MLCDVisionModel",),
    "mllama": ("MllamaForCausalLM", "MllamaVisionModel"),
    "mobilebert": ("MobileBertModel",),
    "modernbert": ("ModernBertModel",),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM",),
    "molmo2": ("Molmo2TextModel", "Molmo2VisionModel"),
    "moonshine": ("MoonshineModel",),
    "moonshine_streaming": ("MoonshineStreamingModel",),
    "moshi": ("MoshiForCausalLM",),
    "moss_transcribe_diarize": ("MossTranscribeDiarizeAudioModel",),
    "mt5": ("MT5EncoderModel",),
    "muse_glimmer": ("MuseGlimmerTextModel",),
    "muse_spark": ("MuseSparkTextModel",),
    "musicgen": ("MusicgenForCausalLM",),
    "musicgen_melody": ("MusicgenMelodyForCausalLM",),
    "nanochat": ("NanoChatForCausalLM",),
    "nemotron": ("NemotronForCausalLM",),
    "nemotron3_5_transcribe": ("Nemotron3_5TranscribeModel",),
    "nemotron_h": ("NemotronHForCausalLM",),
    "neomme": ("NeoMMEModel",),
    "nllb_moe": ("NllbMoeModel",),
    "nomic_bert": ("NomicBertModel",),
    "olmo": ("OlmoForCausalLM",),
    "olmo2": ("Olmo2ForCausalLM",),
    "olmo3": ("Olmo3ForCausalLM",),
    "olmo_hybrid": ("OlmoHybridForCausalLM",),
    "olmoe": ("OlmoeForCausalLM",),
    "openai_privacy_filter": ("OpenAIPrivacyFilterModel",),
    "opt": ("OPTForCausalLM",),
    "ovis2": ("Ovis2VisionModel",),
    "owlv2": ("Owlv2TextModel",),
    "owlvit": ("OwlViTTextModel",),
    "paddleocr_vl": ("PaddleOCRTextModel", "PaddleOCRVisionModel"),
    "parakeet": ("ParakeetEncoder",),
    "patchtsmixer": ("PatchTSMixerModel",),
    "patchtst": ("PatchTSTModel",),
    "pe_audio": ("PeAudioFrameLevelModel",),
    "pegasus": ("PegasusForCausalLM",),
    "pegasus_x": ("PegasusXModel",),
    "persimmon": ("PersimmonForCausalLM",),
    "phi": ("PhiForCausalLM",),
    "phi3": ("Phi3ForCausalLM",),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        "Phi4MultimodalAudioModel",
        "Phi4MultimodalVisionModel",
    ),
    "phimoe": ("PhimoeForCausalLM",),
    "pix2struct": ("Pix2StructForConditionalGeneration",),
    "pixio": ("PixioModel",),
    "pixtral": ("PixtralVisionModel",),
    "plbart": ("PLBartForCausalLM",),
    "pocket_tts": ("PocketTTSModel",),
    "pocket_tts_audio_tokenizer": ("PocketTTSAudioTokenizerEncoderModel",),
    "pop2piano": ("Pop2PianoForConditionalGeneration",),
    "pp_doclayout_v2": ("PPDocLayoutV2Model",),
    "pp_doclayout_v4": ("PPDocLayoutV4Model",),
    "pp_formulanet": ("PPFormulaNetTextModel",),
    "pp_ocrv5_server_rec": ("PPOCRV5ServerRecForTextRecognition",),
    "qianfan_ocr": ("QianfanOCRVisionModel",),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerTextModel", "Qwen2_5OmniVisionEncoder"),
    "qwen2_5_vl": ("Qwen2_5_VLTextModel", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen2_audio": ("Qwen2AudioEncoder",),
    "qwen2_moe": ("Qwen2MoeForCausalLM",),
    "qwen2_vl": ("Qwen2VLTextModel", "Qwen2VisionTransformerPretrainedModel"),
    "qwen3": ("Qwen3ForCausalLM",),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5VisionModel"),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeVisionModel"),
    "qwen3_asr": ("Qwen3ASREncoder",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "qwen3_next": ("Qwen3NextForCausalLM",),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinkerTextModel",
        "Qwen3OmniMoeCode2WavTransformerModel",
        "Qwen3OmniMoeTalkerCodePredictorModel",
        "Qwen3OmniMoeVisionEncoder",
    ),
    "qwen3_vl": ("Qwen3VLTextModel", "Qwen3VLVisionModel"),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", "Qwen3VLMoeVisionModel"),
    "qwen4_exp": ("Qwen4ExpForCausalLM", "Qwen4ExpVisionModel"),
    "radio": ("RadioModel",),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM",),
    "rf_detr": ("RfDetrModel",),
    "roberta": ("RobertaForCausalLM+cross",),
    "roberta_prelayernorm": ("RobertaPreLayerNormForCausalLM+cross",),
    "roc_bert": ("RoCBertForCausalLM+cross",),
    "rt_detr": ("RTDetrModel",),
    "rt_detr_v2": ("RTDetrV2Model",),
    "sam3": ("Sam3ViTModel",),
    "seamless_m4t": ("SeamlessM4TModel",),
    "seamless_m4t_v2": ("SeamlessM4Tv2Model",),
    "seed_oss": ("SeedOssForCausalLM",),
    "segformer": ("SegformerModel",),
    "sew": ("SEWModel",),
    "siglip": ("SiglipTextModel",),
    "siglip2": ("Siglip2TextModel",),
    "smollm3": ("SmolLM3ForCausalLM",),
    "smolvlm": ("SmolVLMVisionTransformer",),
    "solar_open": ("SolarOpenForCausalLM",),
    "speech_to_text": ("Speech2TextModel",),
    "splinter": ("SplinterModel",),
    "stablelm": ("StableLmForCausalLM",),
    "starcoder2": ("Starcoder2ForCausalLM",),
    "step3p7": ("Step3p7TextModel", "Step3p7VisionModel"),
    "swin": ("SwinBackbone",),
    "switch_transformers": ("SwitchTransformersEncoderModel",),
    "t5": ("T5EncoderModel",),
    "t5gemma": ("T5GemmaModel",),
    "t5gemma2": ("T5Gemma2Model",),
    "time_series_transformer": ("TimeSeriesTransformerModel",),
    "timesfm": ("TimesFmModel",),
    "timesfm2_5": ("TimesFm2_5Model",),
    "tipsv2": ("Tipsv2TextModel", "Tipsv2VisionModel"),
    "udop": ("UdopEncoderModel",),
    "ultrabert": ("UltrabertModel",),
    "umt5": ("UMT5EncoderModel",),
    "unispeech": ("UniSpeechModel",),
    "unispeech_sat": ("UniSpeechSatModel",),
    "unlimited_ocr": ("UnlimitedOcrTextModel", "UnlimitedOcrVisionModel"),
    "vaultgemma": ("VaultGemmaForCausalLM",),
    "video_llama_3": ("VideoLlama3VisionModel",),
    "videomae": ("VideoMAEModel",),
    "videomt": ("VideomtForUniversalSegmentation",),
    "videoprism": ("VideoPrismClipModel",),
    "vit": ("ViTModel",),
    "vit_mae": ("ViTMAEModel",),
    "vit_msn": ("ViTMSNModel",),
    "vitpose_backbone": ("VitPoseBackbone",),
    "vivit": ("VivitModel",),
    "vjepa2": ("VJEPA2ForVideoClassification",),
    "voxtral": ("VoxtralEncoder",),
    "voxtral_realtime": ("VoxtralRealtimeTextModel", "VoxtralRealtimeEncoder"),
    "wav2vec2": ("Wav2Vec2Model",),
    "wav2vec2_bert": ("Wav2Vec2BertModel",),
    "wav2vec2_conformer": ("Wav2Vec2ConformerModel",),
    "whisper": ("WhisperForCausalLM",),
    "x_clip": ("XCLIPModel",),
    "xlm_roberta": ("XLMRobertaForCausalLM+cross",),
    "xlm_roberta_xl": ("XLMRobertaXLForCausalLM+cross",),
    "xmod": ("XmodForCausalLM+cross",),
    "yolos": ("YolosModel",),
    "youtu": ("YoutuForCausalLM",),
    "zamba": ("ZambaForCausalLM",),
    "zaya": ("ZayaForCausalLM",),
}
"""By modeling file the classes that together reach every class of attention in it; ``+cross``: as a decoder with
cross-attention."""

AT_LEAST = 322

TIMM = "its vision part is a model of timm, which transformers refuses without torchvision"
SESSION = "runs on an inference session of a video, not on tensors"
UNUSED = "no model class that runs here uses this attention"
SIZES = "its config refuses small sizes, or fixes relations between them that the rules do not know"
NAN = "eager attention itself gives no numbers for inputs this short"
ROUNDING = "amplifies rounding: off by 7e-4 in float32, by 5e-12 in float64"
BIG = "stays above fifty million parameters"
BUILD = "does not build from its config alone"
INPUTS = "wants inputs or sizes of parts that the rules do not guess"

NOT_REACHED: dict[str, dict[str, str]] = {
    "blt": {"BltCrossAttention": BIG},
    "cohere_compass": {"CohereCompassAttention": BUILD},
    "dots3_note": {"Dots3NoteAudioAttention": SIZES},
    "edgetam": {"EdgeTamAttention": TIMM},
    "edgetam_video": {
        "EdgeTamVideoAttention": SESSION,
        "EdgeTamVideoPerceiverAttention": SESSION,
        "EdgeTamVideoRoPECrossAttention": SESSION,
        "EdgeTamVideoRoPESelfAttention": SESSION,
    },
    "efficientloftr": {"EfficientLoFTRAttention": INPUTS},
    "emu3": {"Emu3VQVAEAttentionBlock": UNUSED},
    "esmfold2": {
        "EsmFold2AtomAttention": SIZES,
        "EsmFold2DiffusionAttention": SIZES,
        "EsmFold2MSAPairWeightedAveraging": SIZES,
    },
    "exaone4_5": {"Exaone4_5_Attention": UNUSED},
    "florence2": {
        "Florence2VisionChannelAttention": INPUTS,
        "Florence2VisionWindowAttention": INPUTS,
    },
    "fun_asr_nano": {"FunAsrNanoAttention": INPUTS},
    "gemma4": {"Gemma4VisionAttention": SIZES},
    "granite_speech5": {"GraniteSpeech5EncoderAttention": INPUTS},
    "inkling2": {"Inkling2VisionAttention": INPUTS},
    "kimi_k25": {"Kimi_K25VisionAttention": INPUTS},
    "kosmos2_5": {"Kosmos2_5VisionAttention": INPUTS},
    "lightglue": {"LightGlueAttention": INPUTS},
    "lw_detr": {"LwDetrAttention": INPUTS},
    "minicpm_ocr": {"MiniCPMOcrVisionAttention": INPUTS},
    "minicpmv4_6": {"MiniCPMV4_6VisionAttention": INPUTS},
    "minicpmv4_7": {"MiniCPMV4_7VisionAttention": INPUTS},
    "muse_glimmer": {"MuseGlimmerVisionAttention": INPUTS},
    "muse_glimmer_assistant": {"MuseGlimmerAssistantAttention": INPUTS},
    "muse_spark": {"MuseSparkVisionAttention": SIZES},
    "nemotron3_5_transcribe": {"Nemotron3_5TranscribeAttention": INPUTS},
    "nemotron3_diarization": {"Nemotron3DiarizationAttention": INPUTS},
    "nemotron_asr_streaming": {"NemotronAsrStreamingEncoderAttention": NAN},
    "neucodec": {"NeuCodecAttention": INPUTS},
    "pe_audio_video": {"PeAudioVideoEncoderAttention": TIMM},
    "pe_video": {"PeVideoEncoderAttention": TIMM},
    "pp_doclayout_v3": {"PPDocLayoutV3SelfAttention": INPUTS},
    "pp_ocrv5_mobile_rec": {"PPOCRV5MobileRecAttention": INPUTS},
    "pp_ocrv6_small_rec": {"PPOCRV6SmallRecAttention": INPUTS},
    "qwen2_5_omni": {"DiTAttention": INPUTS, "Qwen2_5OmniAudioAttention": INPUTS},
    "qwen3_omni_moe": {"Qwen3OmniMoeAudioAttention": INPUTS},
    "sam": {"SamAttention": INPUTS},
    "sam2": {"Sam2Attention": INPUTS, "Sam2MultiScaleAttention": INPUTS},
    "sam2_video": {"Sam2VideoAttention": SESSION, "Sam2VideoRoPEAttention": SESSION},
    "sam3": {"Sam3Attention": INPUTS},
    "sam3_lite_text": {"Sam3LiteTextAttention": INPUTS, "Sam3LiteTextTextAttention": INPUTS},
    "sam3_tracker": {"Sam3TrackerAttention": INPUTS},
    "sam3_tracker_video": {
        "Sam3TrackerVideoAttention": SESSION,
        "Sam3TrackerVideoRoPEAttention": SESSION,
    },
    "sam_hq": {"SamHQAttention": INPUTS},
    "sapiens2": {"Sapiens2Attention": INPUTS},
    "seamless_m4t": {"SeamlessM4TConformerSelfAttention": ROUNDING},
    "seamless_m4t_v2": {"SeamlessM4Tv2ConformerSelfAttention": ROUNDING},
    "xcodec2": {"Xcodec2Attention": INPUTS},
    "zamba2": {"Zamba2Attention": INPUTS},
}
"""Classes of attention that no tiny model reaches, by modeling file, and why."""
