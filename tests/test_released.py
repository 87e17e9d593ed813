"""Checkpoints in the files of Qwen3-VL-Embedding and Qwen3-VL-Reranker, small and random: how they are read.

The released repositories have the config of transformers 4 (rope_theta, rope_scaling), the processor in two files, the
vocabulary twice, a chat template, no card of this project, and weights in one file (2B) or several with an index (8B);
the embedder's 8B has no head for words.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration

from q3vl_mini import backbone
from q3vl_mini.embedder import Embedder
from q3vl_mini.export import export
from q3vl_mini.records import Clip
from q3vl_mini.reranker import Reranker

# Qwen3-VL's own chat template, as far as these tests go.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for content in message.content %}
{%- if content.type == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif content.type == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in content %}{{- content.text }}
{%- endif %}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ITEMS = ["a red cat", {"image": picture(0)}, {"image": picture(1, 96, 128), "text": "what is this?"}]


def shard(folder, parts: int) -> None:
    """model.safetensors as `parts` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {name: tensors[name] for name in sorted(tensors)[part::parts]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    size = sum(x.nbytes for x in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def released(small_checkpoint, tmp_path_factory):
    """released(role): a folder like Qwen/Qwen3-VL-Embedding-2B or Qwen/Qwen3-VL-Reranker-2B."""
    folders = tmp_path_factory.mktemp("released")

    def make(role):
        folder = folders / role
        if folder.exists():
            return folder
        folder.mkdir()
        shutil.copy(small_checkpoint / "model.safetensors", folder)
        config = json.loads((small_checkpoint / "config.json").read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        config["text_config"]["rope_scaling"] = rope
        config["vision_config"].pop("rope_parameters", None)
        config["transformers_version"] = "4.57.1"
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(small_checkpoint / "generation_config.json", folder)
        processor = AutoProcessor.from_pretrained(small_checkpoint)
        sizes = {"image": (65_536, 16_777_216), "video": (4_096, 25_165_824)}  # of Qwen3-VL; the released code's differ
        for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
            settings = getattr(processor, f"{kind}_processor").to_dict()
            settings |= {"size": dict(zip(("shortest_edge", "longest_edge"), sizes[kind], strict=True))}
            settings |= {"processor_class": "Qwen3VLProcessor"}
            (folder / name).write_text(json.dumps(settings))
        processor.tokenizer.save_pretrained(folder)
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        if role == "reranker":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "reranker.jinja").write_text("{{ messages }}")
        assert not (folder / "q3vl_mini.json").exists() and not (folder / "processor_config.json").exists()
        return folder

    return make


def test_the_config_of_transformers_4_is_the_same_model(released, small_checkpoint):
    ours, theirs = AutoConfig.from_pretrained(small_checkpoint), AutoConfig.from_pretrained(released("embedder"))
    assert ours.text_config.rope_parameters == theirs.text_config.rope_parameters


def test_the_embedder_writes_the_released_prompt_and_sizes_pictures_by_the_released_code(released):
    """The released embedder in a few lines: chat template, 4 to 1800 tokens a picture, the last state, normalised."""
    folder = released("embedder")
    embedder = Embedder(folder)
    assert embedder.template == "released" and embedder.max_length == 8192 and embedder.padding_side == "right"
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 1800 * 32 * 32}
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for item in ITEMS:
        fields = {"text": item} if isinstance(item, str) else item
        user = [{"type": kind, kind: fields[kind]} for kind in ("image", "text") if kind in fields]
        system = [{"type": "text", "text": "Find it."}]
        chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        inputs = processor(text=[text], images=[fields["image"]] if "image" in fields else None, return_tensors="pt")
        with torch.no_grad():
            rows.append(F.normalize(model.model(**inputs).last_hidden_state[0, -1], dim=-1).numpy())
    np.testing.assert_allclose(embedder.encode(ITEMS, "Find it"), np.stack(rows), atol=1e-5)


def test_visuals_have_the_tokens_of_the_released_code(released):
    embedder = Embedder(released("embedder"))

    def tokens(item):
        return int((embedder.collate([item])["mm_token_type_ids"] > 0).sum())

    assert tokens({"image": picture(0)}) == 4  # the processor's own settings would enlarge it to 64
    assert 1700 < tokens({"image": picture(1, 1600, 1500)}) <= 1800
    film = Clip(np.zeros((200, 32, 64, 3), dtype=np.uint8), fps=2.0)  # 100 seconds
    [visual] = embedder.collate([{"video": film}])["visuals"]
    assert visual.grid_thw[0] == 32  # 64 frames in pairs


def test_the_reranker_writes_the_released_prompt(released):
    folder = released("reranker")
    reranker = Reranker(folder)
    assert reranker.template == "released" and reranker.max_length == 10_240 and reranker.padding_side == "left"
    inputs = reranker.collate([("a cat", {"image": picture(0), "text": "12 apples"})])
    written = reranker.processor.tokenizer.decode(inputs["input_ids"][0]).replace("<|image_pad|>" * 4, "<|image_pad|>")
    assert written == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "search query, retrieve relevant candidates that answer the query.<Query>:a cat\n<Document>:<|vision_start|>"
        "<|image_pad|><|vision_end|>12 apples<|im_end|>\n<|im_start|>assistant\n"
    )


def test_weights_in_several_files_are_the_same_model(released, tmp_path):
    for role, kind in (("embedder", Embedder), ("reranker", Reranker)):
        whole = kind(released(role))
        shutil.copytree(released(role), tmp_path / role)
        shard(tmp_path / role, 3)
        parts = kind(tmp_path / role)
        assert not (tmp_path / role / "model.safetensors").exists()
        for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_an_embedder_needs_no_head_for_words(released, tmp_path):
    """Of the 8B, whose head is not tied to the embeddings, only the inner model is released."""
    expected = Embedder(released("embedder")).encode(ITEMS)
    shutil.copytree(released("embedder"), tmp_path / "untied")
    file = tmp_path / "untied" / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    config["text_config"]["tie_word_embeddings"] = False
    file.write_text(json.dumps(config))
    assert not any("lm_head" in name for name in load_file(tmp_path / "untied" / "model.safetensors"))
    np.testing.assert_allclose(Embedder(tmp_path / "untied").encode(ITEMS), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"no weights for words .* load it with Embedder"):
        Reranker(tmp_path / "untied")


@pytest.mark.parametrize(("role", "kind"), [("embedder", Embedder), ("reranker", Reranker)])
def test_a_hub_id_fetches_what_is_needed_and_no_code(released, monkeypatch, tmp_path, role, kind):
    wanted = []

    def snapshot(name, allow_patterns):
        wanted.append((name, allow_patterns))
        return str(released(role))

    monkeypatch.setattr(backbone, "snapshot_download", snapshot)
    name = f"Qwen/Qwen3-VL-{'Embedding' if role == 'embedder' else 'Reranker'}-2B"
    model = kind(name)
    [(asked, patterns)] = wanted
    assert asked == name and not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)
    assert model.template == "released" and model.model.name_or_path == name


def test_a_released_checkpoint_can_be_exported(released, tmp_path):
    from sentence_transformers import CrossEncoder

    folder = export(released("reranker"), tmp_path / "out", role="reranker")
    theirs = CrossEncoder(str(folder), device="cpu").predict([("a cat", item) for item in ITEMS])
    np.testing.assert_allclose(theirs, Reranker(released("reranker")).score("a cat", ITEMS), atol=1e-5)
