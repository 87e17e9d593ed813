"""Rows in the schemas of the public sets become the quadruples that their adapters promise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from q3vl_mini.config import StageConfig
from q3vl_mini.data import load_quadruple, png_bytes
from q3vl_mini.losses import classification_loss, cosent_loss, info_nce
from q3vl_mini.public_data import __main__ as command
from q3vl_mini.public_data import gather as gathering
from q3vl_mini.public_data.gather import WRONG_LABELS, gather, load, prepare, stand_in
from q3vl_mini.public_data.made_up import write_copies
from q3vl_mini.public_data.sets import SETS, find
from q3vl_mini.records import validate
from q3vl_mini.stages import sub_dataset
from q3vl_mini.train import loss_of

RNG = np.random.default_rng(0)


def picture(size=(40, 30)) -> bytes:
    return png_bytes(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))


def put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def mmeb_row(qry, pos_text, qry_image="", pos_image="", neg_text="", neg_image=""):
    return {
        "qry": qry,
        "qry_image_path": qry_image,
        "pos_text": pos_text,
        "pos_image_path": pos_image,
        "neg_text": neg_text,
        "neg_image_path": neg_image,
    }


IMAGE = "<|image_1|>\nRepresent the given image.\n"
# as the rows of the sets are: the placeholder, the instruction within the text, the line breaks
MMEB_ROWS = {
    "ImageNet_1K": mmeb_row(
        "<|image_1|>\nRepresent the given image for classification\n",
        "plane, carpenter's plane",
        "images/ImageNet_1K/Train/image_0.jpg",
    ),
    "N24News": mmeb_row(
        "<|image_1|>\nRepresent the given news image with the following caption for domain classification: Two actors "
        "in a theater.\n",
        "Theater",
        "images/N24News/Train/N24News_image_0.jpg",
        neg_text="Global Business",
    ),
    "DocVQA": mmeb_row(
        "<|image_1|>\nRepresent the given image with the following question: what is the date mentioned?\n",
        "1/8/93",
        "images/DocVQA/Train/DocVQA_image_0.jpg",
        neg_text="398,627.92",
    ),
    "MSCOCO_t2i": mmeb_row(
        "Find me an everyday image that matches the given caption: A skateboarder in mid air.\n",
        IMAGE,
        pos_image="images/MSCOCO_t2i/Train/COCO_train2014_000000376224.jpg",
    ),
    "MSCOCO_i2t": mmeb_row(
        "<|image_1|>\nFind an image caption describing the given everyday image.\n",
        "A skateboarder in mid air.",
        "images/MSCOCO_i2t/Train/COCO_train2014_000000376224.jpg",
    ),
    "VisualNews_t2i": mmeb_row(
        "Retrieve an image of this news caption. A president arrives at the airport.\n",
        IMAGE,
        pos_image="images/VisualNews_t2i/Train/news.jpg",
    ),
    "CIRR": mmeb_row(
        "<|image_1|>\nGiven an image, find a similar everyday image with the described changes: More hamsters.\n",
        IMAGE,
        "images/CIRR/Train/train-11991-2-img1.jpg",
        "images/CIRR/Train/train-5270-1-img0.jpg",
    ),
    "VisDial": mmeb_row(
        "Represent the given dialogue about an image, which is used for image retrieval: Q:inside or outside\n"
        "A:inside\n\n",
        "<|image_1|>\nRepresent the given image\n",
        pos_image="images/VisDial/Train/VisDial_image_0.jpg",
        neg_image="images/VisDial/Train/VisDial_image_61616.jpg",
    ),
    "WebQA": mmeb_row(
        "<|image_1|>\nFind a Wikipedia image that answers this question: Which body part is on both coins?\n",
        "<|image_1|>\nRepresent the given Wikipedia image with related text information: 1913-D Barber half obverse.\n",
        pos_image="images/WebQA/Train/30272327.jpg",
    ),
    "MSCOCO": mmeb_row(
        '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "hot dog"\n',
        "<|image_1|>\nRepresent the given cropped image of the object",
        "images/MSCOCO/Train/000000558840.jpg",
        "images/MSCOCO/Train/558840_object_hot dog.jpg",
    ),
}  # fmt: skip
PAGE_SETS = {  # repository -> its columns beside image and query, as on its card or in its viewer
    "colpali_train_set": ("image_filename", "answer", "source", "options", "page", "model", "prompt", "answer_type"),
    "VisRAG-Ret-Train-In-domain-data": ("source",),
    "VisRAG-Ret-Train-Synthetic-data": ("source",),
}
TEXT_SETS = {
    "nli/triplets": [
        {"anchor": "A person on a horse jumps.", "positive": "A person is outdoors.", "negative": "A person sleeps."},
        {"anchor": "Children smile.", "positive": "There are children.", "negative": "The kids are frowning."},
    ],
    "stsb/pairs": [
        {"sentence1": "A plane is taking off.", "sentence2": "An air plane is taking off.", "score": 1.0},
        {"sentence1": "A man plays the flute.", "sentence2": "A man is cutting wood.", "score": 0.16},
    ],
    "msmarco/passages": [
        {
            "answers": ["a tax"],
            "passages": {
                "is_selected": [0, 1, 0],
                "passage_text": ["An income.", "A levy is a tax.", "A levee is a dam."],
                "url": ["a", "b", "c"],
            },
            "query": " what is a levy",
            "query_id": 7,
            "query_type": "DESCRIPTION",
            "wellFormedAnswers": [],
        },
    ],
}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` waits for seconds after a shuffled stream was closed."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """A folder of local copies with a few rows each, in the layout of their repositories."""
    folder = tmp_path_factory.mktemp("copies")
    for subset, row in MMEB_ROWS.items():
        file = folder / "MMEB-train" / subset / "original-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        datasets.Dataset.from_list([row]).to_parquet(file)
        for column in ("qry_image_path", "pos_image_path", "neg_image_path"):
            if row[column]:
                put(folder / "MMEB-train" / row[column], picture())
    hound = folder / "train_video_and_instruction"
    for name, rows in (("video_caption_300k", hound_rows("caption")), ("video_240k_caption_15k", hound_rows("answer"))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        put(hound / "video_instruction" / "train" / "sft" / f"{name}.jsonl", text.encode())
    for i in range(20):
        put(hound / "train_300k" / "v_abc-Scene-001" / f"c01_{7 * i + 1:04d}.jpeg", picture())
    put(hound / "train_300k" / "short" / "c01_0001.jpeg", picture())
    page, other = picture(), picture()
    asked = ((page, "Who has 12 users?"), (page, "What falls?"), (other, "What rises?"), (other, None))
    for repository, others in PAGE_SETS.items():
        strings = dict.fromkeys(("query", *others), datasets.Value("string"))
        features = datasets.Features({"image": datasets.Image()} | strings)
        rows = [
            dict.fromkeys(others, "x") | {"image": {"bytes": content, "path": "1921.png"}, "query": query}
            for content, query in asked
        ]
        for shard in range(2):  # a page of one shard with a question in the other would still be one document
            file = folder / repository / "data" / f"train-0000{shard}-of-00002.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows[2 * shard : 2 * shard + 2], features=features).to_parquet(file)
    for name, rows in TEXT_SETS.items():
        file = folder / find(name).local_name / find(name).files.format(split="train").replace("*", "00000-of-00001")
        file.parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
    return folder


@pytest.fixture
def public(copies, tmp_path) -> Path:
    """Such a folder for one test, which may change it."""
    return Path(shutil.copytree(copies, tmp_path / "public"))


def hound_rows(word):
    return [
        {
            "id": f"{video}_{i}",
            "video": video,
            "conversations": [
                {"from": "human", "value": "<video>\nWhat happens?"},
                {"from": "gpt", "value": f"The {word} of {video}."},
            ],
        }
        for i, video in enumerate(("v_abc-Scene-001", "short", "not_downloaded"))
    ]


def one(name, row, folder=None):
    """The only query of a set's only row, with its positives and negatives."""
    quadruple = gather(name, [row], 10, folder=folder)
    validate(quadruple)
    [labels] = quadruple.relevance
    chosen = [[quadruple.corpus[d] for d in part] for part in (labels.positives, labels.negatives)]
    return quadruple.queries[0], *chosen


