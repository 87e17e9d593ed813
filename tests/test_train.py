"""The training loop, its objectives, the gradient cache and several processes, on a small random checkpoint."""

import json
import sys
import weakref
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from two_processes import run_in_two_processes

from q3vl_mini import backbone, train
from q3vl_mini.compression import Quantizers, truncate
from q3vl_mini.config import StageConfig
from q3vl_mini.data import Batch, load_quadruple, mixed_batches, save_batch
from q3vl_mini.embedder import Embedder
from q3vl_mini.forward import VisualStore
from q3vl_mini.losses import classification_loss, cosent_loss, distillation_loss, info_nce, yes_no_loss
from q3vl_mini.records import Quadruple, Relevance
from q3vl_mini.reranker import Reranker

WORDS = "red cat green apple blue dog white horse small tree old house new car tall ship".split()
STAGE = StageConfig(steps=6, batch_size=4, n_negatives=2, lr=5e-3, quantizer_lr=1e-4, checkpoint_every=2)
ALL_TERMS = ("query_document", "query_query", "document_document")


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def text_task(task="text_ret", n=8, scores=False):
    queries = [{"text": f"{WORDS[i]} {WORDS[(3 * i + 1) % 16]}"} for i in range(n)]
    corpus = [{"text": f"{WORDS[(i + 5) % 16]} {i}"} for i in range(n)]
    relevance = [
        Relevance((i,), scores=(i / n,)) if scores else Relevance((i,), tuple((i + k) % n for k in range(1, 2 + i % 2)))
        for i in range(n)
    ]
    return Quadruple(f"fake {task}", task, "Find the text.", queries, corpus, relevance)


def image_task(n=6):
    corpus = [{"image": picture(i)} for i in range(n)]
    relevance = [Relevance((i,), ((i + 1) % n,)) for i in range(n)]
    queries = [{"text": f"picture of {word}"} for word in WORDS[:n]]
    return Quadruple("fake image_ret", "image_ret", "Find the picture.", queries, corpus, relevance)


def embedder(checkpoint, kind=Embedder):
    torch.manual_seed(0)
    loaded = backbone.load(checkpoint)
    loaded.model = backbone.add_lora(loaded.model, 4, 4)
    return kind.from_backbone(loaded, template="report", store=VisualStore())


def encode_with(model):
    return lambda rows, instruction: model(model.collate(rows, instruction))


def stream(quadruples, stage, teacher=None):
    return lambda start: mixed_batches(
        quadruples,
        batch_size=stage.batch_size,
        n_negatives=stage.n_negatives,
        steps=stage.steps * stage.accumulate,
        seed=0,
        start=start,
        teacher=teacher,
    )


def first_batch(quadruple, stage=STAGE, teacher=None):
    return next(iter(stream([quadruple], stage, teacher)(0)))


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, loss_on_batch, batch, max_tokens=0, again=False):
    """As the whole batch gives them, or in parts of max_tokens: with a gradient cache, or embedded again."""
    model.zero_grad()
    encode, replay = encode_with(model), lambda: None
    if again:
        encode = train.embed_again(model, max_tokens)
    elif max_tokens:
        encode, replay = train.gradient_cache(model, max_tokens)
    loss = loss_on_batch(encode, batch)
    loss.backward()
    replay()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_loss(stage=STAGE):
    return partial(train.embedding_loss, stage=stage, dims=[64])


