"""backbone.py: finding, loading and saving checkpoints, and LoRA exactly as published."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from q3vl_mini import backbone
from q3vl_mini.backbone import LORA_MODULES, add_lora, base_of, inner, load, load_beside, model_card, resolve, save
from q3vl_mini.compression import Quantizers
from q3vl_mini.plan import meta_model, model_config

CARD = {"role": "embedder", "template": "report", "stage": "s0", "seed": 3, "scores": {"image_ret": 0.5}}
IDS = torch.tensor([[5, 6, 7, 8]])


def hidden(model):
    with torch.no_grad():
        return inner(model).model(input_ids=IDS).last_hidden_state


def randomise_lora(model):
    """B starts at zero; a trained adapter's does not."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def base(small_checkpoint):
    return load(small_checkpoint)


@pytest.fixture
def data(tmp_path, monkeypatch, small_checkpoint):
    """A data_samples folder that ships one base."""
    folder = tmp_path / "data_samples"
    shutil.copytree(small_checkpoint, folder / "q3vl-small")
    monkeypatch.setattr(backbone, "data_dir", lambda: folder)
    return folder


# --- finding and loading ---


def test_a_path_and_a_shipped_name_are_found(small_checkpoint, data):
    (data / "adapters" / "s0").mkdir(parents=True)
    assert resolve(small_checkpoint) == resolve(str(small_checkpoint)) == small_checkpoint.resolve()
    assert resolve("q3vl-small") == data.resolve() / "q3vl-small"
    assert resolve("s0") == resolve("adapters/s0") == data.resolve() / "adapters" / "s0"


