"""The path from a table to a verdict, on a small random checkpoint and a made-up benchmark."""

import inspect
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from q3vl_mini import backbone, cli, evaluate, verdict
from q3vl_mini import finetune as path
from q3vl_mini.config import MiningConfig
from q3vl_mini.demo.models import Models
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world import tasks
from q3vl_mini.export import export
from q3vl_mini.finetune import Budget, Finetuned, Job, finetune, finetune_preset
from q3vl_mini.media import MediaBudget
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import Run
from q3vl_mini.survey import survey

CHANGES = ("dims=[0, 32]", "dim_weights=[1.0, 0.5]", "lora_rank=4", "lora_alpha=8", "merge.steps=3", "merge.probe=8")
CHANGES += ("autocast=''",)
CHANGES += tuple(f"stages.{name}.batch_size=8" for name in ("embedder", "reranker", "distilled"))
WORDS = "red cat green apple blue dog white horse small tree old house new car tall ship".split()


def texts(n, name, task="text_ret"):
    queries = [{"text": f"{WORDS[i % 16]} {name} {i}"} for i in range(n)]
    corpus = [{"text": f"{WORDS[(i + 3) % 16]} {i}"} for i in range(n)]
    return Quadruple(name, task, "Find it.", queries, corpus, [Relevance((i,), ((i + 1) % n,)) for i in range(n)])


@pytest.fixture
def benchmark(monkeypatch):
    """MMEB-mini as two small tasks of texts."""
    made = {s: [texts(12, f"{s} a"), texts(12, f"{s} b", "image_cls")] for s in ("test", "validation")}
    monkeypatch.setattr(tasks, "benchmark", lambda split, n, seed: made[split])
    return made


