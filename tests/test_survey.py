"""The survey of a person's data: near duplicates, the split by document, and every planted fault named by its row."""

import io
import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from q3vl_mini.emoji_world import sprites
from q3vl_mini.likeness import Likeness, fingerprint, near_pairs, normal_text
from q3vl_mini.media import MediaBudget, prepare
from q3vl_mini.pairs import Pair, Row
from q3vl_mini.records import validate
from q3vl_mini.splits import split_by_document, to_quadruple
from q3vl_mini.survey import survey


def noise(seed, edge=64):
    """A picture of soft coloured fields, unlike that of another seed."""
    fields = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize((edge, edge), Image.Resampling.BICUBIC)


def as_jpeg(picture, quality):
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def on_white(rgba):
    picture = Image.fromarray(rgba).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


# ---------------------------------------------------------------- when two things are nearly the same


def test_a_picture_is_recognised_when_resized_or_compressed_and_others_are_not():
    keys = [concept.key for concept in sprites.concepts()][::40]
    pictures = [on_white(sprites.sprite("noto", key, 96)) for key in keys]
    prints = [fingerprint(picture) for picture in pictures]
    changes = {
        "jpeg": lambda p: as_jpeg(p, 75),
        "larger": lambda p: p.resize((150, 150), Image.Resampling.BICUBIC),
        "smaller": lambda p: p.resize((72, 72), Image.Resampling.LANCZOS),
    }
    for name, change in changes.items():
        found = np.mean([p.is_near(fingerprint(change(x))) for p, x in zip(prints, pictures, strict=True)])
        assert found > 0.95, name
    wrong = [(i, j) for i, j in itertools.combinations(range(len(prints)), 2) if prints[i].is_near(prints[j])]
    assert not wrong  # of 780 pairs