# ---------------------------------------------------------------- what becomes of a row


@pytest.mark.parametrize(
    "subset, query, positive, negative",
    [
        ("ImageNet_1K", (True, None), (False, "plane, carpenter's plane"), None),
        ("N24News", (True, "Two actors in a theater."), (False, "Theater"), (False, "Global Business")),
        ("DocVQA", (True, "what is the date mentioned?"), (False, "1/8/93"), (False, "398,627.92")),
        ("MSCOCO_t2i", (False, "A skateboarder in mid air."), (True, None), None),
        ("MSCOCO_i2t", (True, None), (False, "A skateboarder in mid air."), None),
        ("VisualNews_t2i", (False, "A president arrives at the airport."), (True, None), None),
        ("CIRR", (True, "More hamsters."), (True, None), None),
        ("VisDial", (False, "Q:inside or outside\nA:inside"), (True, None), (True, None)),
        ("WebQA", (False, "Which body part is on both coins?"), (True, "1913-D Barber half obverse."), None),
        ("MSCOCO", (True, "hot dog"), (True, None), None),
    ],
)
def test_an_mmeb_row_without_placeholder_and_instruction(public, subset, query, positive, negative):
    """(has a picture, text) of each side; the instruction is the quadruple's, the documents have none."""
    row = MMEB_ROWS[subset]
    found_query, positives, negatives = one(f"mmeb/{subset}", row, public)
    sides = [(found_query, query, "qry"), (positives[0], positive, "pos")]
    sides += [(negatives[0], negative, "neg")] if negative else []
    assert len(positives) == 1 and len(negatives) == bool(negative)
    for instance, (has_picture, text), column in sides:
        path = str(public / "MMEB-train" / row[f"{column}_image_path"]) if has_picture else None
        assert (instance.get("image"), instance.get("text")) == (path, text)
    instruction = SETS[f"mmeb/{subset}"].instruction
    assert instruction.rstrip(".") in row["qry"] and instruction.endswith(".")


