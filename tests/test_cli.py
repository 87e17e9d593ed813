"""The commands as a person or a program calls them: what they print, write and return."""

import argparse
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from two_processes import run_in_two_processes

from q3vl_mini import backbone, commands, merge, stores
from q3vl_mini.choices import STAGES
from q3vl_mini.cli import OWN_ARGUMENTS, main, parser
from q3vl_mini.combine import vector_of
from q3vl_mini.config import load_preset, override
from q3vl_mini.data import load_quadruple
from q3vl_mini.doctor import Check, _presets, doctor_table
from q3vl_mini.embedder import Embedder
from q3vl_mini.index import Index
from q3vl_mini.items import Skipped, embed_items, embed_to_folder, load_vectors, read_items
from q3vl_mini.reranker import Reranker
from q3vl_mini.stages import RECIPES
from q3vl_mini.stores import LanceStore, open_store


def called(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    status = main(list(arguments))
    return status, *capsys.readouterr()


def result_of(capsys, *arguments: str):
    """What a command that succeeds prints as JSON."""
    status, out, err = called(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


# --- values of a preset -------------------------------------------------------------------------------------


def test_a_value_of_a_preset_is_changed_by_its_path():
    tiny = load_preset("tiny")
    changed = override(tiny, ["stages.s1.steps=7", "dims=[0, 64]", "dim_weights=[1.0, 1.0]", "template=report"])
    assert changed.stages["s1"].steps == 7 and changed.stages["s0"] == tiny.stages["s0"]
    assert (changed.dims, changed.template) == ((0, 64), "report")


@pytest.mark.parametrize("change", ["stages.s9.steps=1", "stages.s0.step=1", "steps", "stages.s0.steps=many"])
def test_a_change_that_does_not_fit_is_named(change):
    with pytest.raises(ValueError, match=change.split("=")[0]):
        override(load_preset("tiny"), [change])


# --- items --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, picture):
    """A folder with two pictures, a text and a file that only looks like a picture."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    picture("red").save(folder / "a.png")
    picture("blue").save(folder / "more" / "b.png")
    (folder / "c.txt").write_text("a yellow bird")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def picture():
    return lambda colour: Image.new("RGB", (64, 64), colour)


def test_a_folder_is_its_files_and_their_paths_are_the_ids(photos):
    items = {item.id: item.instance for item in read_items(photos)}
    assert set(items) == {"a.png", "broken.jpg", "c.txt", "more/b.png"}
    assert items["c.txt"] == {"text": "a yellow bird"} and set(items["more/b.png"]) == {"image"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_every_kind_give_the_same_items(kind, tmp_path):
    table = pd.DataFrame({"id": ["x", "y"], "text": ["a cat", "a dog"], "image": ["x.png", None], "price": [1, 2]})
    path = tmp_path / f"items.{kind}"
    {
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "csv": lambda: table.to_csv(path, index=False),
        "parquet": lambda: table.to_parquet(path),
    }[kind]()
    one, two = read_items(path)
    assert one.instance == {"text": "a cat", "image": str(tmp_path / "x.png")} and two.instance == {"text": "a dog"}
    assert (one.id, two.id) == ("x", "y") and int(two.metadata["price"]) == 2


def test_a_row_that_cannot_be_an_item_is_named_and_the_next_is_read(tmp_path):
    (tmp_path / "more").mkdir()
    rows = [
        '{"id": "a", "text": "a"}',
        '{"text": ',
        '{"id": "a", "text": "b"}',
        '{"image": "../secret.png"}',
        '{"image": "/etc/secret.png"}',
        '{"image": "../../m.pdf#page=1"}',
        '{"id": "\\ud83d", "text": "b"}',
        '{"text": "b", "price": [NaN]}',
        '{"text": "b", "price": NaN, "n": 1}',
    ]
    (tmp_path / "more" / "items.jsonl").write_text("\n".join(rows), encoding="utf-8")
    first, *bad, last = read_items(tmp_path / "more" / "items.jsonl")
    assert (first.id, last.metadata) == ("a", {"text": "b", "n": 1})
    reasons = ["items.jsonl, line 2: not JSON", "row 2 has the id of an earlier row", *3 * ["leads outside of"]]
    reasons += 2 * ["cannot be written as JSON in UTF-8"]
    for skipped, reason in zip(bad, reasons, strict=True):
        assert isinstance(skipped, Skipped) and reason in skipped.reason
    wider = list(read_items(tmp_path / "more" / "items.jsonl", root=tmp_path))
    assert wider[3].instance == {"image": str(tmp_path / "more" / "../secret.png")}
    assert isinstance(wider[4], Skipped)


def test_a_job_that_could_embed_nothing_says_so(tmp_path, small_checkpoint, capsys):
    (tmp_path / "items.jsonl").write_text('{"title": "no column that is read"}\n')
    model = ["--model", str(small_checkpoint), "--quiet"]
    for command in (["embed", str(tmp_path / "items.jsonl"), "--out", str(tmp_path / "v")],
                    ["index", "create", str(tmp_path / "i"), str(tmp_path / "items.jsonl")]):  # fmt: skip
        status, _, error = called(capsys, *command, *model)
        assert status == 1 and "has nothing that can be embedded" in error and "no text, image or video" in error


def test_a_bad_item_is_skipped_with_its_reason_and_the_others_have_their_vectors(photos, small_checkpoint):
    embedder = Embedder(small_checkpoint)
    kept, vectors, skipped = embed_items(embedder, list(read_items(photos)))
    assert [item.id for item in kept] == ["a.png", "c.txt", "more/b.png"]
    assert [bad.id for bad in skipped] == ["broken.jpg"] and "broken.jpg" in skipped[0].reason
    alone = embedder.encode([item.instance for item in kept], batch_size=1)
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_embed_writes_shards_and_goes_on_after_an_interruption(photos, small_checkpoint, tmp_path, capsys):
    out = tmp_path / "vectors"
    command = ["embed", str(photos), "--model", str(small_checkpoint), "--out", str(out), "--quiet"]
    command += ["--shard-size", "2"]
    assert [bad["id"] for bad in result_of(capsys, *command)["skipped"]] == ["broken.jpg"]
    ids, vectors, metadata, card = load_vectors(out)
    assert ids == ["a.png", "c.txt", "more/b.png"] and card["identity"]["dim"] == vectors.shape[1]
    kept = (out / "00000.npy").stat().st_mtime_ns
    (out / "00001.npy").unlink()
    assert called(capsys, *command)[0] == 0
    assert (out / "00000.npy").stat().st_mtime_ns == kept  # only the missing shard was made
    np.testing.assert_array_equal(load_vectors(out)[1], vectors)

    status, _, error = called(capsys, *command, "--dim", "32")
    assert status == 1 and "another identity" in error


def test_too_many_bad_items_stop_the_job(tmp_path, small_checkpoint, capsys):
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png"}) for i in range(4)))
    command = ["embed", str(tmp_path / "items.jsonl"), "--model", str(small_checkpoint), "--out", str(tmp_path / "v")]
    status, _, error = called(capsys, *command, "--limit", "2", "--quiet")
    assert status == 1 and "4 items cannot be embedded, more than 2" in error and "0.png" in error


@pytest.mark.parametrize("store", ["faiss", "lance"])
def test_an_index_is_made_searched_and_changed(store, photos, small_checkpoint, tmp_path, capsys):
    folder, model = str(tmp_path / "photos.index"), str(small_checkpoint)
    made = result_of(
        capsys, "index", "create", folder, str(photos), "--model", model, "--dim", "32", "--store", store, "--quiet"
    )
    assert made["items"] == 3 and [bad["id"] for bad in made["skipped"]] == ["broken.jpg"]

    hits = result_of(capsys, "search", folder, "a bird", "-k", "2")  # the index knows its model
    embedder = Embedder(small_checkpoint)
    items = [item for item in read_items(photos) if item.id != "broken.jpg"]
    cosines = embedder.encode([item.instance for item in items], dim=32) @ embedder.encode(["a bird"], dim=32)[0]
    assert [hit["id"] for hit in hits] == [items[i].id for i in np.argsort(-cosines)[:2]]
    assert [hit["score"] for hit in hits] == pytest.approx(np.sort(-cosines)[:2] * -1, abs=1e-5)

    ranked = result_of(capsys, "search", folder, "a bird", "--reranker", model)
    judged = Reranker(small_checkpoint).score("a bird", [item.instance for item in items])
    expected = {item.id: pytest.approx(float(score), abs=1e-5) for item, score in zip(items, judged, strict=True)}
    assert {hit["id"]: hit["relevance"] for hit in ranked} == expected
    assert ranked[0]["relevance"] == max(hit["relevance"] for hit in ranked)

    assert result_of(capsys, "index", "delete", folder, "a.png", "nothing")["deleted"] == 1
    assert result_of(capsys, "index", "info", folder)["items"] == 2
    result_of(capsys, "index", "add", folder, str(photos), "--quiet")
    assert result_of(capsys, "index", "info", folder)["items"] == 3


def test_an_index_is_a_lancedb_store_where_that_is_installed(photos, small_checkpoint, tmp_path, capsys, monkeypatch):
    def made(name):
        result_of(capsys, "index", "create", str(tmp_path / name), str(photos), "--model", str(small_checkpoint))
        return type(open_store(tmp_path / name))

    assert made("with") is LanceStore
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    assert made("without") is Index


def test_a_search_with_another_model_is_refused(photos, small_checkpoint, tmp_path, capsys):
    folder = str(tmp_path / "photos.index")
    result_of(capsys, "index", "create", folder, str(photos), "--model", str(small_checkpoint), "--quiet")
    status, _, error = called(capsys, "search", folder, "a bird", "--model", "q3vl-tiny")
    assert status == 1 and "different models" in error
    status, _, error = called(capsys, "search", str(tmp_path / "nothing"), "a bird")
    assert status == 1 and "nothing" in error


# --- commands -----------------------------------------------------------------------------------------------


def test_rerank_orders_a_folder_as_the_reranker_scores_it(photos, small_checkpoint, capsys):
    (photos / "broken.jpg").unlink()
    rows = result_of(capsys, "rerank", str(photos), "a bird", "--model", str(small_checkpoint))
    items = list(read_items(photos))
    scores = Reranker(small_checkpoint).score({"text": "a bird"}, [item.instance for item in items])
    expected = {item.id: pytest.approx(float(score), abs=1e-5) for item, score in zip(items, scores, strict=True)}
    assert {row["id"]: row["score"] for row in rows} == expected
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_mine_writes_a_quadruple_of_refined_positives_and_its_report(small_checkpoint, tmp_path, capsys):
    out = tmp_path / "mined"
    command = ["mine", "keyword_search", "--model", str(small_checkpoint), "--out", str(out), "--rows", "12"]
    report = result_of(capsys, *command, "--k", "2000", "--t-plus", "-1", "--n-negatives", "2", "--quiet")
    mined = load_quadruple(out)
    assert report["queries"] == 12 and len(mined) == report["queries_kept"]
    assert sum(len(r.negatives) for r in mined.relevance) == report["labelled_negatives"] + report["hard_negatives"]
    assert json.loads((out / "mining.json").read_text()) == report


def test_merge_gives_the_slerp_of_the_weight_changes(tmp_path, capsys):
    made = result_of(capsys, "merge", "s1", "s2", "--out", str(tmp_path / "m"), "--weights", "1", "3")
    assert made["rank"] <= 64
    s1, s2, merged = (vector_of(backbone.load(path).model) for path in ("s1", "s2", tmp_path / "m"))
    omega = merge.angle(s1, s2)
    for name, delta in merged.items():
        expected = (np.sin(0.25 * omega) * s1[name] + np.sin(0.75 * omega) * s2[name]) / np.sin(omega)
        np.testing.assert_allclose(delta.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "command, told",
    [
        ("run --preset huge", "choose one of"),
        ("train s2", "no finished stage"),
        ("mine no_such_task --model s0 --out m", "no sub-dataset 'no_such_task'"),
        ("merge s1 nobody --out m", "no checkpoint 'nobody'"),
        ("eval nobody", "no checkpoint 'nobody'"),
        ("embed nothing --model s3 --out v", "neither a folder nor a table"),
        ("index create i empty --model s3", "empty has nothing that can be embedded"),
        ("index create i photos --model s3 --dim 999", "999"),
        ("index info nothing", "no store in nothing"),
        ("search nothing cat", "no store in nothing"),
        ("search nothing", "no query; give a text, --image or --video"),
        ("rerank none.csv x --model reranker", "none.csv"),
        ("rerank empty x --model reranker", "empty has nothing that can be embedded"),
        ("rerank photos x --model s3", "role"),
        ("finetune none.csv --model s3 --folder f", "none.csv"),
        ("demo --models nobody", "no checkpoint 'nobody'"),
        ("export nobody out", "no checkpoint 'nobody'"),
        ("plan --gpus 8xB200", "--gpus 8xB200: give a number, or as 8xH100 one of"),
        ("plan --preset tiny --set stages.s9.steps=1", "stages.s9.steps"),
        ("public-data nli/none", "no public set"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line_that_says_why(command, told, tmp_path, picture, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    picture("red").save(tmp_path / "photos" / "a.png")
    command = command.split()
    try:
        status, out, error = called(capsys, *command)
    except SystemExit as stopped:  # arguments of a command that reads its own
        status, (out, error) = stopped.code, capsys.readouterr()
    [said] = [line for line in error.splitlines() if "q3vl" in line and ": " in line][-1:]
    assert status in (1, 2) and out == "" and told in said and "Traceback" not in error
    assert not said.startswith("q3vl-mini") or said.startswith(f"q3vl-mini {command[0]}: ")
    assert {file.name for file in tmp_path.iterdir()} <= {"empty", "photos", "runs", "v", "f"}


def test_with_json_standard_output_is_the_result_alone(tmp_path, monkeypatch, capsys):
    def run(preset, folder, **options):
        print("a table for a person")

    monkeypatch.setattr("q3vl_mini.pipeline.run", run)
    status, out, error = called(capsys, "run", "--folder", str(tmp_path / "x"), "--json")
    assert status == 0 and json.loads(out)["folder"] == str(tmp_path / "x") and "a table for a person" in error


def test_gpus_are_a_number_a_kind_or_both(monkeypatch):
    asked = []
    monkeypatch.setattr("q3vl_mini.commands.plan", lambda preset, gpu, n, *rest: asked.append((gpu.name, n)) or [])
    monkeypatch.setattr("q3vl_mini.commands.plan_table", lambda plans: "")
    for gpus in (["--gpus", "4xA100"], ["--gpus", "4", "--gpu", "A100"], ["--gpus", "T4"], []):
        assert main(["plan", *gpus]) == 0
    assert asked == [("A100 80GB", 4), ("A100 80GB", 4), ("T4", 1), ("H100 SXM", 1)]


def test_wrong_arguments_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "s1", "--method", "fisher"])
    assert stopped.value.code == 2


def verbs_of(command: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands below a command, by name."""
    [verbs] = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    return verbs.choices


def test_every_command_has_help_with_an_example(capsys):
    for name in verbs_of(parser()):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0 and "example: " in capsys.readouterr().out, name


def test_every_command_names_what_does_it():
    commands_of = verbs_of(parser())
    leaves = [commands_of[name] for name in commands_of.keys() - OWN_ARGUMENTS.keys() - {"index"}]
    for command in leaves + list(verbs_of(commands_of["index"]).values()):
        assert callable(getattr(commands, command.get_default("function"))), command.prog
    for module, _ in OWN_ARGUMENTS.values():
        assert callable(importlib.import_module(f"q3vl_mini.{module}").main)


def test_the_names_to_choose_among_are_those_that_there_are():
    assert tuple(RECIPES) == STAGES


def test_help_and_wrong_arguments_wait_for_no_torch():
    code = "import sys; from q3vl_mini.cli import parser; parser().format_help(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_doctor_finds_what_a_run_needs(capsys):
    checks = {check["name"]: check for check in result_of(capsys, "doctor")}
    assert checks["model q3vl-tiny"]["state"] == checks["torch"]["state"] == checks["preset tiny"]["state"] == "ok"


@pytest.mark.parametrize("memory, states", [([], ["note", "note"]), ([15], ["ok", "note"]), ([15, 79], ["ok", "ok"])])
def test_doctor_says_which_presets_the_gpus_are_enough_for(memory, states, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(memory))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(memory))
    properties = [SimpleNamespace(total_memory=gb * 2**30) for gb in memory]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: properties[i])
    found = {check.name: check for check in _presets()}
    assert [found[f"preset {name}"].state for name in ("colab", "full")] == states
    assert ("--dry-run real" in found["preset full"].remedy) == (states[1] == "ok")