def test_near_pairs_are_those_of_a_double_loop():
    pictures = [noise(i // 2) if i % 4 else as_jpeg(noise(i // 2), 60) for i in range(20)]
    pictures += [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", (252, 3, 2))]
    prints = [fingerprint(picture) for picture in pictures]
    looped = [(i, j) for i, j in itertools.combinations(range(len(prints)), 2) if prints[i].is_near(prints[j])]
    assert near_pairs(prints) == looped and len(looped) == 11  # ten re-made pictures, and the two reds
    assert near_pairs(prints[:1]) == []


def test_texts_that_differ_in_case_or_signs_are_one():
    assert normal_text("  The Cat,\tsat! ") == normal_text("the cat sat")
    assert normal_text("Cafe\u0301") == normal_text("café") and normal_text("ＡＢＣ") == "abc"
    assert normal_text("a cat") != normal_text("a cap")
    assert normal_text("!?") != normal_text("...") and normal_text("!?")  # signs alone are kept


def test_visual_tokens_are_those_that_the_model_gets(processor):
    budget = MediaBudget(image_min_tokens=4, image_max_tokens=16)
    likeness = Likeness(budget)
    for size in ((20, 30), (96, 64), (400, 300), (900, 40)):
        picture = Image.new("RGB", size, "red")
        [seen] = likeness.see({"image": picture})
        assert seen.tokens == prepare(picture, "image", budget, processor).n_tokens
        assert (seen.tokens < seen.whole) == (size in ((400, 300), (900, 40)))


def test_too_many_bad_rows_end_the_reading(tmp_path):
    rows = [{"query": f"query {i}", "positive": "gone.png" if i % 5 == 0 else f"document {i}"} for i in range(200)]
    with pytest.raises(ValueError, match=r"1\d of the first 5\d rows cannot be used \(1\d x missing file; .*row 0"):
        survey(rows, progress=False)
    assert survey(rows, may_skip=0.25, progress=False).counts["rows"] == {"read": 200, "used": 160, "left_out": 40}


# ---------------------------------------------------------------- the split


def linked_pairs(n, seed):
    """Text pairs of which some share documents or queries, or nearly so."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        query, document = rng.randrange(3 * n), rng.randrange(3 * n)
        said = rng.choice(["Document {}", "document {}!"]).format(document)
        pairs.append(Pair(Row(i), {"text": f"query {query}"}, ({"text": said},)))
    return pairs


def test_what_hangs_together_is_on_one_side_and_the_order_of_rows_does_not_matter():
    pairs = linked_pairs(200, 1)
    sides = split_by_document(pairs, Likeness(MediaBudget()), seed=5)
    words = [[p.query["text"], p.positives[0]["text"].strip("!").lower()] for p in pairs]
    names = {word: i for i, word in enumerate({w for pair in words for w in pair})}
    ends = np.array([[names[query], names[document]] for query, document in words]).T
    edges = coo_matrix((np.ones(200), tuple(ends)), [len(names)] * 2)
    n_parts, part = connected_components(edges, directed=False)
    assert 1 < n_parts < 200
    side_of = {}
    for (query, _), side in zip(words, sides, strict=True):
        assert side_of.setdefault(part[names[query]], side) == side
    assert 30 <= sides.count("test") <= 40 and 10 <= sides.count("validation") <= 20

    shuffled = random.Random(2).sample(range(200), 200)
    again = split_by_document([pairs[i] for i in shuffled], Likeness(MediaBudget()), seed=5)
    assert again == [sides[i] for i in shuffled]
    assert split_by_document(pairs, Likeness(MediaBudget()), seed=6) != sides


def test_a_table_that_hangs_together_cannot_be_split():
    pairs = [Pair(Row(i), {"text": f"q{i}"}, ({"text": "the one document"},)) for i in range(20)]
    with pytest.raises(ValueError, match="the largest of 20 rows: nothing is left for test, validation"):
        split_by_document(pairs, Likeness(MediaBudget()))


def test_a_quadruple_has_every_document_once_and_no_held_out_negative():
    pairs = [
        Pair(Row(0), {"text": "q"}, ({"text": "a"},), ({"text": "B!"}, {"text": "c"})),
        Pair(Row(1), {"text": "q"}, ({"text": "c"},), ({"text": "d"},)),
        Pair(Row(2), {"text": "r", "instruction": "Look."}, ({"text": "a"},)),
    ]
    likeness = Likeness(MediaBudget())
    made = to_quadruple(pairs, likeness, "train", held_out={likeness.near({"text": "b"})})
    assert [d["text"] for d in made.corpus] == ["a", "c", "d"]
    assert [(r.positives, r.negatives) for r in made.relevance] == [((0, 1), (2,)), ((0,), ())]
    assert made.queries == [{"text": "q"}, {"text": "r", "instruction": "Look."}] and made.task == "text_ret"
    validate(made)


# ---------------------------------------------------------------- fifty planted faults


@pytest.fixture
def planted(tmp_path):
    """A table of 2,000 rows with 50 faults: (its file, {row: the kind of its fault})."""
    rng = random.Random(0)
    rows = []
    for i in range(2000):
        positive = f"document {i} about {rng.random():.6f}"
        if i % 8 == 0:
            positive = f"{i}.png"
            noise(i).save(tmp_path / positive)
        rows.append({"query": f"question {i}", "positive": positive, "split": "test" if i >= 1600 else "train"})
    faults = {}
    clean = iter(rng.sample([i for i in range(2000) if i % 8], 400))
    train = (i for i in clean if i < 1600)

    def plant(kind, change, n=1):
        for _ in range(n):
            i = next(train)
            rows[i] |= change(i)
            faults[i] = kind

    plant("missing file", lambda i: {"positive": f"gone/{i}.png"}, 6)
    plant("missing file", lambda i: {"query": {"image": f"gone{i}.jpg"}}, 2)
    plant("empty cell", lambda i: {"positive": ""}, 3)
    plant("empty cell", lambda i: {"query": "  "}, 3)
    plant("empty cell", lambda i: {"query": None}, 1)
    plant("empty cell", lambda i: {"split": ""}, 1)
    plant("wrong type", lambda i: {"query": i}, 3)
    plant("wrong type", lambda i: {"positive": {"picture": "0.png"}}, 3)
    plant("wrong type", lambda i: {"split": "dev"}, 2)

    def broken(i):
        (tmp_path / f"broken{i}.png").write_bytes(b"no picture")
        return {"positive": f"broken{i}.png"}

    plant("unreadable file", broken, 3)
    for kind, n in (("duplicate", 7), ("near duplicate", 4)):
        for _ in range(n):
            first, second = sorted((next(train), next(train)))
            rows[second] = dict(rows[first])
            if kind == "near duplicate":
                rows[second]["positive"] = rows[first]["positive"].upper() + "!"
            faults[second] = kind
    for i, other in ((8, 1), (160, 2), (240, 3)):  # the picture of an earlier row, saved again
        picture = Image.open(tmp_path / f"{8 * other + 800}.png").resize((60, 60), Image.Resampling.BICUBIC)
        (tmp_path / f"again{i}.jpg").write_bytes(as_jpeg(picture, 80))
        rows[1200 + i]["positive"] = f"again{i}.jpg"
        faults[1200 + i] = "near duplicate"
    tests = [i for i in range(1600, 2000) if i % 8 and i not in faults]
    for k, i in enumerate(tests[:5]):
        said = rows[next(train)]["positive"]
        rows[i]["positive"] = said if k < 3 else said.title()
        faults[i] = "leak"
    for k, i in enumerate((1608, 1616)):
        picture = Image.open(tmp_path / f"{400 + 8 * k}.png")
        (tmp_path / f"{i}.png").write_bytes(as_jpeg(picture, 80))
        faults[i] = "leak"
    lines = [json.dumps(row) for row in rows]
    for i in (next(train), next(train)):
        lines[i] = lines[i][:-9]
        faults[i] = "unreadable line"
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    assert len(faults) == 50
    return tmp_path / "pairs.jsonl", faults


def test_fifty_planted_faults_are_named_by_their_rows_and_the_rest_is_used(planted, tmp_path):
    file, faults = planted
    found = survey(file, progress=False)
    named = {(fault.row.number, fault.kind) for fault in found.faults}
    assert set(faults.items()) <= named
    others = named - set(faults.items())
    assert {kind for _, kind in others} == {"leak"} and len(others) == 7  # the training row of each leak
    gone = sum(kind not in ("near duplicate", "leak") for kind in faults.values()) + 7
    assert found.counts["rows"] == {"read": 2000, "used": 2000 - gone, "left_out": gone}

    found.save(tmp_path / "out")
    page, record = (tmp_path / "out/survey.md").read_text(), json.loads((tmp_path / "out/survey.json").read_text())
    for row, kind in faults.items():
        assert f"- row {row}, " in page
        assert any(fault["row"] == row and fault["kind"] == kind for fault in record["faults"])
    with Image.open(tmp_path / "out/survey.png") as sheet:
        assert sheet.width > 400

    documents = {}
    for side, quadruple in found.splits.items():
        validate(quadruple)
        documents[side] = {d["text"].lower().strip("!") for d in quadruple.corpus if "text" in d}
    for one, other in itertools.combinations(documents.values(), 2):
        assert not one & other
    assert found.counts["splits"]["test"]["rows"] == 400
    assert found.counts["visuals"]["document"]["number"] == 250 - 2  # two of the training's were leaks


def test_rows_on_disk_are_surveyed_as_rows_in_memory(planted, tmp_path):
    file, _ = planted
    held, spilled = survey(file, progress=False), survey(file, media=tmp_path / "media", progress=False)
    assert spilled.counts == held.counts and spilled.faults == held.faults
    for side, quadruple in held.splits.items():
        other = spilled.splits[side]
        assert quadruple.queries == [dict(query) for query in other.queries]
        assert quadruple.corpus == [dict(document) for document in other.corpus]
        assert quadruple.relevance == other.relevance
    assert not any((tmp_path / "media").iterdir())  # the file has no name, and goes with the survey


def test_a_table_of_texts_may_be_larger_than_memory(processor, tmp_path):
    table, rng = tmp_path / "pairs.jsonl", random.Random(0)
    with table.open("w") as file:
        for i in range(500):
            told, not_told = (" ".join(rng.choices(["long", "text", "of", "words"], k=2000)) for _ in range(2))
            file.write(json.dumps({"query": f"words {i}", "positive": told, "negatives": not_told}) + "\n")
    tracemalloc.start()
    found = survey(table, media=tmp_path / "media", tokenizer=processor.tokenizer, progress=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.counts["rows"]["used"] == 500
    assert most < table.stat().st_size / 2


def test_a_query_of_two_sides_of_ones_own_split_is_named_and_kept():
    rows = [{"query": f"words {i}", "positive": f"text {i}", "split": "train"} for i in range(30)]
    rows += [{"query": f"other {i}", "positive": f"page {i}", "split": s} for i, s in enumerate(("validation", "test"))]
    rows.append({"query": "Words 4", "positive": "another text", "split": "test"})
    found = survey(rows, progress=False)
    assert [(fault.row.number, fault.kind) for fault in found.faults] == [(4, "shared query")]
    assert "row 32" in str(found.faults[0]) and len(found.splits["train"]) == 30


def test_a_survey_without_a_usable_row_says_why():
    with pytest.raises(ValueError, match="none of 1 rows can be used: row 0, query: empty cell"):
        survey([{"query": "", "positive": "x"}], progress=False)


def test_pictures_in_memory_are_told_apart_when_rows_are_dropped():
    def rows():
        for i in range(40):  # every second query cannot be opened, and its picture is freed
            query = b"no picture" if i % 2 else np.asarray(noise(100 + i))
            yield {"query": query, "positive": noise(i)}

    found = survey(rows(), progress=False)
    assert [fault.kind for fault in found.faults] == ["unreadable file"] * 20
    assert found.counts["rows"]["used"] == 20 and found.counts["visuals"]["document"]["number"] == 20


def test_graded_pairs_are_all_graded():
    rows = [{"query": f"q{i}", "positive": f"d{i}", "score": i / 40 if i != 7 else None} for i in range(40)]
    found = survey(rows, progress=False)
    assert [(fault.row.number, fault.column) for fault in found.faults] == [(7, "score")]
    assert found.splits["test"].task == "sts" and all(len(r.scores) == 1 for r in found.splits["test"].relevance)


def test_shared_documents_and_lengths_are_counted(processor):
    rows = [{"query": f"q {i}", "positive": "both" if i < 2 else f"d {'x ' * i}"} for i in range(30)]
    found = survey(rows, tokenizer=processor.tokenizer, max_length=20, progress=False)
    assert found.counts["shared"]["most"] == [{"queries": 2, "rows": ["row 0", "row 1"]}]
    texts = [row["positive"] for row in rows]
    lengths = [len(processor.tokenizer.encode(text.strip(), add_special_tokens=False)) for text in {*texts}]
    counted = found.counts["texts"]["document"]
    assert counted["number"] == 29 and counted["tokens"]["most"] == max(lengths)
    assert counted["longer_than_the_model_reads"] == sum(n > 20 for n in lengths)