def test_an_mmeb_text_that_begins_otherwise_stays_whole(public):
    row = {**MMEB_ROWS["MSCOCO_t2i"], "qry": "Which photo goes with this? A dog.\n"}  # the split diverse_instruction
    assert one("mmeb/MSCOCO_t2i", row, public)[0] == {"text": "Which photo goes with this? A dog."}


def test_a_selected_passage_is_right_and_the_others_are_not_called_wrong():
    quadruple = gather("msmarco/passages", TEXT_SETS["msmarco/passages"], 10)
    assert quadruple.queries == [{"text": "what is a levy"}]
    assert [d["text"] for d in quadruple.corpus] == ["A levy is a tax.", "An income.", "A levee is a dam."]
    assert (quadruple.relevance[0].positives, quadruple.relevance[0].negatives) == ((0,), ())


def test_a_question_without_a_selected_passage_is_left_out_and_counted():
    row = TEXT_SETS["msmarco/passages"][0]
    nothing = {**row, "passages": {**row["passages"], "is_selected": [0, 0, 0]}, "query": "what is nothing"}
    quadruple = gather("msmarco/passages", [nothing, row, nothing], 10)
    assert len(quadruple) == 1 and len(quadruple.corpus) == 3
    report = quadruple.meta["report"]
    assert report["rows_read"] == 3
    assert report["skipped"] == {"no passage selected": {"count": 2, "first": "row 0: what is nothing"}}


def test_a_contradiction_is_a_negative():
    query, positives, negatives = one("nli/triplets", TEXT_SETS["nli/triplets"][0])
    assert query == {"text": "A person on a horse jumps."}
    assert (positives, negatives) == ([{"text": "A person is outdoors."}], [{"text": "A person sleeps."}])


