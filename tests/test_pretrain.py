"""Pre-training: dialogues are right, the loss counts answers alone, and it writes a checkpoint that loads."""

import json
import math
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from two_processes import run_in_two_processes

from q3vl_mini import machine, muon, pretrain_judge, pretrain_language, tiny
from q3vl_mini import pretrain as pretrain_module
from q3vl_mini.backbone import load
from q3vl_mini.emoji_world import candidates, sprites, tasks, words
from q3vl_mini.emoji_world.bank import SpriteBank
from q3vl_mini.emoji_world.dialogues import JUDGED, SYSTEM_MESSAGES, Turn, dialogues, judged, short_turns
from q3vl_mini.emoji_world.scenes import COLOURS, Placed, Scene
from q3vl_mini.emoji_world.tasks import bucket
from q3vl_mini.media import as_list
from q3vl_mini.pretrain import Round, pretrain
from q3vl_mini.pretrain_judge import JudgeConfig, first_of, judging_loss
from q3vl_mini.pretrain_language import (
    LanguageConfig,
    answer_logits,
    answer_loss,
    batches_alike,
    collate,
    judges,
    with_shuffled_pictures,
)
from q3vl_mini.pretrain_vision import VisionConfig
from q3vl_mini.templates import EMBEDDER_INSTRUCTION, Content, embedder_prompt, prompt_text, reranker_prompt


def test_a_tokenizer_splits_text_as_it_does_after_saving_and_loading(tmp_path):
    text = unicodedata.normalize("NFC", "แมวสีแดง लाल बिल्ली red cat")  # with marks, which Qwen2's rule splits off
    tokenizer = tiny.train_tokenizer([text] * 9, vocab_size=400)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(text) == tokenizer.tokenize(text)


@pytest.fixture(scope="module")
def model(small_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(small_checkpoint, dtype=torch.float32)


TURNS = [
    Turn("name", {"image": Scene((Placed("1f34e", "noto"),)), "text": "What is this?"}, "red apple"),
    Turn("translate", {"text": "Katze in English?"}, "cat"),
]


def test_labels_are_the_answers_and_their_end_and_nothing_else(processor):
    batch = collate(TURNS, processor)
    tokenizer = processor.tokenizer
    for row, turn in enumerate(TURNS):
        labels = batch["labels"][row]
        counted = labels[labels != -100]
        assert tokenizer.decode(counted) == turn.answer + "<|im_end|>"
        assert torch.equal(counted, batch["inputs"]["input_ids"][row][labels != -100])


def test_the_prompt_is_the_chat_template_s(processor):
    batch = collate(TURNS[:1], processor)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red apple"}]
    expected = processor.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert processor.tokenizer.decode(batch["inputs"]["input_ids"][0]) == expected.removesuffix("\n")


def test_the_loss_is_that_of_transformers_on_the_same_labels(model, processor):
    batch = collate(TURNS, processor)
    inputs = {k: v for k, v in batch["inputs"].items() if k != "visuals"}
    pixels = torch.cat([v.pixel_values for v in batch["inputs"]["visuals"]])
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels, labels=batch["labels"]).loss
        ours = answer_loss(model, batch)
    assert math.isclose(ours, expected, rel_tol=0.02)  # ours computes in bfloat16


def test_shuffled_pictures_keep_question_and_answer_and_change_the_picture():
    turns = [t for t in dialogues(300, 0) if "image" in t.question]

    def told(t):
        return t.kind, t.question.get("text"), t.answer, repr(t.question["image"])

    before, after = set(map(told, turns)), list(map(told, with_shuffled_pictures(turns)))
    assert {x[:3] for x in after} == {x[:3] for x in before}
    assert sum(x in before for x in after) < 0.1 * len(after)


@pytest.fixture(scope="module")
def short():
    return short_turns(SpriteBank(["noto"], [c.key for c in sprites.concepts()]), 600, seed=5, strength=0.8)


def test_short_dialogues_are_on_pictures_and_on_words_and_repeat_themselves_for_a_seed(short):
    pictures = [t for t in short if "image" in t.question]
    assert len(short) == 600 and 0.5 < len(pictures) / len(short) < 0.65
    assert {t.question["image"].shape for t in pictures} == {(64, 64, 3)}
    assert {t.kind for t in short} == {"name", "translate", "said", "kind"}
    bank = SpriteBank(["noto"], [c.key for c in sprites.concepts()])
    again = short_turns(bank, 600, seed=5, strength=0.8)
    assert [(t.question.get("text"), t.answer) for t in again] == [(t.question.get("text"), t.answer) for t in short]