def test_an_existing_folder_comes_before_a_shipped_name(data, tmp_path, monkeypatch):
    (tmp_path / "q3vl-small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("q3vl-small") == tmp_path.resolve() / "q3vl-small"


def test_what_is_nowhere_is_named_with_every_place(data):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'Org/no-such-model'.*data_samples/adapters.*the Hub"):
        resolve("Org/no-such-model")
    with pytest.raises(FileNotFoundError, match="no checkpoint '../nowhere'"):
        resolve("../nowhere")


def test_names_work_without_any_data(monkeypatch, small_checkpoint):
    def absent():
        raise FileNotFoundError("data_samples not found")

    monkeypatch.setattr(backbone, "data_dir", absent)
    assert resolve(small_checkpoint) == small_checkpoint.resolve()


def test_a_checkpoint_loads_for_the_cpu(base):
    assert base.model.dtype == torch.float32
    assert base.model.config.text_config._attn_implementation == "by_length"
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.model.visual.parameters())
    assert base.card == {"template": "released"}  # a checkpoint without a card is an original one
    assert load(base.model.name_or_path, template="report").card["template"] == "report"
    assert load(base.model.name_or_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_an_unknown_template_is_refused(small_checkpoint):
    with pytest.raises(ValueError, match="no template 'readme'"):
        load(small_checkpoint, template="readme")


def test_only_safetensors_are_read(small_checkpoint, tmp_path):
    model = load(small_checkpoint).model
    folder = tmp_path / "pickled"
    shutil.copytree(small_checkpoint, folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(folder)


# --- LoRA ---

@pytest.mark.parametrize("size, layers", [("2B", 28), ("8B", 36)])
def test_lora_adapts_the_six_projections_of_the_true_models_and_nothing_else(size, layers):
    config = model_config(f"Qwen/Qwen3-VL-{size}-Instruct")
    model = meta_model(config)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    blocks = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
    assert adapted == {
        f"base_model.model.model.language_model.layers.{i}.{blocks.get(name, 'mlp')}.{name}"
        for i in range(layers)
        for name in LORA_MODULES
    }
    assert len(adapted) == layers * 6

    width, wide = config.text_config.hidden_size, config.text_config.intermediate_size
    heads = config.text_config.num_attention_heads * 128
    shapes = [(width, heads), *[(width, 8 * 128)] * 2, *[(width, wide)] * 2, (wide, width)]
    expected = layers * sum(32 * (n_in + n_out) for n_in, n_out in shapes)  # rank 32
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_lora_has_scale_one_no_dropout_and_leaves_the_output(base):
    before = hidden(base.model)
    model = add_lora(base.model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {1.0}  # alpha 32 over rank 32
    assert all(isinstance(layer.lora_dropout["default"], torch.nn.Identity) for layer in layers)
    assert torch.equal(hidden(model), before)
    assert not torch.allclose(hidden(randomise_lora(model)), before, atol=1e-2)


# --- saving ---


def test_an_adapter_comes_back_with_its_card_and_steps(base, tmp_path):
    model = randomise_lora(add_lora(base.model))
    quantizers = Quantizers([16, 64])
    quantizers.of(16, "int8").initialise(torch.randn(4, 16))
    save(tmp_path / "s0", model, base.processor, CARD, quantizers)
    again = load(tmp_path / "s0")
    assert isinstance(again.model, PeftModel)
    assert torch.allclose(hidden(again.model), hidden(model), atol=1e-6)
    assert {key: again.card[key] for key in CARD} == CARD
    assert not any(p.requires_grad for n, p in again.model.named_parameters() if "lora" in n)
    trainable = load(tmp_path / "s0", trainable=True).model
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "lora" in n
    }
    for name, value in quantizers.state_dict().items():
        assert torch.equal(again.quantizers.state_dict()[name], value), name
    files = {file.name for file in (tmp_path / "s0").iterdir()}
    assert {"adapter_model.safetensors", "chat_template.jinja", "processor_config.json", "README.md"} <= files
    assert "model.safetensors" not in files and not any(name.endswith(".bin") for name in files)


def test_an_adapter_loads_in_plain_transformers_and_peft(base, tmp_path, small_checkpoint):
    model = randomise_lora(add_lora(base.model))
    save(tmp_path / "s0", model, base.processor, CARD)
    plain = Qwen3VLForConditionalGeneration.from_pretrained(small_checkpoint, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, tmp_path / "s0")
    assert torch.allclose(hidden(plain), hidden(model), atol=1e-5)


def test_an_adapter_of_a_shipped_base_names_it_without_a_path(data, tmp_path):
    loaded = load("q3vl-small")
    save(tmp_path / "s0", add_lora(loaded.model), loaded.processor, CARD)
    assert json.loads((tmp_path / "s0" / "adapter_config.json").read_text())["base_model_name_or_path"] == "q3vl-small"
    assert hidden(load(tmp_path / "s0").model).equal(hidden(loaded.model))


def test_an_adapter_finds_its_base_after_both_have_moved(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "run" / "base")
    loaded = load(tmp_path / "run" / "base")
    save(tmp_path / "run" / "adapters" / "s0", randomise_lora(add_lora(loaded.model)), loaded.processor, CARD)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = load(tmp_path / "moved" / "adapters" / "s0")
    assert torch.allclose(hidden(moved.model), hidden(loaded.model), atol=1e-6)
    # ... and again, saved in another place
    save(tmp_path / "elsewhere", moved.model, moved.processor, moved.card)
    assert torch.allclose(hidden(load(tmp_path / "elsewhere").model), hidden(loaded.model), atol=1e-6)


def test_an_adapter_whose_base_is_gone_says_so(base, tmp_path):
    save(tmp_path / "s0", add_lora(base.model), base.processor, CARD)
    config = tmp_path / "s0" / "adapter_config.json"
    config.write_text(config.read_text().replace("small", "gone"))
    with pytest.raises(FileNotFoundError, match="no checkpoint '.*gone'"):
        load(tmp_path / "s0")


def test_several_adapters_lie_on_the_weights_of_one_base(small_checkpoint, base, tmp_path):
    bare = hidden(base.model)
    for name in ("one", "two"):
        model = add_lora(load(small_checkpoint).model, rank=4)
        randomise_lora(model)
        save(tmp_path / name, model, base.processor, {"role": "embedder", "template": "report", "called": name})
    alone = [hidden(load(tmp_path / name).model) for name in ("one", "two")]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    one = load_beside(base, tmp_path / "one", "first")
    two = load_beside(one, tmp_path / "two", "second")
    assert two.model is one.model and inner(one.model) is base.model
    assert one.fingerprint() == load(tmp_path / "one").fingerprint() != two.fingerprint()
    assert [x.card["called"] for x in (one, two)] == ["one", "two"]
    for name, expected in (("first", alone[0]), ("second", alone[1]), ("first", alone[0])):
        two.model.set_adapter(name)
        torch.testing.assert_close(hidden(two.model), expected)
    with two.model.disable_adapter():
        torch.testing.assert_close(hidden(two.model), bare)
    assert base_of(tmp_path / "one") == base_of(small_checkpoint) == small_checkpoint.resolve()
    with pytest.raises(ValueError, match="is no adapter"):
        load_beside(two, small_checkpoint, "third")
    other = load(shutil.copytree(small_checkpoint, tmp_path / "other"))
    with pytest.raises(ValueError, match="one is an adapter of .*small, and .*other has other weights"):
        load_beside(other, tmp_path / "one", "first")


def test_full_weights_come_back(base, tmp_path):
    with torch.no_grad():
        base.model.model.language_model.norm.weight.mul_(1.5)
    save(tmp_path / "full", base.model, base.processor, CARD)
    again = load(tmp_path / "full")
    assert torch.equal(hidden(again.model), hidden(base.model))
    assert again.card["template"] == "report" and again.quantizers is None


def test_weights_on_disk_can_be_smaller(base, tmp_path):
    model = randomise_lora(add_lora(base.model))
    save(tmp_path / "half", model, base.processor, CARD, dtype=torch.float16)
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float16}
    assert torch.allclose(hidden(load(tmp_path / "half").model), hidden(model), atol=2e-2)
    assert model.dtype == torch.float32


def test_an_interrupted_save_leaves_the_old_checkpoint(base, tmp_path, monkeypatch):
    model = randomise_lora(add_lora(base.model))
    save(tmp_path / "s0", model, base.processor, CARD)
    before = hidden(model)
    randomise_lora(model)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(base.processor), "save_pretrained", killed)
        save(tmp_path / "s0", model, base.processor, {**CARD, "stage": "s1"})
    again = load(tmp_path / "s0")
    assert again.card["stage"] == "s0" and torch.allclose(hidden(again.model), before, atol=1e-6)

    save(tmp_path / "s0", model, base.processor, {**CARD, "stage": "s1"})
    assert load(tmp_path / "s0").card["stage"] == "s1"
    assert [file.name for file in tmp_path.iterdir()] == ["s0"]  # nothing is left beside it


