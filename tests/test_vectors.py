"""Vectors on disk are those of memory, made a block at a time."""

from dataclasses import replace

import numpy as np
import pytest

from q3vl_mini.evaluate import encoded
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.vectors import encode_to_file


def lengths(items, **_):
    """A model: the length of a text and its first letter."""
    return np.array([[len(item), ord(item[0])] for item in items], dtype=np.float32)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_the_block_size_does_not_show_and_bounds_what_is_encoded_at_once(tmp_path, block):
    items, sizes = [chr(97 + i) * (i + 1) for i in range(10)], []

    def encode(part):
        sizes.append(len(part))
        return lengths(part)

    vectors = encode_to_file(encode, items, tmp_path / "new" / "vectors.npy", block)
    assert isinstance(vectors, np.memmap) and not vectors.flags.writeable
    np.testing.assert_array_equal(vectors, lengths(items))
    assert max(sizes) <= block and sum(sizes) == 10
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "vectors.npy"), vectors)


def test_an_interrupted_run_leaves_no_file_that_looks_whole(tmp_path):
    def fails(part):
        if part[0] == "c":
            raise RuntimeError("out of memory")
        return lengths(part)

    with pytest.raises(RuntimeError, match="out of memory"):
        encode_to_file(fails, ["a", "b", "c", "d"], tmp_path / "vectors.npy", block=2)
    assert not (tmp_path / "vectors.npy").exists()
    with pytest.raises(ValueError, match="no items"):
        encode_to_file(lengths, [], tmp_path / "vectors.npy")


def test_encoded_keeps_each_vector_once_and_the_next_call_takes_what_is_kept(tmp_path):
    class Model:
        def encode(self, items, instruction=None, batch_size=32):
            return lengths(items) + len(instruction or "")

    class Nothing:
        def encode(self, items, **options):
            raise AssertionError("encoded again")

    corpus = ["one", "two", "three"]
    first = Quadruple("first", "text_ret", "Find it.", ["a", "bc"], corpus, [Relevance((0,))] * 2)
    second = Quadruple("second", "text_ret", "Look.", ["d"], corpus, [Relevance((1,))])
    other = Quadruple("other", "text_ret", "Look.", ["e"], ["four"], [Relevance((0,))])
    in_memory = list(encoded(Model(), [first, second, other]))
    on_disk = list(encoded(Model(), [first, second, other], folder=tmp_path))
    kept = list(encoded(Nothing(), [first, second, other], folder=tmp_path))
    for (a, *vectors), (b, *mapped), (c, *again) in zip(in_memory, on_disk, kept, strict=True):
        assert a is b is c and all(isinstance(x, np.memmap) for x in mapped)
        for x, y, z in zip(vectors, mapped, again, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, z)
    assert len(list(tmp_path.iterdir())) == 3 + 2  # queries of three, and two corpora

    with pytest.raises(ValueError, match="two data sets of one name"):
        list(encoded(Model(), [first, first], folder=tmp_path))


def test_a_data_set_that_is_named_like_a_path_stays_in_the_folder(tmp_path):
    class Model:
        def encode(self, items, instruction=None, batch_size=32):
            return lengths(items)

    folder = tmp_path / "a" / "vectors"
    named = Quadruple("../../../x", "text_ret", "Find it.", ["a"], ["one"], [Relevance((0,))])
    list(encoded(Model(), [named, replace(named, name=str(tmp_path / "y"))], folder=folder))
    assert len(list(folder.iterdir())) == 3 and [x.name for x in tmp_path.iterdir()] == ["a"]