def test_no_short_dialogue_shows_a_colour_on_a_thing_that_is_held_out(short):
    key_of = {words.name(c.key): c.key for c in sprites.concepts()}
    coloured = [t.answer.split(" ", 1) for t in short if t.kind == "name"]
    coloured = [(a[0], key_of[a[1]]) for a in coloured if a[0] in COLOURS and len(a) == 2 and a[1] in key_of]
    assert len(coloured) > 20 and all(bucket(key, colour) >= 2 for colour, key in coloured)


def test_system_messages_are_the_embedders_prompt_and_may_stand_for_the_request(processor):
    assert SYSTEM_MESSAGES[0] == EMBEDDER_INSTRUCTION
    turns = dialogues(1000, 6)
    with_one = [t for t in turns if t.system]
    assert 0.4 < len(with_one) / len(turns) < 0.65
    assert not any(t.system for t in dialogues(200, 6, systems=0.0) if t.kind not in ("same", "page"))
    turn = next(t for t in with_one if t.kind == "name" and "text" not in t.question)
    ids = collate([turn], processor)["inputs"]["input_ids"][0]
    prompt = embedder_prompt(Content(images=(4,)), turn.system, "released")
    assert processor.tokenizer.decode(ids).startswith(prompt_text(prompt))


def test_a_judged_document_is_asked_for_as_the_reranker_asks(processor):
    turn = Turn("same", {"text": "a cat"}, "yes", "Find the name.", {"text": "cat"})
    batch = collate([turn], processor)
    prompt = reranker_prompt(Content(texts=("a cat",)), Content(texts=("cat",)), "Find the name.", "released")
    assert processor.tokenizer.decode(batch["inputs"]["input_ids"][0]) == prompt_text(prompt) + "yes<|im_end|>"
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "yes<|im_end|>"


def test_other_words_for_a_scene_or_a_clip_are_answered_by_its_caption():
    turns = [t for t in dialogues(1000, 7, systems=0.0) if t.kind == "in_other_words"]
    names = sorted({words.name(c.key) for c in sprites.concepts()}, key=len)
    for turn in turns[:40]:
        said = [name for name in names if f" {name}" in f" {turn.answer}"]
        assert said and max(said, key=len) in turn.question["text"]


def test_whether_two_things_are_the_same_is_asked_of_pictures_and_of_words_and_answered_rightly():
    asked = [t for t in dialogues(3000, 4) if t.kind == "same"]
    pairs = [t for t in asked if isinstance(t.question.get("image"), list)]
    judged = [t for t in asked if t.document is not None]
    assert len(pairs) > 20 and len(judged) > 80 and 0.35 < sum(t.answer == "yes" for t in asked) / len(asked) < 0.65
    for turn in pairs:
        one, other = (scene.objects[0].key for scene in turn.question["image"])
        assert (one == other) == (turn.answer == "yes")


def test_pairs_to_be_judged_are_of_every_retrieval_task_and_their_answers_follow_the_labels():
    turns = judged(2000, 5)
    assert {t.system for t in turns} == {tasks.TASKS[name].instruction for name in JUDGED}
    assert 0.45 < sum(t.answer == "yes" for t in turns) / len(turns) < 0.55
    for name in ("text_to_image", "same_thing"):
        q = tasks.build(name, "train", 200, 5)
        mine = [t for t in turns if t.system == q.instruction]
        truth = {(repr(q.queries[i]), repr(q.corpus[d])) for i, r in enumerate(q.relevance) for d in r.positives}
        assert all(((repr(t.question), repr(t.document)) in truth) == (t.answer == "yes") for t in mine)
    confusing = judged(400, 5, names=["text_to_image"], hard=1.0)
    alike = [t for t in confusing if t.answer == "no" and same_subgroup(t)]
    assert len(alike) > 20 > len([t for t in judged(400, 5, names=["text_to_image"], hard=0.0) if same_subgroup(t)])


