"""Mining shared by processes gives what one process mines."""

import json
from pathlib import Path

import numpy as np
import pytest
from two_processes import run_in_two_processes

from q3vl_mini import cli, mining, mining_shares
from q3vl_mini.data import load_quadruple, save_quadruple
from q3vl_mini.embedder import Embedder
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.vectors import join_files

WORDS = "red cat green apple blue dog white horse small tree old house new car tall ship".split()
SETTING = {"k": 8, "t_plus": -1.0, "delta_minus": 0.05, "n_negatives": 3}


def texts(n=23, documents=31):
    queries = [{"text": f"{WORDS[i % 16]} {i}"} for i in range(n)]
    corpus = [{"text": f"{WORDS[(i + 3) % 16]} number {i}"} for i in range(documents)]
    return Quadruple("words", "text_ret", "Find it.", queries, corpus, [Relevance((i,)) for i in range(n)])


def mine(folder, checkpoint):
    mining_shares.BLOCK = 4
    options = [x for name, value in SETTING.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = ["mine", str(folder / "words"), "--model", str(checkpoint), "--out", str(folder / "mined"), "--quiet"]
    assert cli.main([*command, *options]) == 0


def worker(rank, folder, checkpoint):
    mine(Path(folder), checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_mined_quadruple_is_that_of_one_pass_over_all_vectors(processes, small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(mining_shares, "BLOCK", mining_shares.BLOCK)
    quadruple, embedder = texts(), Embedder(small_checkpoint)
    save_quadruple(quadruple, tmp_path / "words")
    if processes == 2:
        run_in_two_processes(worker, str(tmp_path), str(small_checkpoint))
    else:
        mine(tmp_path, small_checkpoint)
    vectors = embedder.encode(quadruple.queries, quadruple.instruction), embedder.encode(quadruple.corpus)
    plain = mining.mine(quadruple, *vectors, **SETTING).to_quadruple()
    made = load_quadruple(tmp_path / "mined", streaming=True)
    assert [r.positives for r in made.relevance] == [r.positives for r in plain.relevance]
    assert [r.negatives for r in made.relevance] == [r.negatives for r in plain.relevance]
    assert json.loads((tmp_path / "mined/mining.json").read_text())["queries_kept"] == len(plain)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mined", "words"]  # the shares are gone


def test_a_job_that_was_cut_short_makes_what_is_missing_alone(small_checkpoint, tmp_path, monkeypatch):
    class State:
        num_processes, process_index, is_main_process = 2, 0, True

        def wait_for_everyone(self):
            if (tmp_path / "corpus-00000.npy").is_file():
                raise KeyboardInterrupt  # while the other is still at its share

    monkeypatch.setattr(mining_shares, "BLOCK", 4)
    asked = []
    quadruple, embedder = texts(), Embedder(small_checkpoint)
    encode = embedder.encode
    monkeypatch.setattr(embedder, "encode", lambda items, *a, **o: asked.append(len(items)) or encode(items, *a, **o))
    options = {"source": {"data": "words"}, **SETTING}
    with pytest.raises(KeyboardInterrupt):
        mining_shares.mine_in_shares(embedder, quadruple, tmp_path, State(), **options)
    assert asked == [4] * 4 + [4] * 3  # every second block of 31 documents and of 23 queries
    State.num_processes, State.wait_for_everyone = 1, lambda self: None
    mined = mining_shares.mine_in_shares(embedder, quadruple, tmp_path, State(), **options)
    assert asked[7:] == [4, 4, 4, 3, 4, 4, 3] and 0 < len(mined.queries) < 23
    with pytest.raises(ValueError, match="holds vectors with another source, k"):
        mining_shares.mine_in_shares(
            embedder, quadruple, tmp_path, State(), **(options | {"k": 9, "source": {"data": "others"}})
        )


def test_joined_files_are_their_rows_in_order(tmp_path):
    parts = [np.random.default_rng(i).random((n, 3), dtype=np.float32) for i, n in enumerate((4, 0, 2))]
    files = [tmp_path / f"{i}.npy" for i in range(3)]
    for file, part in zip(files, parts, strict=True):
        np.save(file, part)
    join_files(files, tmp_path / "all.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), np.concatenate(parts))
    with pytest.raises(ValueError, match="no vectors to join"):
        join_files([], tmp_path / "none.npy")
