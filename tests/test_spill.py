"""Instances on disk are what they were in memory."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from q3vl_mini.embedder import Embedder
from q3vl_mini.pages import PdfPage
from q3vl_mini.spill import Spill


def test_a_spilled_instance_reads_like_the_dict_that_it_was(tmp_path):
    spill = Spill(tmp_path / "new")
    kept = [
        {"text": "schön \n 猫", "instruction": "Find it."},
        {"text": ["two", "texts"], "image": "cat.png"},
        {"image": PdfPage("manual.pdf", 3)},
    ]
    spilled = [spill.put(instance) for instance in kept]
    assert spilled == kept and [repr(x) for x in spilled] == [repr(x) for x in kept]
    assert spilled[1]["text"] == ["two", "texts"] and spilled[1].get("video") is None and "image" in spilled[1]
    for copied in (copy.deepcopy(spilled), pickle.loads(pickle.dumps(spilled))):
        assert [type(x) for x in copied] == [dict] * 3 and copied == kept
    with pytest.raises(KeyError):
        spilled[0]["video"]


def test_threads_may_read_while_others_write(tmp_path):
    spill = Spill(tmp_path)

    def write_and_read(i):
        mine = [spill.put({"text": f"{i} {j} " * (j % 7 + 1)}) for j in range(200)]
        return all(x["text"] == f"{i} {j} " * (j % 7 + 1) for j, x in enumerate(mine))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write_and_read, range(8)))


def test_a_model_takes_them(small_checkpoint, tmp_path):
    spill, embedder = Spill(tmp_path), Embedder(small_checkpoint)
    items = [{"text": "a red cat"}, {"text": "a dog", "instruction": "Find it."}]
    assert (embedder.encode([spill.put(item) for item in items]) == embedder.encode(items)).all()