def test_the_loss_falls_and_only_lora_and_quantiser_steps_change(small_checkpoint, tmp_path):
    model, quantizers = embedder(small_checkpoint), Quantizers([64, 32])
    stage = replace(STAGE, steps=60, checkpoint_every=100)
    loss = partial(
        train.embedding_loss,
        stage=stage,
        dims=[64, 32],
        quantizers=quantizers,
        quantizer_weights={"int8": 0.5, "binary": 0.5},
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = train.fit(
        model,
        loss,
        stream([text_task(), image_task()], stage),
        stage,
        tmp_path,
        quantizers=quantizers,
        progress=False,
    )
    assert np.mean([r["loss"] for r in log[-8:]]) < 0.7 * np.mean([r["loss"] for r in log[:8]])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name for name in before if "lora_" in name} == changed
    fresh = Quantizers([64, 32])
    fresh.train()
    batch = first_batch(text_task(), stage)
    with torch.no_grad():
        fresh(encode_with(embedder(small_checkpoint))(batch.queries, batch.instruction), 64, "int8")
    assert quantizers.of(64, "int8").step.item() != fresh.of(64, "int8").step.item()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == log and set(rows[0]) == {"step", "loss", "lr", "grad_norm", "seconds", "data"}
    assert {name for row in rows for name in row["data"]} == {"fake text_ret", "fake image_ret"}


