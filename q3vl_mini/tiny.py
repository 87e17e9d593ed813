"""Q3VL-tiny before training: a small config of the real Qwen3-VL class, its tokenizer and processor.

Everything is saved in Hub format, so `AutoProcessor` and `from_pretrained` load it like any Qwen3-VL.
The tokenizer is a byte-level BPE with Qwen's splitting rule and special tokens; the chat template
writes Qwen3-VL's chat format. Taught in notebooks/01.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2TokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

VOCAB_SIZE = 8192
# In the order of Qwen's own vocabulary; the reasoning and tool tokens are left out.
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Qwen's rule: contractions, words with one leading mark, single digits, punctuation, line breaks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}
<|video_pad|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens (special tokens included) learned from texts."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=32768,
    )
    # as it is after saving and loading: transformers gives every Qwen2Tokenizer the rule of its own, without \p{M}
    tokenizer.backend_tokenizer.pre_tokenizer = Qwen2TokenizerFast().backend_tokenizer.pre_tokenizer
    return tokenizer


def make_processor(tokenizer: Qwen2TokenizerFast, max_pixels: int = 1800 * 32 * 32) -> Qwen3VLProcessor:
    """The real Qwen3-VL processor: patch 16, merge 2, temporal patch 2, one visual token on 32 x 32 pixels."""
    geometry = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
    statistics = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    image = Qwen2VLImageProcessor(
        **geometry, **statistics, size={"shortest_edge": 4 * 32 * 32, "longest_edge": max_pixels}
    )
    video = Qwen3VLVideoProcessor(
        **geometry, **statistics, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 2 * 4500 * 32 * 32}
    )
    return Qwen3VLProcessor(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE
    )


def make_config(tokenizer: Qwen2TokenizerFast, **changes) -> Qwen3VLConfig:
    """Q3VL-tiny's config. `changes` override single values, with these names.

    vision_depth, vision_width (the tower's layers and width), patch (pixels of a patch's edge), merge (patches of the
    edge of a visual token), text_layers, width (the language model's).
    """
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    width, vision_width = changes.get("width", 256), changes.get("vision_width", 192)
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=changes.get("text_layers", 6),
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            head_dim=32,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            pad_token_id=ids["<|endoftext|>"],
            rope_parameters=dict(
                rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True
            ),
        ),
        vision_config=dict(
            depth=changes.get("vision_depth", 6),
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_heads=vision_width // 32,
            patch_size=changes.get("patch", 16),
            spatial_merge_size=changes.get("merge", 2),
            out_hidden_size=width,
            num_position_embeddings=64,
            deepstack_visual_indexes=[changes.get("vision_depth", 6) // 2],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def make_model(config: Qwen3VLConfig, tokenizer: Qwen2TokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The real model class with random weights in float32."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    stop = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop[1], do_sample=False)
    return model


def save(folder: Path, model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor) -> None:
    """Write weights (bfloat16 safetensors), config, tokenizer and processor in Hub format."""
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    for how_it_was_loaded in ("is_local", "local_files_only"):
        processor.tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    processor.save_pretrained(folder)
