"""export.py: one model in four libraries, its page, and what is sent to the Hub.

The loaders here are the libraries' own; none of this module's code stands between a folder and a vector.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from q3vl_mini import cli
from q3vl_mini import export as export_file
from q3vl_mini.backbone import add_lora, add_to_card, load, save
from q3vl_mini.compression import Quantizers
from q3vl_mini.config import data_dir
from q3vl_mini.embedder import Embedder
from q3vl_mini.export import export, push
from q3vl_mini.records import Clip
from q3vl_mini.reranker import Reranker

CARD = {"template": "report", "preset": "tiny", "seed": 0, "git": "0123456789abcdef", "stage": "s1"}
PARTS = [(role, template) for role in ("embedder", "reranker") for template in ("report", "released")]
KINDS = {"embedder": Embedder, "reranker": Reranker}


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


FRAMES = np.random.default_rng(9).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
CLIP = Clip(FRAMES, fps=1.0)
# The same clip as processors take it: frames (T, 3, H, W), and when they were taken.
VIDEO = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
METADATA = {"fps": 1.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
ITEMS = [
    "a red cat",
    {"text": "what is this?", "image": picture(1, 96, 128)},  # text first: the prompt has it last
    {"image": [picture(2), picture(3)], "text": ["12", " green apples"]},
    {"image": picture(0, 700, 30)},
    "",
]
QUERY = {"image": picture(4), "text": "the same in green"}


@pytest.fixture(scope="module")
def trained(small_checkpoint, tmp_path_factory):
    """Adapters whose B is not zero, one for each role and template; the embedder with learned steps."""
    folder = tmp_path_factory.mktemp("trained")
    for role, template in PARTS:
        base = load(small_checkpoint)
        model = add_lora(base.model, 4, 8)
        torch.manual_seed(len(role))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        quantizers = None
        if role == "embedder":
            quantizers = Quantizers([16, 64])
            quantizers.of(16, "int8").initialise(torch.randn(4, 16))
        card = {**CARD, "role": role, "template": template, "stage": "reranker" if role == "reranker" else "s1"}
        save(folder / f"{role}-{template}", model, base.processor, card, quantizers)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """exported(role, template, merged): the folder, made once."""
    folder = tmp_path_factory.mktemp("exported")

    def get(role, template="report", merged=True):
        source, out = trained / f"{role}-{template}", folder / f"{role}-{template}-{'full' if merged else 'adapter'}"
        return out if out.exists() else export(source, out, merged)

    return get


@pytest.fixture(scope="module")
def expected(trained):
    """Vectors of ITEMS and the clip, or scores of the query with them, by the checkpoint itself."""

    def get(role, template="report", **options):
        model = KINDS[role](trained / f"{role}-{template}")
        if role == "embedder":
            return model.encode([*ITEMS, {"video": CLIP}], **options)
        return model.score(QUERY, [*ITEMS, {"video": CLIP}], **options)

    return get


every_way = pytest.mark.parametrize("merged", [True, False], ids=["merged", "adapter"])
every_part = pytest.mark.parametrize(("role", "template"), PARTS)


# --- the same numbers in every library ---


@every_way
@every_part
def test_this_module_loads_it(exported, expected, role, template, merged):
    model = KINDS[role](exported(role, template, merged))
    documents = [*ITEMS, {"video": CLIP}]
    found = model.encode(documents) if role == "embedder" else model.score(QUERY, documents)
    np.testing.assert_allclose(found, expected(role, template), atol=1e-5)
    assert model.template == template and isinstance(model.model, PeftModel) != merged


def content_of(item, role):
    """One message, as a user of transformers writes it."""
    fields = {"text": item} if isinstance(item, str) else item
    parts = []
    for kind, values in fields.items():
        values = [VIDEO] if kind == "video" else values if isinstance(values, list) else [values]
        parts += [{"type": kind, kind: value} for value in values]
    return {"role": role, "content": parts}


def plain_model(folder, small_checkpoint, merged):
    if merged:
        return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = AutoModelForMultimodalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).get_base_model().eval()


@every_way
@every_part
def test_plain_transformers_and_peft_load_it(exported, expected, small_checkpoint, role, template, merged):
    folder = exported(role, template, merged)
    processor = AutoProcessor.from_pretrained(folder)
    model = plain_model(folder, small_checkpoint, merged)
    documents = [*ITEMS, {"video": CLIP}]
    if role == "embedder":
        chats = [[content_of(item, "user")] for item in documents]
    else:
        chats = [[content_of(QUERY, "query"), content_of(item, "document")] for item in documents]
    options = {"padding": True, "padding_side": "left", "videos_kwargs": {"video_metadata": [METADATA]}}
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    assert not inputs["attention_mask"].all()  # padded
    with torch.no_grad():
        if role == "embedder":
            found = F.normalize(model.model(**inputs).last_hidden_state[:, -1], dim=-1)
        else:
            logits = model(**inputs).logits[:, -1]
            yes, no = (processor.tokenizer.get_vocab()[word] for word in ("yes", "no"))
            found = torch.sigmoid(logits[:, yes] - logits[:, no])
    np.testing.assert_allclose(found.numpy(), expected(role, template), atol=1e-5)


def load_there(kind, folder, merged, **options):
    """A merged folder says float32; an adapter comes in the dtype of its base, here bfloat16, unless told."""
    if not merged:
        options["model_kwargs"] = {"dtype": torch.float32}
    return kind(str(folder), device="cpu", **options)


@every_way
@pytest.mark.parametrize("template", ["report", "released"])
def test_sentence_transformers_loads_an_embedder(exported, expected, template, merged):
    from sentence_transformers import SentenceTransformer

    folder = exported("embedder", template, merged)
    model = load_there(SentenceTransformer, folder, merged)
    video = {"video": {"array": VIDEO, "video_metadata": METADATA}}
    np.testing.assert_allclose(model.encode([*ITEMS, video]), expected("embedder", template), atol=1e-5)
    alone = np.stack([model.encode(item) for item in ITEMS])
    np.testing.assert_allclose(alone, expected("embedder", template)[:-1], atol=1e-5)

    for instruction in ("Find it", "Find it.", ""):
        told = Embedder(folder).encode(ITEMS, instruction)
        np.testing.assert_allclose(model.encode(ITEMS, prompt=instruction), told, atol=1e-5)
    np.testing.assert_allclose(model.encode_document(ITEMS[:2]), model.encode(ITEMS[:2]), atol=1e-6)

    short = model.encode(ITEMS, truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(short, Embedder(folder).encode(ITEMS, dim=16), atol=1e-5)
    cut = load_there(SentenceTransformer, folder, merged, truncate_dim=16)
    assert cut.encode(ITEMS[:2]).shape == (2, 16)
    cosine = cut.similarity(*cut.encode(ITEMS[:2]))
    np.testing.assert_allclose(cosine, [[short[0] @ short[1]]], atol=1e-5)


@every_way
@pytest.mark.parametrize("template", ["report", "released"])
def test_sentence_transformers_loads_a_reranker(exported, expected, template, merged):
    from sentence_transformers import CrossEncoder

    folder = exported("reranker", template, merged)
    model = load_there(CrossEncoder, folder, merged)
    np.testing.assert_allclose(
        model.predict([(QUERY, item) for item in ITEMS]), expected("reranker", template)[:-1], atol=1e-5
    )
    ours = Reranker(folder)
    texts = ["a red cat", "12 green apples and a cat", "yes"]
    pairs = [("a cat", text) for text in texts]
    np.testing.assert_allclose(model.predict(pairs), ours.score("a cat", texts), atol=1e-5)
    told = ours.score(QUERY, ITEMS, instruction="Find it")
    np.testing.assert_allclose(model.predict([(QUERY, item) for item in ITEMS], prompt="Find it"), told, atol=1e-5)
    ranked, theirs = ours.rank("a cat", texts), model.rank("a cat", texts)
    assert [hit["corpus_id"] for hit in theirs] == [hit["corpus_id"] for hit in ranked]


# --- what is in the folder ---


def test_merged_weights_are_the_base_plus_the_scaled_product(exported, trained, small_checkpoint):
    adapter = load_file(trained / "embedder-report" / "adapter_model.safetensors")
    before, after = (load_file(f / "model.safetensors") for f in (small_checkpoint, exported("embedder")))
    name = "model.language_model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = before[f"{name}.weight"].float() + 8 / 4 * b @ a
    torch.testing.assert_close(after[f"{name}.weight"], expected)
    assert b.abs().max() > 0.05
    untouched = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(after[untouched], before[untouched].float())
    assert set(after) == set(before)


def test_card_template_and_learned_steps_are_kept(exported, trained):
    kept, source = load(exported("embedder")), load(trained / "embedder-report")
    assert {key: kept.card[key] for key in CARD} == CARD and kept.card["role"] == "embedder"
    for name, value in source.quantizers.state_dict().items():
        assert torch.equal(kept.quantizers.state_dict()[name], value)


def test_other_libraries_sample_a_video_as_the_card_says(trained, tmp_path):
    source = shutil.copytree(trained / "embedder-report", tmp_path / "dense")
    add_to_card(source, {"fps": 2.0})
    processor = AutoProcessor.from_pretrained(export(source, tmp_path / "out"))
    assert processor.video_processor.fps == Embedder(tmp_path / "out").budget.fps == 2.0


def test_weights_can_be_smaller(trained, tmp_path, expected):
    for merged in (True, False):
        folder = export(trained / "embedder-report", tmp_path / f"half-{merged}", merged, dtype="bfloat16")
        [file] = folder.glob("*model.safetensors")
        assert {x.dtype for x in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half-True" / "config.json").read_text())["dtype"] == "bfloat16"
    cosines = (Embedder(tmp_path / "half-True").encode(ITEMS) * expected("embedder")[:-1]).sum(1)
    assert 0.99 < cosines.min() < 0.999999


def test_an_adapter_names_its_base_by_its_path_or_as_told(exported, trained, small_checkpoint, tmp_path):
    def base_of(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert json.loads((folder / "q3vl_mini.json").read_text())["base"] == config["base_model_name_or_path"]
        return config["base_model_name_or_path"]

    assert base_of(exported("embedder", merged=False)) == str(small_checkpoint.resolve())
    told = export(trained / "embedder-report", tmp_path / "told", merged=False, base="org/base")
    assert base_of(told) == "org/base" and "base_model: org/base" in (told / "README.md").read_text()
    shipped = export("s0", tmp_path / "s0", merged=False)  # a shipped name, which other libraries do not know
    assert base_of(shipped) == str((data_dir() / "q3vl-tiny").resolve())


def test_an_export_can_be_exported_again(exported, tmp_path, expected):
    again = export(exported("reranker", merged=False), tmp_path / "again")
    np.testing.assert_allclose(
        Reranker(again).score(QUERY, [*ITEMS, {"video": CLIP}]), expected("reranker"), atol=1e-5
    )


def test_vllm_gets_its_arguments_and_its_prompt(exported):
    embedder = yaml.safe_load((exported("embedder") / "vllm.yaml").read_text())
    assert embedder["runner"] == "pooling" and json.loads(embedder["pooler-config"]) == {"pooling_type": "LAST"}
    assert json.loads(embedder["hf-overrides"]) == {"matryoshka_dimensions": [16, 64]}
    reranker = yaml.safe_load((exported("reranker") / "vllm.yaml").read_text())
    assert json.loads(reranker["hf-overrides"]) == {
        "architectures": ["Qwen3VLForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    for role, settings in (("embedder", embedder), ("reranker", reranker)):
        prompt = (exported(role) / settings["chat-template"]).read_text()
        ours = (exported(role) / "chat_template.jinja").read_text()
        video = '"<|vision_start|><|video_pad|><|vision_end|>"'
        assert prompt != ours and prompt.replace(video, '"<|video_pad|>"').strip() == ours.strip()
    assert not (exported("embedder", merged=False) / "vllm.yaml").exists()


# --- its page ---

RECORD = {"score": 0.25, "metric": "hit@1", "n_queries": 40, "n_candidates": 12.5, "chance": 0.08, "ci": [0.125, 0.5]}
RESULTS = {
    "meta": {"preset": "tiny", "seed": 0, "git": "0123456789abcdef"},
    "models": {
        "s1": {"image_cls": RECORD, "sts": {**RECORD, "metric": "spearman"}, "mean": {"score": 0.25}, "datasets": {}},
        "s3": {"image_cls": {**RECORD, "score": 0.625}, "mean": {"score": 0.625}},
        "s3+reranker": {"image_cls": {**RECORD, "score": 0.5}, "mean": {"score": 0.5}},
    },
    "unseen_styles": {"s1": {"hit@1": 0.125, "hit@10": 0.75, "n": 80}},
}


def test_the_page_has_the_scores_of_this_model(trained, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    folder = export(trained / "embedder-report", tmp_path / "model", results=tmp_path / "results.json")
    page = ModelCard.load(folder / "README.md")
    assert "| image_cls | hit@1 | 25.0 | 12.5 to 50.0 | 8.0 | 40 | 12 |" in page.text
    assert "| mean | | 25.0 |" in page.text and "62.5" not in page.text
    assert "80 queries: Hit@1 12.5, Hit@10 75.0" in page.text
    assert "seed 0, at revision `0123456789ab`" in page.text and "not to be compared" in page.text
    assert "concept" in page.text and "CC-BY-4.0" in page.text
    assert page.data.license == "apache-2.0" and page.data.pipeline_tag == "feature-extraction"
    assert page.data.library_name == "sentence-transformers" and page.data.base_model is None  # no model of the Hub


def test_a_rerankers_page_compares_it_with_the_embedder_alone(trained, tmp_path):
    folder = export(trained / "reranker-report", tmp_path / "model", merged=False, results=RESULTS)
    page = ModelCard.load(folder / "README.md")
    assert "| image_cls | hit@1 | 50.0 |" in page.text
    assert "makes the order worse: a mean of 50.0 with it, 62.5 without" in page.text
    assert page.data.pipeline_tag == "text-ranking" and page.data.library_name == "peft"
    data = page.text.partition("## Training data")[2]
    assert "scene_retrieval" in data and "text_group" not in data  # the reranker's own sub-datasets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {**RESULTS["meta"], "preset": "full"}}, "with preset 'full', the model is of one with 'tiny'"),
        ({"meta": {**RESULTS["meta"], "seed": 7}}, "with seed 7"),
        ({"meta": {**RESULTS["meta"], "git": "fedcba"}}, "with git 'fedcba'"),
        ({"models": {"s0": RESULTS["models"]["s1"]}}, r"have no 's1'; they have \['s0'\]"),
    ],
)
def test_results_of_another_run_are_refused_before_anything_is_written(trained, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export(trained / "embedder-report", tmp_path / "model", results=RESULTS | changes)
    assert not list(tmp_path.iterdir())


@every_way
@pytest.mark.parametrize("role", ["embedder", "reranker"])
def test_the_code_of_the_page_runs_and_gives_the_same(exported, role, merged, monkeypatch):
    folder = exported(role, merged=merged)
    picture(0).save(folder.parent / "cat.png")
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    ours, plain, theirs = ({} for _ in range(3))
    for code, variables in zip(blocks, (ours, plain, theirs), strict=True):
        exec(code, variables)
    if role == "embedder":
        np.testing.assert_allclose(plain["vectors"][0], ours["vectors"][1], atol=1e-5)
        np.testing.assert_allclose(theirs["vectors"], ours["vectors"], atol=1e-5)
        assert theirs["short"].shape == (1, 16)
        assert np.abs(theirs["queries"] - theirs["vectors"][:1]).max() > 0.01  # another prompt
    else:
        np.testing.assert_allclose(plain["scores"][0], ours["scores"][1], atol=1e-5)
        np.testing.assert_allclose(theirs["scores"], ours["scores"], atol=1e-5)


@pytest.mark.parametrize(("name", "key"), [("s3", "s3"), ("reranker", "s3+reranker")])
def test_a_shipped_model_has_the_shipped_results_if_it_is_of_that_run(name, key, tmp_path):
    results = json.loads((data_dir().parent / "results" / "tiny.json").read_text())
    if load(name).card["git"] != results["meta"]["git"]:  # a later training, which the results do not know
        with pytest.raises(ValueError, match="results of the run that made it"):
            export(name, tmp_path / name, results=results)
        results = None
    text = (export(name, tmp_path / name, results=results) / "README.md").read_text()
    assert results is None or f"{100 * results['models'][key]['image_ret']['score']:.1f}" in text
    assert "It shows how such a model is made; it is not for use." in text


# --- what is refused ---


def test_full_weights_have_no_adapter_to_export(exported, tmp_path):
    with pytest.raises(ValueError, match="has full weights, no adapter; export it merged"):
        export(exported("embedder"), tmp_path / "out", merged=False)


def test_the_role_is_asked_for_where_no_card_tells_it(small_checkpoint, trained, tmp_path):
    with pytest.raises(ValueError, match=r"give role as one of \['embedder', 'reranker'\]"):
        export(small_checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="role 'embedder', not 'reranker'"):
        export(trained / "embedder-report", tmp_path / "out", role="reranker")
    folder = export(small_checkpoint, tmp_path / "out", role="reranker")
    assert Reranker(folder).template == "released"  # what a checkpoint without a card has
    page = ModelCard.load(folder / "README.md")
    assert "from a checkpoint that it did not train" in page.text and page.data.license is None
    assert "Not known to q3vl_mini" in page.text and "Emoji World" not in page.text


def test_only_an_older_export_is_replaced(trained, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="is no checkpoint of this module; it would be replaced"):
        export(trained / "embedder-report", mine)
    assert (mine / "notes.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(trained / "embedder-report", trained / "embedder-report")
    first = export(trained / "embedder-report", tmp_path / "out")
    export(trained / "embedder-report", first, merged=False)
    assert (first / "adapter_model.safetensors").is_file() and not (first / "model.safetensors").exists()


# --- the Hub ---


@pytest.fixture
def hub(monkeypatch):
    """Calls that would have gone to the Hub."""
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, folder_path))
            assert "adapter_config.json" in options["delete_patterns"]  # of an earlier upload, beside merged weights

    monkeypatch.setattr(export_file, "HfApi", Api)
    return calls


def test_a_push_makes_a_private_repository_and_uploads_the_folder(exported, hub):
    folder = exported("embedder")
    assert hub == []  # export alone sends nothing
    assert push(folder, "org/model") == "https://huggingface.co/org/model"
    assert hub == [("create", "org/model", {"private": True, "exist_ok": True}), ("upload", "org/model", folder)]
    push(folder, "org/model", private=False)
    assert hub[2][2]["private"] is False


def test_the_command_line_pushes_what_it_exports(trained, hub, tmp_path, capsys):
    arguments = ["export", str(trained / "embedder-report"), str(tmp_path / "out"), "--push", "org/model", "--json"]
    assert cli.main([*arguments, "--public"]) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "https://huggingface.co/org/model"
    assert [call[:2] for call in hub] == [("create", "org/model"), ("upload", "org/model")]
    assert hub[0][2]["private"] is False and hub[1][2] == tmp_path / "out"
    assert "# org/model" in (tmp_path / "out/README.md").read_text()


def test_what_others_could_not_load_is_not_pushed(exported, trained, hub):
    with pytest.raises(ValueError, match="which only this machine has; push the base"):
        push(exported("embedder", merged=False), "org/model")
    with pytest.raises(ValueError, match="is not what export wrote"):
        push(trained / "embedder-report", "org/model")
    assert hub == []