@pytest.fixture
def table(tmp_path):
    """60 rows: words and a number, and a picture of one colour or a text."""
    rows = []
    for i in range(60):
        positive = f"{WORDS[i % 16]} {WORDS[i // 16]}, number {i}"
        if i % 3 == 0:
            positive = f"{i}.png"
            noise = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / positive)
        rows.append({"query": f"{WORDS[i % 16]} {i}", "positive": positive, "negatives": [f"no {i}"]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def random_adapter(checkpoint, folder, seed):
    """An adapter of `checkpoint` that changes its vectors."""
    loaded = backbone.load(checkpoint)
    torch.manual_seed(seed)
    model = backbone.add_lora(loaded.model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    backbone.save(folder, model, loaded.processor, {"role": "embedder", "template": "report"})
    return folder


def full_weights(path):
    """The weights of a checkpoint's backbone with its adapter added, by name, as peft adds them."""
    model = backbone.load(path).model
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: x for name, x in model.state_dict().items() if "language_model" in name}


@pytest.mark.slow
def test_from_a_table_to_a_verdict(small_checkpoint, benchmark, table, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"budget": "4steps", "looks": 2, "changes": CHANGES, "distil": True}  # the rows bring negatives
    made = finetune(table, small_checkpoint, out, qat=True, **options)

    names = {file.name for file in out.iterdir()}
    assert {"survey.md", "survey.json", "survey.png", "mined.json", "verdict.json", "verdict.md"} <= names
    verdict = json.loads((out / "verdict.json").read_text())
    assert set(verdict["own"]["models"]) == set(verdict["general"]["models"]) == {"base", "merged", "fine-tuned"}
    assert made.verdict["ship"] == verdict["ship"] and set(verdict["own"]["differences"]) == {"merged", "fine-tuned"}
    assert verdict["general"]["models"]["base"]["datasets"].keys() == {q.name for q in benchmark["test"]}
    assert set(verdict["reranker"]["scores"]) == {"the embedder alone", "base", "trained"}
    assert "# Verdict" in capsys.readouterr().out
    for name in ("embedder", "reranker", "distilled"):
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert [check["step"] for check in metrics["checks"]] == [0, 2, 4] and metrics["plan"]["steps"] == 4
        assert not (out / name / "state").exists() and (out / name / "curve.png").is_file()
    assert Embedder(out / "embedder/model").quantizers.of(64, "int8").initialised
    card = Reranker(out / "reranker/model").card
    assert card["stage"] == "reranker" and verdict["reranker"]["base"] == str(small_checkpoint.resolve())
    assert Embedder(out / "merged/model").card["verdict"]["recommended"] == (verdict["ship"] == "merged")

    # it goes out again: exported with its verdict; its folder fills an index, and is a model of the demo
    page = (export(out / "merged/model", tmp_path / "exported") / "README.md").read_text()
    assert f"**{verdict['own']['differences']['merged']['word']}**" in page and "nothing but Emoji World" not in page
    photos, merged = tmp_path / "photos", str(out / "merged/model")
    photos.mkdir()
    for i in (0, 3, 6):
        shutil.copy(tmp_path / f"{i}.png", photos)
    assert cli.main(["index", "create", str(tmp_path / "index"), str(photos), "--model", merged, "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["search", str(tmp_path / "index"), "red cat", "--quiet", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    with Models([merged], None).embedder(merged) as embedder:
        assert embedder.card["verdict"] == Embedder(merged).card["verdict"]

    # the base's scores are those that a plain evaluation of the base gives
    test = survey(table, progress=False).splits["test"]
    budget = MediaBudget(image_max_tokens=1280, fps=2.0)
    plain = evaluate.evaluate_embedder(Embedder(small_checkpoint, budget=budget, max_length=2048), [test])
    assert verdict["own"]["models"]["base"][test.task]["score"] == pytest.approx(plain[test.task].score)

    # again: nothing is mined or trained a second time
    weights = [out / name / "model" / "adapter_model.safetensors" for name in ("embedder", "merged")]
    kept = [out / "mined.json", *weights]
    times = [file.stat().st_mtime_ns for file in kept]
    again = finetune(table, small_checkpoint, out, qat=True, progress=False, **options)
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert again.verdict["own"] == made.verdict["own"]
    less = [row for row in map(json.loads, table.read_text().splitlines()) if "number" in row["positive"]]
    options["budget"] = "5steps"
    with pytest.raises(ValueError, match="a run with another budget, data, instruction, forget; give another folder"):
        asked = {"instruction": "Find another.", "forget": 0.5}
        finetune(less, small_checkpoint, out, qat=True, progress=False, **asked, **options)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["full", "adapter"])
def test_the_merged_model_is_base_plus_lambda_times_the_change(start, small_checkpoint, benchmark, table, tmp_path):
    base = small_checkpoint if start == "full" else random_adapter(small_checkpoint, tmp_path / "base", 1)
    changes = (*CHANGES, "merge.lr=0.2", "merge.mu=1000.0")  # so that lambda does not stay where it starts
    options = {"budget": "3steps", "looks": 1, "changes": changes, "reranker": None}
    finetune(table, base, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out/reranker").exists()
    lam = json.loads((tmp_path / "out/merged/metrics.json").read_text())["lambda"]
    w0, w1, merged = (full_weights(x) for x in (base, tmp_path / "out/embedder/model", tmp_path / "out/merged/model"))
    assert 0 <= lam <= 1 and lam != 1
    moved = 0.0
    for name, x in merged.items():
        torch.testing.assert_close(x, w0[name] + lam * (w1[name] - w0[name]), atol=2e-5, rtol=1e-4)
        moved = max(moved, (w1[name] - w0[name]).abs().max().item())
    assert moved > 1e-3  # training did something


def job(run, quadruple, **options):
    usual = {"budget": Budget(steps=12), "epochs": 2, "looks": 6, "patience": 2, "trainings": 1}
    return Job(run, quadruple, quadruple, **(usual | {"started": 0.0, "measuring": 0.0, "forget": 0.05} | options))


@pytest.fixture
def run(small_checkpoint, tmp_path):
    return Run(finetune_preset(small_checkpoint, changes=CHANGES), tmp_path / "run", progress=False, tracker="none")


def test_training_stops_without_gain_and_keeps_the_best_look(run):
    scores = iter([0.1, 0.2, 0.5, 0.4, 0.45, 0.9])
    seen = []

    def score(model):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return next(scores)

    quadruple, config = texts(24, "own"), run.preset.stages["embedder"]
    model = run.model("raw", trainable=True)
    options, _ = run.objective(model)
    path._train(
        job(run, quadruple), "embedder", model,
        lambda encode, batch: path.embedding_loss(encode, batch, config, **options), quadruple, score,
    )  # fmt: skip
    metrics = json.loads((run.folder / "embedder/metrics.json").read_text())
    assert [check["step"] for check in metrics["checks"]] == [0, 2, 4, 6, 8]  # 0.5 at 4, then twice no gain
    assert metrics["best"] == {"step": 4, "score": 0.5}
    kept = {n: p for n, p in run.model("embedder", trainable=True).model.named_parameters() if p.requires_grad}
    prefix = "model."
    for name, x in seen[2].items():
        torch.testing.assert_close(kept[name.removeprefix(prefix)], x)
    assert any(not torch.equal(seen[2][name], seen[4][name]) for name in seen[2])


@pytest.mark.slow
def test_a_training_that_is_cut_short_goes_on_to_the_same_weights(run, tmp_path):
    quadruple = texts(24, "own")

    def trained(run, looks, dies_at=None):
        model = run.model("raw", trainable=True)
        options, _ = run.objective(model)

        def score(model):
            looks.append(1)
            if len(looks) == dies_at:
                raise KeyboardInterrupt
            return len(looks) / 100

        def loss(encode, batch):
            return path.embedding_loss(encode, batch, run.preset.stages["embedder"], **options)

        path._train(job(run, quadruple, looks=3), "embedder", model, loss, quadruple, score)

    looks = []
    with pytest.raises(KeyboardInterrupt):
        trained(run, looks, dies_at=3)  # at step 8, after the look at step 4
    trained(run, looks)
    whole = Run(run.preset, tmp_path / "whole", progress=False, tracker="none")
    trained(whole, [])
    one, other = (full_weights(r.folder / "embedder/model") for r in (run, whole))
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("10m", Budget(600)), ("1.5h", Budget(5400)), ("90 s", Budget(90)), ("9steps", Budget(steps=9)), (None, Budget())],
)
def test_budgets_are_times_or_steps(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["10", "ten minutes", "0m", "-3s", "5 steps more"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match="write a time"):
        Budget.parse(text)


def test_steps_are_what_the_epochs_take_or_what_fits(run, monkeypatch):
    config, quadruple = replace(run.preset.stages["embedder"], batch_size=8), texts(20, "own")
    monkeypatch.setattr(path.time, "monotonic", lambda: 100.0)

    def steps(budget, epochs=10, trainings=1):
        at_work = job(run, quadruple, budget=budget, epochs=epochs, trainings=trainings, started=40.0, measuring=15.0)
        plan = path._planned(at_work, config, len(quadruple), looking=1.0, seconds_a_step=lambda: 0.5)
        return plan["steps"], plan["why"]

    assert steps(Budget(steps=7))[0] == 7
    assert steps(Budget()) == (25, "10 epochs of 20 queries")  # 200 / 8
    # 600 s, of which 60 are gone, 7 x 15 measure, 3 x 0.5 position and 6 x 1 look: 427.5 s of 0.5 s each
    assert steps(Budget(600), epochs=10_000) == (855, "what fits into the budget")
    # with a reranker 2 x 15 more measure; half of 403.5 s is for each, less the looks
    assert steps(Budget(600), epochs=10_000, trainings=2)[0] == 391
    assert steps(Budget(600))[0] == 25
    steps_left, why = steps(Budget(70))
    assert steps_left == path.LEAST and "used up" in why


def test_a_step_is_measured_without_moving_the_model(run, monkeypatch):
    quadruple = texts(24, "own")
    model = run.model("raw", trainable=True)
    options, _ = run.objective(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    after = {}
    planned = path._planned

    def spy(job, config, queries, looking, seconds_a_step):
        assert seconds_a_step() > 0
        after.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return planned(job, config, queries, looking, lambda: 1.0)

    monkeypatch.setattr(path, "_planned", spy)
    path._train(
        job(run, quadruple, budget=Budget(steps=1)), "embedder", model,
        lambda encode, batch: path.embedding_loss(encode, batch, run.preset.stages["embedder"], **options),
        quadruple, lambda model: 0.0,
    )  # fmt: skip
    for name, x in before.items():
        torch.testing.assert_close(after[name], x)


def mine_with(run, k):
    """(the base, 30 pairs, what mining with this K makes of them)."""
    base, train = run.model("raw"), texts(30, "own")
    train = replace(train, relevance=[Relevance((i,)) for i in range(30)])
    stages = dict(run.preset.stages)
    stages["embedder"] = replace(stages["embedder"], mining=MiningConfig("raw", k=k, t_plus=-1.0, n_negatives=2))
    run.preset = replace(run.preset, stages=stages)
    return base, train, path.mine(run, base, train)


def test_mining_shows_what_it_dropped(run):
    base, train, mined = mine_with(run, k=5)
    labels = json.loads((run.folder / "mined.json").read_text())
    vectors = [base.encode(items, instruction=i) for items, i in ((train.queries, "Find it."), (train.corpus, None))]
    best = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)[:, :5]
    lost = [i for i in range(30) if i not in best[i]]
    assert [entry["query"] for entry in labels["dropped"]] == lost and 0 < len(lost) < 30
    assert labels["dropped"][0]["shows"] == str(train.queries[lost[0]])
    assert len(mined) == 30 - len(lost) and all(0 < len(r.negatives) <= 2 for r in mined.relevance)


def test_without_a_k_of_its_own_mining_drops_no_query_of_a_corpus_that_fits(run):
    _, train, mined = mine_with(run, k=0)
    assert len(mined) == len(train) and json.loads((run.folder / "mined.json").read_text())["dropped"] == []


@pytest.mark.parametrize(
    ("scores", "found", "looks"),
    [
        ({0.0: 0.5, 0.8: 0.49}, 0.8, 2),  # 2 % lost
        ({0.0: 0.5, 0.8: 0.48, 0.6: 0.485, 0.4: 0.49}, 0.4, 4),  # 4, 3 and 2 %
        ({0.0: 0.5, 0.8: 0.1, 0.6: 0.2, 0.4: 0.3, 0.2: 0.4}, 0.2, 5),  # the verdict will say so
    ],
)
def test_lambda_is_lowered_until_half_of_what_may_be_forgotten_is_left(scores, found, looks):
    lam, seen = path.within_limit(lambda lam: scores[round(lam, 6)], 0.8, forget=0.05)
    assert lam == pytest.approx(found) and len(seen) == looks
    assert [look["score"] for look in seen] == list(scores.values())


def test_what_cannot_work_is_refused_at_once(small_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="distil needs a teacher"):
        finetune([], small_checkpoint, tmp_path, distil=True, reranker=None)
    with pytest.raises(ValueError, match="distil needs a teacher, and no rows bring negatives"):
        rows = [{"query": f"words {i}", "positive": f"text {i}"} for i in range(20)]
        finetune(rows, small_checkpoint, tmp_path, distil=True, progress=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nobody'"):
        finetune(rows, small_checkpoint, tmp_path / "other", reranker="nobody", progress=False)
    with pytest.raises(ValueError, match="no 'stages.embedder.rate'"):
        finetune([], small_checkpoint, tmp_path, changes=["stages.embedder.rate=1"])


def ranked(values):
    """The results of one data set, with this score for each query."""
    made = evaluate.DatasetResult("test", "text_ret", "hit@1", np.array(values, dtype=float), 10, 0.1)
    return {"text_ret": evaluate.ColumnResult("text_ret", (made,))}


@pytest.mark.parametrize(
    ("alone", "base", "trained", "ship"),
    [
        ([0.0] * 40, [0.0] * 40, [1.0] * 40, "run/reranker/model"),
        ([0.0] * 40, [1.0] * 40, [1.0] * 40, "the base's"),
        ([1.0] * 40, [0.0] * 40, [1.0] * 40, None),
        ([1.0] * 20 + [0.0] * 20, [0.0] * 40, [0.0, 1.0] * 20, None),  # undecided
    ],
)
def test_a_reranker_is_recommended_where_it_is_better_than_the_embedder_alone(
    alone, base, trained, ship, run, monkeypatch, tmp_path
):
    results = {"loaded": ranked(base), "own": ranked(trained)}
    monkeypatch.setattr(run, "load", lambda path, kind: "loaded")
    monkeypatch.setattr(run, "model", lambda name, kind: "own")
    monkeypatch.setattr(evaluate, "evaluate_reranker", lambda model, *_, **options: results[model])
    found = path.judge_reranker(run, "the base's", None, ranked(alone), texts(40, "test"))
    assert found["ship"] == (ship and ship.replace("run/", f"{tmp_path}/run/"))
    told = "\n".join(verdict._of_reranker(found))
    assert f"{100 * np.mean(trained):.1f} and {100 * np.mean(alone):.1f}" in told
    assert (f"Use {found['ship']}." in told) == (ship is not None) != ("Rank by the embedder alone." in told)


def test_the_reranker_that_goes_with_a_base(small_checkpoint, tmp_path):
    def beside(path, name=None):
        base = Embedder(path)
        if name:
            backbone.inner(base.model).name_or_path = name
        return path_of_reranker(base)

    path_of_reranker = path.reranker_beside
    adapter = random_adapter(small_checkpoint, tmp_path / "adapter", 1)
    assert beside(small_checkpoint) == beside(adapter) == str(small_checkpoint.resolve())
    assert beside(adapter, "q3vl-tiny") == "reranker"  # shipped
    released = tmp_path / "Qwen3-VL-Embedding-2B", tmp_path / "Qwen3-VL-Reranker-2B"
    assert beside(adapter, str(released[0])) is None  # not there
    shutil.copytree(small_checkpoint, released[1])
    assert beside(adapter, str(released[0])) == str(released[1])
    assert beside(adapter, "Qwen/Qwen3-VL-8B-Instruct") == "Qwen/Qwen3-VL-8B-Instruct"
    whole = export(adapter, tmp_path / "whole", merged=True)  # an embedder's weights, and no adapter
    assert beside(whole) is None


def test_the_ten_lines_of_the_page_make_a_search(small_checkpoint, table, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "docs" / "your-data.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    (tmp_path / "photos").mkdir()
    for picture in tmp_path.glob("*.png"):
        shutil.copy(picture, tmp_path / "photos")
    asked, launched = [], []

    def trained(data, **options):
        asked.append((data, inspect.signature(finetune).bind(data, **options)))
        return Finetuned(tmp_path, {}, str(small_checkpoint), {})

    class Interface:
        def __init__(self, function, *parts):
            self.function = function

        def launch(self):
            launched.append(self.function)

    monkeypatch.setattr(path, "finetune", trained)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Interface=Interface, Gallery=list))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "your-data.md", "exec"), {"__name__": "page"})
    assert asked[0][0] == "pairs.csv"
    found = launched[0]("a red cat")
    embedder = Embedder(small_checkpoint)
    task = "Find the picture that fits the words."
    scores = {
        name: float(embedder.encode(["a red cat"], instruction=task)[0] @ embedder.encode([{"image": name}])[0])
        for name, _ in found
    }
    assert len(found) == 12 and list(scores) == sorted(scores, key=scores.get, reverse=True)
    assert all(abs(float(told) - scores[name]) < 0.01 for name, told in found)