def same_subgroup(turn: Turn) -> bool:
    """Whether the query names a thing of the subgroup of the pictured one, but not the pictured one."""
    shown = sprites.concept_by_key()[turn.document["image"].objects[0].key]
    near = [c.key for c in sprites.concepts() if c.subgroup == shown.subgroup and c != shown]
    return turn.answer == "no" and any(words.name(key) in turn.question["text"] for key in near)


def test_dialogues_hold_the_share_of_pairs_to_be_judged_that_is_asked_for():
    kinds = Counter(t.kind for t in dialogues(1000, 3, share_judged=0.4))
    assert 0.35 < kinds["judged"] / kinds.total() < 0.45 and "judged" not in {t.kind for t in dialogues(300, 3)}


def test_a_long_answer_weighs_less_than_its_tokens_if_balance_says_so(model, processor):
    batch = collate(TURNS, processor)
    logits, wanted = answer_logits(model, batch)
    rows = torch.arange(len(wanted))[:, None].expand(wanted.shape)[wanted != -100]
    losses = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100], reduction="none")
    means = torch.stack([losses[rows == i].mean() for i in range(len(TURNS))])
    lengths = torch.bincount(rows).float()
    assert len(set(lengths.tolist())) > 1
    for balance in (0.0, 0.5, 1.0):
        weights = lengths ** (1 - balance)
        torch.testing.assert_close(answer_loss(model, batch, balance), (weights * means).sum() / weights.sum())


def test_the_share_of_right_judgements_is_counted_on_both_words(model, processor, monkeypatch):
    yes, no = (processor.tokenizer.encode(word)[0] for word in ("yes", "no"))
    turns = judged(40, 10_000, "validation", hard=0.0)
    share = sum(t.answer == "yes" for t in turns) / len(turns)
    for word, expected in ((yes, share), (no, 1 - share)):  # a model that always says one word
        logits = torch.nn.functional.one_hot(torch.tensor(word), model.lm_head.out_features).float()
        monkeypatch.setattr(model.lm_head, "forward", lambda hidden, x=logits: x.expand(len(hidden), -1))
        assert judges(model, processor, n=40)["judged_right"] == pytest.approx(expected, abs=1e-3)


def test_yes_and_no_are_balanced_and_right():
    turns = dialogues(2000, 1)
    asked = [t for t in turns if t.kind == "yes_no"]
    yes = [t for t in asked if t.answer == "yes"]
    assert 0.4 < len(yes) / len(asked) < 0.6 and {t.answer for t in asked} == {"yes", "no"}
    told = [t for t in turns if t.kind in ("name", "caption", "clip")]
    captions = {t.question.get("image") or t.question.get("video"): t.answer for t in told}
    for turn in asked:
        picture = turn.question.get("image") or turn.question.get("video")
        said = captions[picture] in turn.question["text"]
        assert said or turn.answer == "no"


def test_dialogues_show_training_styles_alone():
    for turn in dialogues(500, 2):
        for scene in as_list(turn.question.get("image"), "image"):
            assert {thing.style for thing in getattr(scene, "objects", ())} <= {*sprites.TRAIN_STYLES}


def test_batches_of_like_length_hold_every_dialogue_once():
    turns = dialogues(1000, 3)
    batches = batches_alike(turns, 32, seed=0)
    flat = [turn for batch in batches for turn in batch]
    assert len(flat) == len(turns) and {id(t) for t in flat} == {id(t) for t in turns}


@pytest.fixture(scope="module")
def bank():
    return SpriteBank(["noto", "twemoji"], [c.key for c in sprites.concepts()])


@pytest.mark.parametrize("name", candidates.THINGS)
def test_candidates_of_single_things_have_one_right_document_and_confusing_ones(bank, name):
    c = candidates.of_things(bank, name, n=12, k=8, confusing=3, seed=1, strength=0.5)
    assert len(c.pairs) == 12 * 8 and c.relevant.shape == (12, 8)
    assert c.relevant.any(1).all() and not c.relevant.all(1).any()
    queries = [query for query, _ in c.pairs]
    assert all(query is queries[i - i % 8] for i, query in enumerate(queries))  # one object, which its documents share
    again = candidates.of_things(bank, name, n=12, k=8, confusing=3, seed=1, strength=0.5)
    assert torch.equal(c.relevant, again.relevant)
    if name not in ("text_to_image", "same_thing"):  # names and captions can be read
        told = [document["text"] for _, document in c.pairs]
        subgroup = {words.name(x.key): x.subgroup for x in sprites.concepts()}
        of = {text: next((subgroup[w] for w in sorted(subgroup, key=len)[::-1] if w in text), None) for text in told}
        near = [
            sum(of[told[8 * i + j]] == of[told[8 * i + int(row.long().argmax())]] for j in range(8) if not row[j])
            for i, row in enumerate(c.relevant)
        ]
        assert sum(near) > 12