@pytest.mark.parametrize(
    "card, message",
    [
        ({"role": "teacher", "template": "report"}, "role is 'teacher'; expected"),
        ({"template": "report"}, "role is None"),
        ({"role": "reranker"}, "no template ''"),
    ],
)
def test_a_card_without_role_or_template_is_refused(base, tmp_path, card, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "s0", base.model, base.processor, card)
    assert not (tmp_path / "s0").exists()


def test_the_readme_shows_every_entry_of_the_card():
    text = model_card("s0", {**CARD, "git": "abc|1", "base": "q3vl-tiny"})
    for line in ("base_model: q3vl-tiny", "| stage | s0 |", "| scores image_ret | 0.5 |", "| git | abc\\|1 |"):
        assert line in text
    assert "from q3vl_mini.embedder import Embedder" in text
    assert "from q3vl_mini.reranker import Reranker" in model_card("r", {**CARD, "role": "reranker"})


# --- whose weights ---


@pytest.fixture
def adapters(data):
    """Two adapters with different weights, on the shipped base."""
    for name in ("s0", "s1"):
        loaded = load("q3vl-small")
        save(data / "adapters" / name, randomise_lora(add_lora(loaded.model)), loaded.processor, CARD)
    return data / "adapters"


def test_a_fingerprint_is_of_the_weights_wherever_they_lie(adapters, tmp_path):
    prints = {name: load(name).fingerprint() for name in ("q3vl-small", "s0", "s1")}
    assert len(set(prints.values())) == 3 and all(re.fullmatch("[0-9a-f]{64}", x) for x in prints.values())
    shutil.copytree(adapters.parent, tmp_path / "moved")
    for name in ("q3vl-small", "adapters/s0"):
        moved = load(tmp_path / "moved" / name, dtype=torch.bfloat16)
        assert moved.fingerprint() == prints[name.split("/")[-1]]
    assert load("s0").name == "s0"


def test_the_base_of_an_adapter_is_in_its_fingerprint(adapters):
    before = load("s0").fingerprint()
    weights = adapters.parent / "q3vl-small" / "model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).flatten()[0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    assert load("s0").fingerprint() != before


def test_a_model_in_training_has_the_fingerprint_of_its_weights_now(adapters):
    loaded = load("s0", trainable=True)
    before = loaded.fingerprint()
    assert loaded.fingerprint() == before
    randomise_lora(loaded.model)
    assert loaded.fingerprint() != before


def test_a_model_that_took_the_loaded_ones_place_has_its_own_fingerprint(base):
    before = base.fingerprint()
    base.model = add_lora(base.model)
    with_lora = base.fingerprint()
    randomise_lora(base.model)
    assert len({before, with_lora, base.fingerprint()}) == 3