def test_graded_pairs_keep_their_score_on_either_scale():
    glue = [{"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}]
    hidden = [{"sentence1": "c", "sentence2": "d", "label": -1.0, "idx": 1}]
    assert [r.scores for r in gather("stsb/pairs", TEXT_SETS["stsb/pairs"], 10).relevance] == [(1.0,), (0.16,)]
    quadruple = gather("stsb/pairs", glue + hidden, 10)
    assert [r.scores for r in quadruple.relevance] == [(3.8,)]
    assert quadruple.meta["report"]["skipped"]["no score"]["count"] == 1


def test_a_hound_clip_is_eight_frames_from_the_first_to_the_last(public):
    forth, back = (gather(f"llavahound/{name}", hound_rows("caption"), 10, folder=public)
                   for name in ("caption_to_video", "video_to_caption"))  # fmt: skip
    assert forth.queries[0] == {"text": "The caption of v_abc-Scene-001."} == back.corpus[0]
    frames = forth.corpus[0]["video"]
    numbers = [int(Path(frame).stem.split("_")[1]) for frame in frames]
    assert numbers == [1, 22, 36, 57, 78, 99, 113, 134]  # 20 frames, 7 apart: number 0, 3, 5, 8, 11, 14, 16, 19
    assert back.queries[0] == {"video": frames} and len(forth.corpus[1]["video"]) == 1
    assert forth.meta["report"]["skipped"]["no frames"]["count"] == 1


def test_a_hound_question_is_asked_about_its_clip(public):
    quadruple = gather("llavahound/qa", hound_rows("answer"), 10, folder=public)
    assert quadruple.queries[0]["text"] == "What happens?" and len(quadruple.queries[0]["video"]) == 8
    assert quadruple.corpus[0] == {"text": "The answer of v_abc-Scene-001."}


# ---------------------------------------------------------------- what becomes of many


def test_equal_queries_have_several_positives_and_equal_pages_are_one():
    page, other = picture(), Image.new("RGB", (30, 30), "red")
    rows = [
        {"query": "Who?", "image": {"bytes": page, "path": None}},
        {"query": "When?", "image": {"bytes": page, "path": None}},
        {"query": "Who?", "image": other},
        {"query": "Who?", "image": other},
    ]
    quadruple = gather("vidore/colpali", rows, 10)
    assert [q["text"] for q in quadruple.queries] == ["Who?", "When?"] and len(quadruple.corpus) == 2
    assert [r.positives for r in quadruple.relevance] == [(0, 1), (0,)]


def test_a_document_that_one_row_calls_right_and_another_wrong_is_right():
    rows = [{"anchor": "a", "positive": "b", "negative": "c"}, {"anchor": "a", "positive": "c", "negative": "d"}]
    quadruple = gather("nli/triplets", rows, 10)
    validate(quadruple)
    [labels] = quadruple.relevance
    assert [[quadruple.corpus[d]["text"] for d in part] for part in (labels.positives, labels.negatives)] == [
        ["b", "c"],
        ["d"],
    ]


def test_a_label_is_told_from_explicitly_wrong_ones(public):
    rows = []
    for i in range(30):
        put(public / "MMEB-train" / f"images/{i}.jpg", picture())
        row = {**MMEB_ROWS["N24News"], "qry_image_path": f"images/{i}.jpg", "pos_text": f"label {i % 20}"}
        rows.append(row | {"neg_text": f"label {(i + 1) % 20}"})
    quadruple = gather("mmeb/N24News", rows, 100, folder=public)
    validate(quadruple)
    texts = [d["text"] for d in quadruple.corpus]
    assert sorted(texts) == sorted(f"label {i}" for i in range(20))
    for i, labels in enumerate(quadruple.relevance):
        assert [texts[d] for d in labels.positives] == [f"label {i % 20}"]
        wrong = {texts[d] for d in labels.negatives}
        assert len(wrong) == WRONG_LABELS and f"label {(i + 1) % 20}" in wrong
    assert gather("mmeb/N24News", rows, 100, folder=public).relevance == quadruple.relevance
    assert gather("mmeb/N24News", rows, 100, seed=1, folder=public).relevance != quadruple.relevance


def test_bad_rows_are_left_out_counted_and_named(public):
    put(public / "MMEB-train/images/broken.jpg", b"no picture")
    good = MMEB_ROWS["MSCOCO_t2i"]
    rows = [
        {**good, "pos_image_path": "images/absent.jpg"},
        {**good, "pos_image_path": "images/broken.jpg"},
        good,
        {**good, "qry": "Find me an everyday image that matches the given caption: \n"},
        {**good, "pos_image_path": None},
        {**good, "pos_image_path": "images/absent.jpg"},
    ]
    quadruple = gather("mmeb/MSCOCO_t2i", rows, 10, folder=public)
    assert len(quadruple) == len(quadruple.corpus) == 1
    skipped = quadruple.meta["report"]["skipped"]
    counts = {reason: entry["count"] for reason, entry in skipped.items()}
    assert counts == {"no file": 2, "unreadable picture": 1, "empty query": 1, "empty positive": 1}
    assert skipped["no file"]["first"] == f"row 0: {public / 'MMEB-train/images/absent.jpg'}"
    assert skipped["unreadable picture"]["first"].startswith("row 1: ")


def test_too_many_bad_rows_stop_with_their_reasons(public):
    good, bad = MMEB_ROWS["MSCOCO_t2i"], {**MMEB_ROWS["MSCOCO_t2i"], "pos_image_path": "images/absent.jpg"}
    few = [bad] * 5 + [{**good, "qry": f"{i}"} for i in range(95)]
    assert len(gather("mmeb/MSCOCO_t2i", few, 1000, folder=public)) == 95
    rows = iter([bad if i % 5 == 0 else {**good, "qry": f"{i}"} for i in range(1000)])
    with pytest.raises(ValueError, match=r"MSCOCO_t2i: 11 of the first 51 rows .* 11 x no file \(first row 0: .*abs"):
        gather("mmeb/MSCOCO_t2i", rows, 1000, folder=public)
    assert next(rows)["qry"] == "51"  # it did not read on
    with pytest.raises(ValueError, match="none of 2 rows can be used: 2 x no file"):
        gather("mmeb/MSCOCO_t2i", [bad, bad], 10, folder=public)


def test_another_schema_is_named(public):
    with pytest.raises(ValueError, match=r"triplets, row 0: no column 'anchor'; it has \['hypothesis', 'premise'\]"):
        gather("nli/triplets", [{"premise": "a", "hypothesis": "b"}], 10)
    with pytest.raises(ValueError, match="pictures of this set lie beside its table.*give folder"):
        gather("mmeb/MSCOCO_t2i", [MMEB_ROWS["MSCOCO_t2i"]], 10)
    with pytest.raises(ValueError, match="no public set 'mmeb/none'; the sets are mmeb/ImageNet_1K"):
        find("mmeb/none")


@pytest.mark.parametrize("name", SETS)
def test_a_set_says_its_loss_source_and_licence(name):
    public = SETS[name]
    loss = loss_of(public.task, StageConfig(loss_per_task=True))
    expected = {"image_cls": classification_loss, "sts": cosent_loss}.get(public.task, info_nce)
    assert loss is expected
    doc = " ".join(getattr(public.adapt, "func", public.adapt).__doc__.split())
    assert public.repo in doc and "Licence: " in doc and public.task in doc
    assert public.licence and public.repo.count("/") == 1 and public.instruction.endswith(".")


# ---------------------------------------------------------------- streamed


STREAMED = ["mmeb/N24News", "mmeb/VisDial", "mmeb/MSCOCO", *(name for name in SETS if not name.startswith("mmeb/"))]


@pytest.mark.parametrize("name", STREAMED)
def test_a_local_copy_is_streamed_and_a_stand_in_is_like_it(public, name):
    quadruple = load(name, 100, folder=public)
    validate(quadruple)
    assert (quadruple.name, quadruple.task) == (name, SETS[name].task)
    assert quadruple.meta["source"] == SETS[name].repo
    blank = stand_in(name, 5)
    validate(blank)
    assert len(blank) == 5
    assert {frozenset(q) for q in blank.queries} == {frozenset(q) for q in quadruple.queries}
    assert frozenset(blank.corpus[0]) in {frozenset(d) for d in quadruple.corpus}


def test_a_stream_has_the_rows_of_the_table_in_an_order_of_the_seed(public):
    folder = public / "all-nli" / "triplet"
    rows = [{"anchor": f"a{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(50)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    anchors = [[q["text"] for q in load("nli/triplets", 100, seed, public).queries] for seed in (0, 0, 1)]
    assert sorted(anchors[0]) == sorted(row["anchor"] for row in rows)
    assert anchors[0] == anchors[1] != anchors[2]
    assert [q["text"] for q in load("nli/triplets", 10, 0, public).queries] == anchors[0][:10]


def test_embedded_pages_are_kept_byte_for_byte_in_files_of_their_own(public, tmp_path):
    (tmp_path / "pictures").mkdir()
    quadruple = load("vidore/colpali", 100, folder=public, pictures=tmp_path / "pictures")
    assert len(quadruple) == 3 and len(quadruple.corpus) == 2
    table = datasets.concatenate_datasets(
        [datasets.Dataset.from_parquet(str(file)) for file in sorted((public / "colpali_train_set/data").iterdir())]
    ).cast_column("image", datasets.Image(decode=False))
    page_of = {row["query"]: row["image"]["bytes"] for row in table}
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        assert Path(quadruple.corpus[labels.positives[0]]["image"]).read_bytes() == page_of[query["text"]]
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert quadruple.meta["report"]["skipped"]["empty query"]["count"] == 1


def test_only_the_questions_of_the_file_of_questions_and_captions_are_read(public, monkeypatch):
    monkeypatch.setitem(SETS, "llavahound/qa", replace(SETS["llavahound/qa"], first=1))
    assert [q["text"] for q in load("llavahound/qa", 10, folder=public).queries] == ["What happens?"]
    assert load("llavahound/qa", 10, folder=public).meta["report"]["rows_read"] == 1


def test_without_copy_and_network_the_remedy_is_named(tmp_path):
    with pytest.raises(ConnectionError, match="triplets: cannot read hf://.*download sentence-transformers/all-nli"):
        load("nli/triplets", 10, folder=tmp_path)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made-up")
    write_copies(SETS, folder, 4)
    return folder


def table_of(folder: Path, name: str) -> list[dict]:
    public = find(name)
    [file] = sorted((folder / public.local_name).glob(public.files.format(split=public.split)))[:1]
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return pq.read_table(file).to_pylist()


@pytest.mark.parametrize("name", SETS)
def test_a_made_up_copy_is_read_like_a_real_one(made_up, name):
    quadruple, usual = load(name, 100, folder=made_up), find(name).like
    validate(quadruple)
    assert len(quadruple) >= 3 and quadruple.meta["report"]["skipped"] == {}
    assert {frozenset(q) for q in quadruple.queries} == {frozenset(usual.query)}
    assert {frozenset(d) for d in quadruple.corpus} == {frozenset(usual.positives[0])}
    assert any(labels.negatives for labels in quadruple.relevance) == (name.startswith(("mmeb/", "nli/")))


@pytest.mark.parametrize("name", STREAMED)
def test_a_made_up_row_has_columns_of_a_real_one(copies, made_up, name):
    real, row = table_of(copies, name)[0], table_of(made_up, name)[0]
    assert row.keys() <= real.keys() and {type(row[x]) for x in row} <= {type(real[x]) for x in real}
    assert name.startswith(("msmarco", "vidore")) or row.keys() == real.keys()  # of which some are not read


# ---------------------------------------------------------------- prepared, and in a run


def test_a_set_is_prepared_once_and_again_only_for_more_rows(public, monkeypatch):
    rows = [{"anchor": f"a{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(50)]
    datasets.Dataset.from_list(rows).to_parquet(public / "all-nli/triplet/train-00000-of-00001.parquet")
    loads = []
    monkeypatch.setattr(gathering, "load", lambda *a, **k: loads.append(a[1]) or load(*a, **k))
    saved = prepare("nli/triplets", 20, 3, public)
    assert saved == public / "prepared/nli/triplets-3" == prepare("nli/triplets", 10, 3, public)
    few = load_quadruple(saved, streaming=True)
    assert loads == [20] and len(few) == 20
    prepare("nli/triplets", 30, 3, public)
    more = load_quadruple(saved, streaming=True)
    assert loads == [20, 30] and [more.queries[i] for i in range(20)] == list(few.queries)
    card = json.loads((saved / "card.json").read_text())
    assert card["licence"].startswith("SNLI") and card["meta"]["report"]["rows_read"] == 30
    assert [p.name for p in saved.parent.iterdir()] == ["triplets-3"]  # nothing temporary is left


def test_a_stage_names_a_public_set_like_a_task(public, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, kind in (("vidore/colpali", "image"), ("mmeb/CIRR", "image"), ("llavahound/caption_to_video", "video")):
        quadruple = sub_dataset(name, 1, 0, public)
        validate(quadruple)
        assert quadruple.name == name and len(quadruple) == 1
        assert kind in quadruple.corpus[quadruple.relevance[0].positives[0]]
    with pytest.raises(ValueError, match="no sub-dataset 'data/absent': neither a folder .*concept.*nli/triplets"):
        sub_dataset("data/absent", 1, 0)


def test_the_command_lists_the_sets_and_prepares_those_that_are_named(public, capsys):
    command.main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SETS)
    command.main(["nli/triplets", "stsb/pairs", "--rows", "2", "--folder", str(public)])
    assert capsys.readouterr().out.splitlines() == [
        "nli/triplets: 2 queries, 4 documents, skipped none",
        "stsb/pairs: 2 queries, 2 documents, skipped none",
    ]
    command.main(["nli/triplets", "--rows", "2", "--folder", str(public), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made == {"name": "nli/triplets", "queries": 2, "documents": 4, "skipped": {}}
    command.main(["--json"])
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == list(SETS)


def test_the_command_prepares_all_that_a_preset_names(public, tmp_path, capsys):
    (tmp_path / "p.toml").write_text(
        f'name = "p"\nbackbone = "b"\nseed = 4\n[data]\npublic = "{public.as_posix()}"\n'
        '[stages.s0.tasks]\n"nli/triplets" = 1\nconcept = 5\n[stages.s1.tasks]\n"nli/triplets" = 2\n'
    )
    command.main(["--preset", str(tmp_path / "p.toml")])
    assert capsys.readouterr().out == "nli/triplets: 2 queries, 4 documents, skipped none\n"
    assert (public / "prepared/nli/triplets-4/card.json").is_file()


def test_no_path_of_a_public_set_leads_out_of_its_folder(tmp_path):
    (tmp_path / "MMEB-train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": ""}
    rows = [row | {"qry_image_path": path} for path in ("../secret.png", str(tmp_path / "secret.png"))] + [row]
    found = gather("mmeb/MSCOCO_t2i", rows, 3, folder=tmp_path)
    assert len(found) == 1 and found.meta["report"]["skipped"]["path outside"]["count"] == 2
    clip = {"video": "../..", "conversations": [{"value": "a"}, {"value": "b"}]}
    with pytest.raises(ValueError, match="path outside"):
        gather("llavahound/qa", [clip], 1, folder=tmp_path)


def test_a_picture_that_a_row_only_names_is_not_read_and_odd_rows_are_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"query": "q", "image": {"bytes": png_bytes(np.zeros((8, 8, 3), np.uint8)), "path": None}}
    rows = [good, good | {"image": {"bytes": None, "path": str(tmp_path / "a.png")}}, good | {"image": str(tmp_path)}]
    rows += [good | {"query": 7}, good | {"query": "half \ud83d"}]
    reasons = gather("vidore/colpali", rows, 9).meta["report"]["skipped"]
    assert {reason: entry["count"] for reason, entry in reasons.items()} == {
        "empty page": 1, "no picture": 1, "broken text": 2
    }  # fmt: skip
    passages = {"passage_text": ["a", "b"], "is_selected": [1]}
    sound = {"passage_text": ["a"], "is_selected": [1]}
    reasons = gather(
        "msmarco/passages", [{"query": "q", "passages": p} for p in (passages, sound, None)], 9
    ).meta["report"]["skipped"]
    assert set(reasons) == {"passages without judgements", "wrong type"}