def test_an_interrupted_run_ends_with_the_same_bits(small_checkpoint, tmp_path):
    def run(folder, stops):
        for stop in stops:
            model, quantizers = embedder(small_checkpoint), Quantizers([64])
            loss = partial(plain_loss(), quantizers=quantizers, quantizer_weights={"int8": 1.0})
            batches = stream([text_task(), image_task()], STAGE)
            options = {"quantizers": quantizers, "progress": False, "stop_after": stop}
            log = train.fit(model, loss, batches, STAGE, folder, **options)
        return trainable(model), quantizers.state_dict(), log

    whole, interrupted = run(tmp_path / "whole", [None]), run(tmp_path / "parts", [3, 4, None])
    assert [r["step"] for r in interrupted[2]] == list(range(1, 7))
    assert [(r["loss"], r["lr"], r["grad_norm"]) for r in whole[2]] == [
        (r["loss"], r["lr"], r["grad_norm"]) for r in interrupted[2]
    ]
    for a, b in zip(whole[:2], interrupted[:2], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = run(tmp_path / "shorter", [4])  # the comparison can fail
    assert any(not torch.equal(whole[0][name], other[0][name]) for name in whole[0])


class Toy(torch.nn.Module):
    """A model of whole numbers, exact in float64: a number to a unit vector, a pair of numbers to a margin."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(30, 8).double(), torch.nn.Linear(8, 6).double()

    def collate(self, rows, instruction):
        ids = torch.tensor(rows).view(len(rows), -1)
        kinds = {"mm_token_type_ids": torch.zeros_like(ids), "visuals": []}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}

    def forward(self, inputs):
        vectors = F.normalize(self.layer(self.table(inputs["input_ids"]).tanh()), dim=-1)  # (N, 1 or 2, 6)
        return vectors[:, 0] if vectors.shape[1] == 1 else 3 * (vectors[:, 0] * vectors[:, 1]).sum(-1)


def toy_batch(task="text_ret"):
    positives, negatives = [10, 11, 12, 13, 14, 10], [[20, 21], [22], [], [23, 24], [11], [25]]
    teacher = [[float(row - k) for k in range(1 + len(own))] for row, own in enumerate(negatives)]
    grades = [0.1, 0.9, 0.9, 0.4, 0.1, 0.5]
    return Batch("toy", task, "Find it.", list(range(6)), positives, negatives, positives, negatives, grades, teacher)


def toy_loss(task="text_ret", **changes):
    stage = replace(STAGE, terms=(*ALL_TERMS, "others_negatives"), loss_per_task=task != "text_ret", **changes)
    quantised = {"quantizers": Quantizers([6, 3]), "quantizer_weights": {"int8": 0.5, "binary": 0.5}}
    return partial(train.embedding_loss, stage=stage, dims=[6, 3], **quantised), toy_batch(task)


OBJECTIVES = {
    "info_nce": lambda: (toy_loss()[0], replace(toy_batch(), scores=None)),
    "classification": lambda: toy_loss("image_cls"),
    "cosent": lambda: toy_loss("sts"),
    "distillation": lambda: (partial(train.distillation_step, stage=STAGE, dims=[6, 3]), toy_batch()),
    "reranker": lambda: (train.reranker_step, toy_batch()),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("max_tokens", [1, 4, 100])
def test_the_gradient_cache_is_exact_for_every_objective(objective, max_tokens):
    loss_on_batch, batch = OBJECTIVES[objective]()
    loss, whole = gradients(Toy(), loss_on_batch, batch)
    cached_loss, cached = gradients(Toy(), loss_on_batch, batch, max_tokens)
    assert cached_loss == pytest.approx(loss, rel=1e-12) and whole.keys() == cached.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-10, atol=1e-12)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 60, 100_000])  # parts of one row, of a few, and all rows at once
def test_a_batch_in_parts_gives_the_gradients_of_the_whole_batch(small_checkpoint, max_tokens, again):
    model, stage = embedder(small_checkpoint), replace(STAGE, terms=ALL_TERMS, batch_size=6)
    with torch.no_grad():  # B starts at zero, which would hide A's gradients
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    batch = first_batch(image_task(), stage)
    loss, plain = gradients(model, plain_loss(stage), batch)
    cached_loss, cached = gradients(model, plain_loss(stage), batch, max_tokens, again)
    assert loss == pytest.approx(cached_loss, rel=1e-5) and plain.keys() == cached.keys()
    scale = max(g.abs().max() for g in plain.values())
    assert scale > 1e-3
    assert all(torch.allclose(plain[n], cached[n], atol=1e-4 * scale, rtol=1e-3) for n in plain)


def test_parts_that_are_embedded_again_keep_nothing_between_their_forwards(small_checkpoint):
    model, batch, alive = embedder(small_checkpoint), first_batch(text_task()), []

    def forward(part):
        states = torch.ones(len(part["input_ids"]), 64, requires_grad=True) * 2.0
        alive.append(weakref.ref(states))
        return model(part) + 0 * states.square()  # square keeps what it squares, for backward

    vectors = train.embed_again(model, 1, forward)(batch.queries, None)
    assert len(alive) == len(batch.queries) > 1 and not any(ref() is not None for ref in alive)
    vectors.sum().backward()
    assert len(alive) == 2 * len(batch.queries)  # each once more


def test_a_cache_without_its_replay_leaves_the_weights_without_gradients(small_checkpoint):
    model, batch = embedder(small_checkpoint), first_batch(text_task())
    encode, _ = train.gradient_cache(model, 1)
    plain_loss()(encode, batch).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task", ["image_cls", "text_cls", "video_cls"])
def test_classification_contrasts_a_label_with_its_own_wrong_labels_only(small_checkpoint, task):
    model, stage = embedder(small_checkpoint), replace(STAGE, loss_per_task=True)
    batch = first_batch(text_task(task), stage)
    encode = encode_with(model)
    found = plain_loss(stage)(encode, batch).item()
    q = encode(batch.queries, batch.instruction)
    rows = []
    for i, (positive, negatives) in enumerate(zip(batch.positives, batch.negatives, strict=True)):
        scores = encode([positive, *negatives], None) @ q[i] / stage.temperature
        rows.append(-scores.log_softmax(0)[0])
    assert found == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)
    assert train.loss_of(batch.task, stage) is classification_loss
    assert found != pytest.approx(plain_loss(replace(stage, loss_per_task=False))(encode, batch).item(), rel=1e-3)


def test_graded_pairs_get_cosent_at_every_prefix(small_checkpoint):
    model, stage = embedder(small_checkpoint), replace(STAGE, loss_per_task=True)
    batch, encode = first_batch(text_task("sts", scores=True), stage), encode_with(model)
    found = train.embedding_loss(encode, batch, stage, dims=[64, 16], dim_weights=[1.0, 0.5]).item()
    q, d, scores = encode(batch.queries, batch.instruction), encode(batch.positives, None), torch.tensor(batch.scores)
    parts = [cosent_loss(truncate(q, k), truncate(d, k), scores, temperature=stage.temperature) for k in (64, 16)]
    assert found == pytest.approx((parts[0] + 0.5 * parts[1]).item(), rel=1e-4)


def test_graded_pairs_are_refused_where_infonce_would_pull_unlike_texts_together(small_checkpoint):
    batch = first_batch(text_task("sts", scores=True))
    with pytest.raises(ValueError, match="fake sts has graded pairs"):
        plain_loss()(encode_with(embedder(small_checkpoint)), batch)


@pytest.mark.parametrize("terms", [ALL_TERMS, ("query_document",), ("query_document", "others_negatives")])
def test_other_tasks_get_infonce_with_the_terms_of_the_stage(small_checkpoint, terms):
    model, stage = embedder(small_checkpoint), replace(STAGE, loss_per_task=True, terms=terms)
    batch, encode = first_batch(text_task(), stage), encode_with(model)
    q, d = encode(batch.queries, batch.instruction), encode(batch.positives, None)
    negatives = torch.zeros(len(q), 2, 64)
    mask = torch.zeros(len(q), 2, dtype=torch.bool)
    for i, documents in enumerate(batch.negatives):
        for k, document in enumerate(documents):
            negatives[i, k], mask[i, k] = encode([document], None)[0], True
    ids = [(batch.negative_ids[i] + [-1, -1])[:2] for i in range(len(q))]
    expected = info_nce(
        q,
        d,
        negatives,
        negatives_mask=mask,
        document_ids=torch.tensor(batch.positive_ids),
        negative_ids=torch.tensor(ids),
        temperature=stage.temperature,
        query_query="query_query" in terms,
        document_document="document_document" in terms,
        others_negatives="others_negatives" in terms,
    )
    assert plain_loss(stage)(encode, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert mask.any() and not mask.all()  # the lists are ragged


def test_masks_may_be_those_of_the_whole_embedding_at_every_prefix(small_checkpoint):
    """A loop over rows and terms: what is left out is judged by all 64 numbers, the loss is of the first 8."""
    stage = replace(STAGE, terms=("query_document", "query_query"), margin=-0.02, n_negatives=0, temperature=0.1)
    batch, encode = first_batch(text_task(), stage), encode_with(embedder(small_checkpoint))
    q, d = encode(batch.queries, batch.instruction).double(), encode(batch.positives, None).double()

    def cosine(a, b, dim):
        return torch.cosine_similarity(a[:dim], b[:dim], dim=0)

    losses, left_out = {"each": 0.0, "whole": 0.0}, set()
    for masks_of, judged in (("each", 8), ("whole", 64)):
        for i in range(len(q)):
            terms = [cosine(q[i], d[i], 8)]
            for j in (j for j in range(len(q)) if batch.positive_ids[j] != batch.positive_ids[i]):
                for other in (d[j], q[j]):
                    if cosine(q[i], other, judged) <= cosine(q[i], d[i], judged) + stage.margin:
                        terms.append(cosine(q[i], other, 8))
                    else:
                        left_out.add(masks_of)
            losses[masks_of] -= (terms[0] / 0.1 - torch.logsumexp(torch.stack(terms) / 0.1, 0)).item() / len(q)
    assert left_out == {"each", "whole"} and losses["each"] != pytest.approx(losses["whole"], rel=1e-3)
    for masks_of, expected in losses.items():
        found = train.embedding_loss(encode, batch, replace(stage, masks_of=masks_of), dims=[8])
        assert found.item() == pytest.approx(expected, rel=1e-4), masks_of


def test_distillation_follows_the_teacher_logits_of_the_batch(small_checkpoint):
    task = text_task()
    teacher = {task.name: {i: {d: float(i - d) for d in (i, *r.negatives)} for i, r in enumerate(task.relevance)}}
    batch, encode = first_batch(task, teacher=teacher), encode_with(embedder(small_checkpoint))
    found = train.distillation_step(encode, batch, STAGE, dims=[64]).item()
    rows = []
    for query, positive, negatives, logits in zip(
        batch.queries, batch.positives, batch.negatives, batch.teacher, strict=True
    ):
        q, c = encode([query], batch.instruction), encode([positive, *negatives], None)
        rows.append(distillation_loss(q, c[None], torch.tensor([logits]), temperature=STAGE.temperature))
    assert found == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="no teacher logits"):
        train.distillation_step(encode, first_batch(task), STAGE, dims=[64])


def test_the_reranker_learns_yes_for_positives_and_no_for_negatives(small_checkpoint, tmp_path):
    model, stage = embedder(small_checkpoint, Reranker), replace(STAGE, steps=12)
    batch, encode = first_batch(text_task(), stage), encode_with(model)
    losses = []
    for query, positive, negatives in zip(batch.queries, batch.positives, batch.negatives, strict=True):
        for document, label in [(positive, 1), *((d, 0) for d in negatives)]:
            losses.append(yes_no_loss(encode([(query, document)], batch.instruction), torch.tensor([label])))
    assert train.reranker_step(encode, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    log = train.fit(model, train.reranker_step, stream([text_task()], stage), stage, tmp_path, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_reranker_counts_each_pair_once_whichever_process_has_it(monkeypatch):
    encode, batch = encode_with(Toy()), toy_batch()
    shares = [train.share_of(batch, rank, 2) for rank in (0, 1)]
    counts = [float(len(share.queries) + sum(map(len, share.negatives))) for share in shares]
    joint = train.reranker_step(encode, batch)
    monkeypatch.setattr(train, "gather", lambda x: torch.tensor(counts))
    parts = [train.reranker_step(encode, share) for share in shares]
    torch.testing.assert_close(torch.stack(parts).mean(), joint)
    plain = [part * sum(counts) / 2 / count for part, count in zip(parts, counts, strict=True)]
    assert not torch.isclose(torch.stack(plain).mean(), joint)  # the wrong variant: a mean of means


def test_negatives_drawn_at_random_are_gathered_like_mined_ones():
    encode, batch = encode_with(Toy()), replace(toy_batch(), scores=None)  # up to two negatives a query
    losses = [toy_loss(n_negatives=n, n_random=2 - n)[0](encode, batch) for n in (2, 1)]
    torch.testing.assert_close(*losses)


def test_a_document_that_occurs_twice_in_a_batch_is_embedded_once(small_checkpoint):
    task = text_task()
    task = replace(task, relevance=[Relevance((0,), (1,)) for _ in task.queries])
    seen = []

    def encode(rows, instruction):
        seen.append(len(rows))
        return torch.randn(len(rows), 4)

    documents, negatives, mask, ids = train.encode_documents(encode, first_batch(task))
    assert seen == [2] and torch.equal(documents[0], documents[3]) and torch.equal(negatives[0], negatives[3])
    assert mask.all() and ids.tolist() == [[1]] * 4 and not torch.equal(documents[0], negatives[0, 0])


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_batch(small_checkpoint, tmp_path):
    model = embedder(small_checkpoint)
    before = trainable(model)

    def loss(encode, batch):
        return plain_loss()(encode, batch) * float("nan")

    with pytest.raises(FloatingPointError, match="step 0: the loss of fake text_ret") as stopped:
        train.fit(model, loss, stream([text_task()], STAGE), STAGE, tmp_path, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert f"{tmp_path}/batch-0-0: q3vl_mini.data.load_quadruple(folder) reads it" in str(stopped.value)


def test_the_batch_that_stopped_a_training_can_be_looked_at(tmp_path):
    shown = {"image": 0, "text": 0}
    for task in (image_task(), text_task(), text_task("sts", scores=True)):
        batch = first_batch(task)
        save_batch(batch, tmp_path / "batch")
        kept = load_quadruple(tmp_path / "batch")
        about = (kept.name, kept.task, kept.instruction, len(kept))
        assert about == (task.name, task.task, task.instruction, len(batch.queries))
        for i, labels in enumerate(kept.relevance):
            assert kept.queries[i] == batch.queries[i]
            assert [kept.meta["corpus_rows"][d] for d in labels.positives] == [batch.positive_ids[i]]
            assert [kept.meta["corpus_rows"][d] for d in labels.negatives] == batch.negative_ids[i]
            assert labels.scores == (None if batch.scores is None else (batch.scores[i],))
            for kind in kept.corpus[labels.positives[0]]:
                one, other = kept.corpus[labels.positives[0]][kind], batch.positives[i][kind]
                assert one == other if kind == "text" else np.array_equal(np.asarray(one), np.asarray(other))
                shown[kind] += 1
    assert all(shown.values())


def test_a_gradient_that_is_not_a_number_stops_the_run_and_keeps_every_batch_of_the_step(small_checkpoint, tmp_path):
    model, stage = embedder(small_checkpoint), replace(STAGE, accumulate=2)
    before = trainable(model)

    def loss(encode, batch):
        value = plain_loss()(encode, batch)
        value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    with pytest.raises(FloatingPointError, match="step 0: the gradient of .* is nan.*batch-0-0, .*batch-0-1"):
        train.fit(model, loss, stream([text_task()], stage), stage, tmp_path, progress=False)
    assert all(len(load_quadruple(tmp_path / f"batch-0-{i}")) == 4 for i in (0, 1))
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_a_loss_that_explodes_stops_the_run_while_it_is_still_a_number(small_checkpoint, tmp_path):
    steps = iter(range(10))

    def loss(encode, batch):
        return plain_loss()(encode, batch) * (1, 500, 5000)[next(steps)]  # the first losses are above 1

    with pytest.raises(FloatingPointError, match=r"step 2: the loss of fake text_ret .* is \d+\.\d+; .*batch-2-0"):
        train.fit(embedder(small_checkpoint), loss, stream([text_task()], STAGE), STAGE, tmp_path, progress=False)
    log = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and log[1]["loss"] > 100 * log[0]["loss"]


class ScaledAccelerator(Accelerator):
    """Loss scaling as with float16 on a GPU; the CPU computes in float32, so only a large scale makes it overflow."""

    mixed_precision = "fp16"

    def __init__(self, scale):
        super().__init__(cpu=True)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def test_a_step_whose_scaled_gradient_overflows_is_left_out_and_training_goes_on(small_checkpoint, tmp_path):
    def run(folder, scale, stops=(None,)):
        for stop in stops:
            model = embedder(small_checkpoint)
            options = {"accelerator": ScaledAccelerator(scale), "progress": False, "stop_after": stop}
            log = train.fit(model, plain_loss(), stream([text_task()], STAGE), STAGE, folder, **options)
        return log, trainable(model), options["accelerator"].scaler.get_scale()

    fresh = trainable(embedder(small_checkpoint))
    log, weights, scale = run(tmp_path / "over", 2.0**122)
    left_out = [row["grad_norm"] is None for row in log]
    assert 0 < sum(left_out) < 6 and left_out == sorted(left_out, reverse=True)  # the first ones, until it is halved
    assert scale == 2.0 ** (122 - sum(left_out))
    assert any(not torch.equal(weights[name], fresh[name]) for name in fresh)
    assert all(torch.isfinite(p).all() for p in weights.values())
    # the scale is part of the checkpoint
    again, same, _ = run(tmp_path / "cut", 2.0**122, stops=(1, 3, None))
    assert [row["grad_norm"] for row in again] == [row["grad_norm"] for row in log]
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    # without an overflow the scale changes nothing
    plain = embedder(small_checkpoint)
    train.fit(plain, plain_loss(), stream([text_task()], STAGE), STAGE, tmp_path / "plain", progress=False)
    _, scaled, _ = run(tmp_path / "scaled", 2.0**10)
    assert all(torch.allclose(p, scaled[name], atol=1e-5) for name, p in trainable(plain).items())


def test_a_gradient_that_overflows_at_every_scale_stops_the_run(small_checkpoint, tmp_path):
    def loss(encode, batch):
        value = plain_loss()(encode, batch)
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    model, options = embedder(small_checkpoint), {"accelerator": ScaledAccelerator(8.0), "progress": False}
    stage = replace(STAGE, steps=20)
    with pytest.raises(FloatingPointError, match="step 4: the gradient .* compute in bfloat16 or float32"):
        train.fit(model, loss, stream([text_task()], stage), stage, tmp_path, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_that_is_full_for_a_while_does_not_change_the_weights(small_checkpoint, tmp_path):
    import resource

    def run(folder, **options):
        model = embedder(small_checkpoint)
        train.fit(model, plain_loss(), stream([text_task()], STAGE), STAGE, folder, progress=False, **options)
        return trainable(model)

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_after=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cut/state cannot be written .*free space"):
            run(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    weights = run(tmp_path / "cut")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_not_the_result(small_checkpoint, tmp_path):
    def run(folder, **options):
        model = embedder(small_checkpoint)
        log = train.fit(model, plain_loss(), stream([text_task()], STAGE), STAGE, folder, progress=False, **options)
        return trainable(model), [row["loss"] for row in log]

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_after=5)
    file = tmp_path / "cut/state/state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="state.safetensors cannot be used.*the checkpoint before it"):
        weights, losses = run(tmp_path / "cut")
    assert losses == whole[1] and all(torch.equal(weights[name], whole[0][name]) for name in weights)


def test_accumulated_batches_have_the_mean_of_their_gradients(small_checkpoint, tmp_path):
    stage = replace(STAGE, steps=1, accumulate=2, clip=1e9)
    model, quadruples = embedder(small_checkpoint), [text_task(), image_task()]
    batches = list(islice(stream(quadruples, stage)(0), 2))
    parts = [gradients(model, plain_loss(stage), batch)[1] for batch in batches]
    norm = torch.stack([((parts[0][n] + parts[1][n]) / 2).square().sum() for n in parts[0]]).sum().sqrt().item()
    model.zero_grad()
    [row] = train.fit(model, plain_loss(stage), stream(quadruples, stage), stage, tmp_path, progress=False)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and len(row["data"]) == 2


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    shares = [train.rate(step, 110, 10 / 110) for step in range(110)]
    assert shares[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert shares[10] == 1 and shares[60] == pytest.approx(0.5) and 0 < shares[109] < 0.001


JOINT = replace(STAGE, terms=(*ALL_TERMS, "others_negatives"), steps=3, loss_per_task=True)


def fit_on_two_tasks(checkpoint, folder, accelerator=None, stage=JOINT, **more):
    model, quantizers = embedder(checkpoint), Quantizers([64])
    loss = partial(plain_loss(stage), quantizers=quantizers, quantizer_weights={"int8": 1.0})
    batches = stream([text_task(), text_task("sts", scores=True)], stage)
    options = {"quantizers": quantizers, "accelerator": accelerator, "progress": False, **more}
    log = train.fit(model, loss, batches, stage, folder, **options)
    return log, trainable(model)


def own_part_only(ctx, gradient):
    return gradient.chunk(2)[torch.distributed.get_rank()]


def worker(rank, checkpoint, folder):
    accelerator = Accelerator(cpu=True)
    log, weights = fit_on_two_tasks(checkpoint, f"{folder}/right", accelerator)
    cached, _ = fit_on_two_tasks(checkpoint, f"{folder}/cached", accelerator, replace(JOINT, chunk_tokens=1))
    train._Gather.backward = staticmethod(own_part_only)
    wrong, _ = fit_on_two_tasks(checkpoint, f"{folder}/wrong", accelerator)
    torch.save(weights, f"{folder}/weights{rank}.pt")
    if rank == 0:
        with open(f"{folder}/logs.json", "w") as file:
            json.dump([log, cached, wrong], file)


def test_two_processes_train_like_one(small_checkpoint, tmp_path):
    run_in_two_processes(worker, str(small_checkpoint), str(tmp_path))
    one, _ = fit_on_two_tasks(small_checkpoint, tmp_path / "one")
    two, cached, wrong = json.loads((tmp_path / "logs.json").read_text())
    assert {name for row in one for name in row["data"]} == {"fake text_ret", "fake sts"}
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=5e-3)
        assert [row[key] for row in cached] == pytest.approx([row[key] for row in two], rel=5e-3)
    weights = [torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # a gather whose backward forgets what the other process's loss says about these rows
    assert wrong[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert wrong[0]["grad_norm"] != pytest.approx(one[0]["grad_norm"], rel=0.05)