def test_doctor_says_where_data_is_missing(tmp_path, monkeypatch, capsys):
    from q3vl_mini import doctor as module

    def absent():
        raise FileNotFoundError("data_samples not found (looked at here); run from a checkout")

    monkeypatch.setattr(module, "data_dir", absent)
    status, said, _ = called(capsys, "doctor")
    assert status == 1 and "MISSING  data_samples" in said and "Q3VL_MINI_DATA" in said


def test_the_table_of_checks_shows_the_remedy():
    assert doctor_table([Check("x", "note", "absent", "install x")]) == "note     x  absent (install x)"


def embed_words(rank, table, checkpoint, out):
    assert main(["embed", table, "--model", checkpoint, "--out", out, "--shard-size", "3", "--quiet"]) == 0


def test_two_processes_embed_every_second_shard_and_the_folder_is_that_of_one(small_checkpoint, tmp_path):
    table = tmp_path / "items.jsonl"
    table.write_text("".join(json.dumps({"id": str(i), "text": f"words {i}"}) + "\n" for i in range(11)))
    embed_words(0, str(table), str(small_checkpoint), str(tmp_path / "one"))
    run_in_two_processes(embed_words, str(table), str(small_checkpoint), str(tmp_path / "two"))
    for rank in range(2):
        assert (tmp_path / "two" / f"skipped-{rank}.jsonl").is_file(), "each had its share"
    (one, vectors, *_), (two, others, *_) = (load_vectors(tmp_path / folder) for folder in ("one", "two"))
    assert one == two == [str(i) for i in range(11)] and np.allclose(vectors, others, atol=1e-6)


def test_a_process_embeds_every_nth_shard(small_checkpoint, tmp_path):
    table = tmp_path / "items.jsonl"
    table.write_text("".join(json.dumps({"id": str(i), "text": f"words {i}"}) + "\n" for i in range(11)))
    embedder = Embedder(small_checkpoint)

    def embed(folder, rank, world):
        return embed_to_folder(embedder, table, tmp_path / folder, shard_size=3, rank=rank, world=world, progress=False)

    assert embed("two", 0, 2) == []
    assert sorted(file.name for file in (tmp_path / "two").glob("*.npy")) == ["00000.npy", "00002.npy"]