def test_candidates_of_a_task_carry_its_labels():
    q = tasks.build("scene_retrieval", "train", 10, 3)
    c = candidates.of_task("scene_retrieval", "train", 10, 6, 2, 3)
    for i, (query, document) in enumerate(c.pairs):
        at = q.queries.index(query)
        labels = q.relevance[at]
        right = repr(document) in {repr(q.corpus[d]) for d in labels.positives}
        assert right == bool(c.relevant[i // 6, i % 6])
    confusing = {repr(q.corpus[d]) for labels in q.relevance for d in labels.negatives}
    assert sum(repr(document) in confusing for _, document in c.pairs) >= 10


def test_no_candidate_shows_a_colour_on_a_thing_that_is_held_out(bank, monkeypatch):
    shown = []
    monkeypatch.setattr(bank, "drawn", lambda things, *rest: shown.extend(things) or list(things))
    for seed in range(20):
        candidates.of_things(bank, "same_thing", 12, 8, 3, seed, 0.5)
    coloured = [thing for thing in shown if thing[1]]
    assert len(coloured) > 50 and all(bucket(key, colour) >= 2 for key, colour in coloured)


def test_a_picture_of_the_bank_shows_the_thing_that_was_asked_for(bank):
    keys = [bank.keys[i] for i in (3, 700, 1200)]
    still = bank.drawn([(key, None) for key in keys], 0.0, torch.Generator().manual_seed(0))
    for key, picture in zip(keys, still, strict=True):
        there = torch.stack([bank.rgba[i, bank.keys.index(key)] for i in range(2)]).float()
        opaque = there[..., 3] > 250  # elsewhere the background shows through
        gap = (torch.from_numpy(picture).float() - there[..., :3]).abs().mean(-1)
        assert min(gap[i][opaque[i]].mean() for i in range(2)) < 2


def test_the_judging_loss_is_that_of_each_pair_and_of_each_query():
    margins = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    relevant = torch.tensor([[True, False, False, False], [True, True, False, False], [False] * 3 + [True]] * 2)[:5]
    total = 0.0
    for row, right in zip(margins, relevant, strict=True):
        yes = [-math.log(1 / (1 + math.exp(-m))) for m, r in zip(row.tolist(), right, strict=True) if r]
        no = [-math.log(1 / (1 + math.exp(m))) for m, r in zip(row.tolist(), right, strict=True) if not r]
        whole = sum(map(math.exp, row.tolist()))
        share = sum(math.exp(m) / whole for m, r in zip(row.tolist(), right, strict=True) if r)
        total += (sum(yes) / len(yes) + sum(no) / len(no)) / 2 - math.log(share)
    assert judging_loss(margins, relevant).item() == pytest.approx(total / 5)
    assert torch.autograd.gradcheck(lambda m: judging_loss(m, relevant), margins)


FIRST = Round(
    VisionConfig(steps=2, batch=8),
    LanguageConfig(short_steps=1, short_batch=4, short_round=2, steps=2, batch=4, round=2),
)
JUDGE = Round(judge=JudgeConfig(steps=2, queries=3, documents=4, confusing=1, tokens=100, rehearsed=2))
SECOND = replace(FIRST, vision=VisionConfig(steps=1, batch=8, heads=1))  # its tower stands still


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of three short rounds; what is measured after a step is measured on few dialogues."""
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        look = pretrain_language.picture_matters
        for module in (pretrain_module, pretrain_language, pretrain_judge):
            patch.setattr(module, "picture_matters", lambda model, processor, n=0: look(model, processor, n=24))
        for module in (pretrain_language, pretrain_judge):
            patch.setattr(module, "judges", partial(pretrain_language.judges, n=16))
        patch.setattr(pretrain_judge, "first_of", partial(first_of, n=2, k=3))
        assert pretrain(folder, [FIRST, SECOND, JUDGE], log_every=1) == folder / "3" / "q3vl-tiny"
        yield folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU has no instructions for bfloat16")
def test_pretraining_writes_a_checkpoint_that_transformers_loads(pretrained):
    out = pretrained / "2" / "q3vl-tiny"
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert (out / "model.safetensors").stat().st_size <= 25_000_000
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.tokenize("yes") == ["yes"] and processor.tokenizer.tokenize("no") == ["no"]
    assert "local_files_only" not in (out / "tokenizer_config.json").read_text()  # how it was loaded is no setting


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU has no instructions for bfloat16")
def test_a_second_round_goes_on_from_the_checkpoint_of_the_first(pretrained):
    before, after = (load_file(pretrained / k / "q3vl-tiny" / "model.safetensors") for k in "12")
    unchanged = {name for name, x in before.items() if x.equal(after[name])}
    assert all((name in unchanged) == ("visual" in name) for name in before if name.endswith("proj.weight"))
    settings = json.loads((pretrained / "2" / "q3vl-tiny" / "pretraining.json").read_text())
    assert settings["start"]["vision"]["steps"] == 2 and settings["vision"]["steps"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU has no instructions for bfloat16")
def test_a_round_that_teaches_to_judge_trains_the_language_model_alone(pretrained):
    before, after = (load_file(pretrained / k / "q3vl-tiny" / "model.safetensors") for k in "23")
    changed = {name for name, x in before.items() if not x.equal(after[name])}
    assert changed and not any("visual" in name for name in changed)
    assert any("q_proj" in name for name in changed) and any("mlp" in name for name in changed)
    settings = json.loads((pretrained / "3" / "q3vl-tiny" / "pretraining.json").read_text())
    assert set(settings) == {"judge", "own_picture", "other_picture", "start"} and settings["judge"]["steps"] == 2
    row = json.loads((pretrained / "3" / "judge.jsonl").read_text().splitlines()[-1])
    assert {"loss", "judged_right", "first_of_3", "by_task"} <= set(row)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU has no instructions for bfloat16")
def test_an_interrupted_round_goes_on_may_get_more_steps_and_no_other_setting(pretrained, tmp_path):
    shutil.copytree(pretrained / "1", tmp_path / "1")
    with open(tmp_path / "1" / "language.jsonl", "a") as log:  # as a run that was cut short after its last checkpoint
        log.write('{"step": 3, "seconds": 1.0, "loss": 1.0}\n')
    longer = replace(FIRST, language=replace(FIRST.language, steps=3))
    pretrain(tmp_path, [longer], log_every=1)
    steps = [line.split(",")[0] for line in (tmp_path / "1" / "language.jsonl").read_text().splitlines()]
    assert steps == ['{"step": 1', '{"step": 2', '{"step": 3']
    with pytest.raises(ValueError, match=r"holds a pre-training with another language\.batch"):
        pretrain(tmp_path, [replace(FIRST, language=replace(FIRST.language, batch=5))], log_every=1)


def judge_a_few(checkpoint, folder):
    loaded = load(checkpoint, dtype=torch.float32)
    config = replace(JUDGE.judge, steps=3, warmup=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("picture_matters", "judges", "first_of"):  # what is measured says nothing here
            patch.setattr(pretrain_judge, name, lambda *anything, **more: {})
        for module in (machine, muon, pretrain_judge):  # in bfloat16 two halves of a step are rounded otherwise
            patch.setattr(module, "fast_cpu_dtype", lambda: torch.float32)
        pretrain_judge.pretrain_judge(loaded.model.requires_grad_(True), loaded.processor, folder, config, log_every=1)
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def judge_worker(rank, checkpoint, folder):
    PartialState(cpu=True)
    torch.save(judge_a_few(checkpoint, Path(folder) / "two"), f"{folder}/weights{rank}.pt")


@pytest.mark.slow
def test_two_processes_learn_to_judge_like_one(small_checkpoint, tmp_path):
    run_in_two_processes(judge_worker, str(small_checkpoint), str(tmp_path))
    one, start = judge_a_few(small_checkpoint, tmp_path / "one"), load(small_checkpoint, dtype=torch.float32).model
    two, other = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    for name, p in start.named_parameters():
        assert torch.equal(two[name], other[name])
        moved = (one[name] - p).norm()
        assert (two[name] - one[name]).norm() <= 0.02 * moved, name
    assert any(not torch.equal(one[name], p) for name, p in start.named_parameters())
