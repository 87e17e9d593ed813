"""mteb_model.py: the models as mteb sees them, on tasks made here, against this project's own figures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from scipy.stats import spearmanr

from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.evaluate import encoded, score_quadruple
from q3vl_mini.media import MediaBudget, load_image
from q3vl_mini.mteb_model import MtebEmbedder, MtebReranker, batches_of_instances, task_instruction
from q3vl_mini.records import Clip, Relevance
from q3vl_mini.reranker import Reranker

pytestmark = pytest.mark.slow  # importing mteb takes seconds, so tests import from it late


def about(name, kind, category, modalities, score, prompt):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        type=kind,
        category=category,
        modalities=modalities,
        main_score=score,
        prompt=prompt,
        description="Made by this test.",
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )


def retrieval_task(quadruple, kind, category, modalities, top_ranked=None):
    """An mteb retrieval task with the queries, the corpus and the labels of a quadruple."""
    from mteb.abstasks import AbsTaskRetrieval

    columns = {"text": Value("string"), "image": Image()}

    def dataset(rows, prefix):
        table = [{"id": f"{prefix}{i}", **{k: picture(v) for k, v in row.items()}} for i, row in enumerate(rows)]
        kinds = {key: columns[key] for key in rows[0]}
        return Dataset.from_list(table, features=Features({"id": Value("string"), **kinds}))

    def picture(value):
        return value if isinstance(value, str) else as_pil(value)

    class Task(AbsTaskRetrieval):
        metadata = about(f"Local{kind}", kind, category, modalities, "ndcg_at_10", {"query": quadruple.instruction})

        def load_data(self, *args, **kwargs):
            relevant = {
                f"q{i}": {f"d{d}": 1 for d in labels.positives} for i, labels in enumerate(quadruple.relevance)
            }
            split = {
                "queries": dataset(quadruple.queries, "q"),
                "corpus": dataset(quadruple.corpus, "d"),
                "relevant_docs": relevant,
                "top_ranked": top_ranked,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Task()


def among_themselves(quadruple):
    """The same queries with a corpus of only their positives, so that a random model finds some."""
    rows = sorted({d for labels in quadruple.relevance for d in labels.positives})
    relevance = [Relevance(tuple(rows.index(d) for d in labels.positives)) for labels in quadruple.relevance]
    return replace(quadruple, corpus=[quadruple.corpus[d] for d in rows], relevance=relevance)


def as_pil(value):
    from PIL import Image as Pictures

    return Pictures.fromarray(load_image(value))


def main_score(model, task):
    import mteb

    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result.get_score()


@pytest.fixture(scope="module")
def embedder(small_checkpoint):
    return Embedder(small_checkpoint, template="released")


@pytest.fixture(scope="module")
def reranker(small_checkpoint):
    return Reranker(small_checkpoint, template="released")


def test_they_are_what_mteb_takes_for_an_encoder_and_a_cross_encoder(embedder, reranker):
    from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

    encoder, cross_encoder = MtebEmbedder(embedder, dim=32), MtebReranker(reranker)
    assert isinstance(encoder, EncoderProtocol) and not isinstance(encoder, (CrossEncoderProtocol, SearchProtocol))
    assert isinstance(cross_encoder, CrossEncoderProtocol) and not isinstance(cross_encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.embed_dim == 32 and meta.model_type == ["dense"] and set(meta.modalities) == {"text", "image", "video"}
    assert meta.n_parameters == sum(p.numel() for p in embedder.model.parameters())
    assert meta.to_dict()["loader"] == "MtebEmbedder"
    assert cross_encoder.mteb_model_meta.is_cross_encoder


def test_mteb_loads_them_by_name(small_checkpoint):
    meta = MtebEmbedder(small_checkpoint, device="cpu", template="report").mteb_model_meta
    again = meta.loader(str(small_checkpoint), revision="abc", device="cpu")
    assert meta.name.endswith("/small") and again.mteb_model_meta.revision == "abc"
    assert meta.experiment_kwargs["template"] == "report" and again.mteb_model_meta.experiment_kwargs != meta


@pytest.mark.parametrize(
    ("name", "category", "modalities"),
    [("keyword_search", "t2t", ["text"]), ("text_to_image", "t2i", ["text", "image"])],
)
def test_retrieval_scores_are_those_of_this_project(embedder, name, category, modalities):
    quadruple = among_themselves(build(name, "validation", 16, 3))
    [(_, queries, corpus)] = encoded(embedder, [quadruple])
    expected = score_quadruple(queries, corpus, quadruple, metric="ndcg@10").score
    score = main_score(MtebEmbedder(embedder), retrieval_task(quadruple, "Retrieval", category, modalities))
    assert score == pytest.approx(expected, abs=1e-4)  # mteb rounds to five digits
    assert 0 < score < 1


def test_sts_is_the_rank_correlation_of_the_cosines(embedder):
    from mteb.abstasks import AbsTaskSTS

    quadruple = build("similarity", "validation", 16, 3)
    pairs = {
        "sentence1": [query["text"] for query in quadruple.queries],
        "sentence2": [quadruple.corpus[labels.positives[0]]["text"] for labels in quadruple.relevance],
        "score": [labels.scores[0] for labels in quadruple.relevance],
    }

    class Task(AbsTaskSTS):
        metadata = about("LocalSTS", "STS", "t2t", ["text"], "cosine_spearman", quadruple.instruction)
        min_score, max_score = 0, 1

        def load_data(self, *args, **kwargs):
            self.dataset, self.data_loaded = {"test": Dataset.from_dict(pairs)}, True

    first, second = (embedder.encode(pairs[side], quadruple.instruction) for side in ("sentence1", "sentence2"))
    expected = spearmanr((first * second).sum(1), pairs["score"]).statistic
    assert main_score(MtebEmbedder(embedder), Task()) == pytest.approx(expected, abs=1e-4)


def test_a_reranker_orders_the_candidates_that_a_task_gives(reranker):
    quadruple = build("text_to_image", "validation", 6, 3)
    rng = np.random.default_rng(0)
    top = [sorted({*labels.positives, *rng.integers(0, len(quadruple.corpus), 4)}) for labels in quadruple.relevance]
    task = retrieval_task(
        quadruple,
        "Reranking",
        "t2i",
        ["text", "image"],
        {f"q{i}": [f"d{d}" for d in rows] for i, rows in enumerate(top)},
    )
    gains = []
    for query, rows, labels in zip(quadruple.queries, top, quadruple.relevance, strict=True):
        ranked = reranker.rank(query, [quadruple.corpus[d] for d in rows], instruction=quadruple.instruction)
        place = [rows[hit["corpus_id"]] for hit in ranked].index(labels.positives[0])
        gains.append(1 / np.log2(2 + place))
    assert main_score(MtebReranker(reranker), task) == pytest.approx(np.mean(gains), abs=1e-4)


def test_binary_codes_are_compared_by_their_signs(embedder):
    batches = [{"text": ["a red cat", "12 apples"]}, {"text": ["green apples"]}]
    call = {"task_metadata": SimpleNamespace(prompt=None), "hf_split": "test", "hf_subset": "default"}
    model = MtebEmbedder(embedder, dim=32)
    vectors, codes = model.encode(batches, **call), model.encode(batches, precision="binary", **call)
    assert np.array_equal(codes, np.where(vectors > 0, 1, -1)) and codes.shape == (3, 32)
    pairs = np.asarray(model.similarity_pairwise(vectors[:2], vectors[1:]))
    np.testing.assert_allclose(pairs, np.diag(np.asarray(model.similarity(vectors[:2], vectors[1:]))), atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "prompt_type", "expected"),
    [
        ("Find it.", "query", "Find it."),
        ("Find it.", "document", None),
        ("Compare.", None, "Compare."),
        ({"query": "Find it."}, "query", "Find it."),
        ({"query": "Find it."}, "document", None),
        ({"query": "Find it.", "document": "A page."}, "document", "A page."),
        (None, "query", None),
    ],
)
def test_queries_get_the_tasks_prompt_and_documents_the_default(prompt, prompt_type, expected):
    assert task_instruction(SimpleNamespace(prompt=prompt), prompt_type) == expected


def test_an_instruction_of_the_query_is_not_taken_for_its_text():
    batch = {"text": ["a cat Find a picture."], "query": ["a cat"], "instruction": ["Find a picture."], "id": ["q0"]}
    [[instance]] = batches_of_instances([batch], MediaBudget())
    assert instance == {"text": "a cat", "instruction": "Find a picture."}


def test_a_video_is_sampled_at_the_budgets_rate(embedder):
    """A stand-in for torchcodec's decoder: 8 seconds at 4 frames a second."""
    frames = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8)
    decoder = SimpleNamespace(
        metadata=SimpleNamespace(num_frames=32, average_fps=4.0),
        get_frames_at=lambda indices: SimpleNamespace(data=frames[indices]),
    )
    [[instance]] = batches_of_instances([{"video": [decoder]}], embedder.budget)
    whole = Clip(frames.permute(0, 2, 3, 1).numpy(), fps=4.0)
    assert len(instance["video"].frames) == 8 and instance["video"].fps == 1.0
    theirs, ours = embedder.collate([instance]), embedder.collate([{"video": whole}])
    assert torch.equal(theirs["visuals"][0].pixel_values, ours["visuals"][0].pixel_values)
    [[tensor]] = batches_of_instances([{"video": [frames[:4]]}], embedder.budget)
    assert tensor["video"].fps == embedder.budget.fps and tensor["video"].frames.shape == (4, 64, 64, 3)
