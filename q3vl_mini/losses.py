"""Equations 1 to 5 of the report as pure functions of tensors; no loss knows about a model.

Notation: B queries on this process, N >= B in the whole batch (N = B on one process), K hard negatives a query,
D dimensions; s(a, b) is the cosine, tau the temperature. Embeddings need not be normalised. Half-precision inputs
are computed in float32, float64 stays float64; the result is a scalar in that precision.

Several processes: the trainer gathers, the losses take what it gathered (`all_*`, in rank order) and `offset`, the
row of the batch where this process's rows begin (rank * B). Gradients flow through the gathered tensors too: a
document is a positive here and a negative elsewhere. So gather with a differentiable operation, whose backward sums
over the processes, and average the parameters' gradients over them, as DDP does: with the same B everywhere, the
result is the gradient of one process with the joint batch. No further factor of the world size is needed.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of `a` with every row of `b`: (..., M, D) and (..., N, D) to (..., M, N).

    In float32 at least, whatever autocast says: two bf16 scores that differ by less than 0.004 are equal, and a
    temperature of 0.02 turns that into a factor of 1.2. An all-zero row has cosine 0 with everything.

    Taught in notebooks/04
    """
    a, b = (F.normalize(_at_least_float32(x), dim=-1) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def info_nce(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    margin: float = 0.1,
    negatives_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    all_queries: Tensor | None = None,
    all_documents: Tensor | None = None,
    all_document_ids: Tensor | None = None,
    all_negatives: Tensor | None = None,
    all_negatives_mask: Tensor | None = None,
    all_negative_ids: Tensor | None = None,
    offset: int = 0,
    query_document: bool = True,
    query_query: bool = True,
    document_document: bool = True,
    others_negatives: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """InfoNCE with masks against false negatives, equation 1: -1/B sum_i log(e^{s(q_i, d_i+)/tau} / Z_i).

    Z_i adds to the positive all that `info_nce_scores` returns, each term times its mask of `info_nce_masks`. The
    defaults are stage 1; stage 2 is `query_query=False, document_document=False`. The masks are constants for the
    gradient. A batch of one without negatives has nothing to tell apart: its loss and gradient are 0.

    Args:
        queries: (B, D). Row i belongs to row i of `documents`.
        documents: (B, D), the positives d_i+.
        negatives: (B, K, D), hard negatives; None or K = 0 for none.
        temperature: tau > 0; cosines are divided by it. A tensor may be learned.
        margin: a score above s(q_i, d_i+) + margin is taken for a false negative; math.inf masks none.
        negatives_mask: (B, K) bool, False for padding, whose content does not matter.
        document_ids: (B,) integers, equal for the same document; None compares no identities.
        negative_ids: (B, K) integers, likewise for the hard negatives.
        all_queries, all_documents, all_document_ids: (N, D), (N, D), (N,), gathered; None means one process.
        all_negatives, all_negatives_mask, all_negative_ids: (N, K, D), (N, K), (N, K), gathered, K padded to the
            largest; read only with `others_negatives`.
        offset: row i's own positive is `all_documents[offset + i]`.
        query_document, query_query, document_document: which in-batch terms enter Z_i.
        others_negatives: hard negatives of other queries enter Z_i too. (The report's "other in-batch documents"
            may be read so; the other positives alone are the default here.)
        masks: of `info_nce_masks` for other scores, such as those of the embeddings that these are prefixes of; margin
            and ids are then not read. None is those of the scores here, as in equation 1.

    Returns:
        A scalar, the mean over the B rows.

    Raises:
        ValueError: a shape, the temperature or the offset does not fit, or an `all_*` tensor is missing.

    >>> q, d = torch.eye(2), torch.eye(2)
    >>> info_nce(q, d, temperature=1.0).isclose(torch.log(torch.tensor(1 + 3 / math.e)))  # 3 terms at cosine 0
    tensor(True)

    Taught in notebooks/04
    """
    gathered = [(documents, all_documents), (document_ids, all_document_ids)]
    gathered += [(queries, all_queries)] if query_query else []
    others = [(negatives, all_negatives), (negatives_mask, all_negatives_mask), (negative_ids, all_negative_ids)]
    gathered += others if others_negatives else []
    check_info_nce(queries, documents, negatives, negatives_mask, temperature, gathered, offset)
    scores = info_nce_scores(
        queries,
        documents,
        without_padding(negatives, negatives_mask),
        all_queries=all_queries,
        all_documents=all_documents,
        all_negatives=without_padding(all_negatives, all_negatives_mask),
        query_document=query_document,
        query_query=query_query,
        document_document=document_document,
        others_negatives=others_negatives,
    )
    if masks is None:
        masks = info_nce_masks(
            scores,
            margin=margin,
            offset=offset,
            document_ids=document_ids,
            all_document_ids=all_document_ids,
            negatives_mask=negatives_mask,
            negative_ids=negative_ids,
            all_negatives_mask=all_negatives_mask,
            all_negative_ids=all_negative_ids,
        )
    # m * e^{s/tau} = e^{-inf} = 0 where the mask m is 0
    terms = [(scores[name] / temperature).masked_fill(~masks[name], -math.inf).flatten(1) for name in scores]
    log_z = torch.logsumexp(torch.cat(terms, dim=1), dim=1)  # (B,)
    return -(scores["positive"][:, 0] / temperature - log_z).mean()


def info_nce_scores(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    all_queries: Tensor | None = None,
    all_documents: Tensor | None = None,
    all_negatives: Tensor | None = None,
    query_document: bool = True,
    query_query: bool = True,
    document_document: bool = True,
    others_negatives: bool = False,
) -> dict[str, Tensor]:
    """The cosines in Z_i of equation 1, by block; row i of every block belongs to query i.

    "positive" (B, 1): s(q_i, d_i+). "hard_negative" (B, K): s(q_i, d-_ik). "query_document" (B, N): s(q_i, d_j).
    "query_query" (B, N): s(q_i, q_j). "document_document" (B, N): s(d_i+, d_j). "others_negative" (B, N, K):
    s(q_i, d-_jk). A block that is switched off is absent. Arguments as for `info_nce`.

    Taught in notebooks/04
    """
    all_queries = queries if all_queries is None else all_queries
    all_documents = documents if all_documents is None else all_documents
    all_negatives = negatives if all_negatives is None else all_negatives
    scores = {"positive": _own_scores(queries, documents[:, None])}
    if negatives is not None:
        scores["hard_negative"] = _own_scores(queries, negatives)
    if query_document:
        scores["query_document"] = cosine(queries, all_documents)
    if query_query:
        scores["query_query"] = cosine(queries, all_queries)
    if document_document:
        scores["document_document"] = cosine(documents, all_documents)
    if others_negatives and all_negatives is not None:
        others = cosine(queries, all_negatives.flatten(0, 1))  # (B, N * K)
        scores["others_negative"] = others.unflatten(1, all_negatives.shape[:2])
    return scores


def info_nce_masks(
    scores: dict[str, Tensor],
    *,
    margin: float = 0.1,
    offset: int = 0,
    document_ids: Tensor | None = None,
    all_document_ids: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    negative_ids: Tensor | None = None,
    all_negatives_mask: Tensor | None = None,
    all_negative_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The masks m of equation 1: True where a term enters Z_i, in the shapes of `info_nce_scores`.

    m = 0 if the term's score is above s(q_i, d_i+) + margin (a tie stays), if its document is d_i+ (equal ids), if
    j = i, or if it is padding. A query q_j is no document, and eq. 1 leaves open what equality means for it. Our
    reading: q_j is no negative of q_i if its positive is d_i+, for both then ask for the same document.

    Args:
        scores: what `info_nce_scores` returned; the other arguments as for `info_nce`.

    Taught in notebooks/04
    """
    all_document_ids = document_ids if all_document_ids is None else all_document_ids
    all_negatives_mask = negatives_mask if all_negatives_mask is None else all_negatives_mask
    all_negative_ids = negative_ids if all_negative_ids is None else all_negative_ids
    in_batch = dict.fromkeys(("query_document", "query_query", "document_document"), all_document_ids)
    ids = {"hard_negative": negative_ids, "others_negative": all_negative_ids, **in_batch}
    valid = {"hard_negative": negatives_mask, "others_negative": all_negatives_mask}

    positive = scores["positive"]  # (B, 1)
    own_row = offset + torch.arange(len(positive), device=positive.device)
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    for name in [block for block in scores if block != "positive"]:
        mask, per_row = masks[name], (-1, *[1] * (scores[name].ndim - 1))  # per_row: (B, 1) or (B, 1, 1)
        if margin < math.inf:
            mask &= ~(scores[name] > positive.reshape(per_row) + margin)
        if name != "hard_negative":  # in the others j runs over the batch, and j = i is no negative
            mask[own_row - offset, own_row] = False
        if valid.get(name) is not None:
            mask &= valid[name].bool()
        if document_ids is not None and ids[name] is not None:
            mask &= ids[name] != document_ids.reshape(per_row)
    return masks


def classification_loss(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    negatives_mask: Tensor | None = None,
    *,
    temperature: float | Tensor,
) -> Tensor:
    """Contrast of a label with the explicitly wrong labels of the same query (report, section 5).

    Equation 1 with nothing in Z_i but the positive and the query's own negatives, and no margin: other labels of the
    batch are ignored, because two queries often share one. A row without negatives adds 0.

    Args:
        queries: (B, D). documents: (B, D), the right labels. negatives: (B, K, D), the wrong ones.
        negatives_mask: (B, K) bool, False for padding.
        temperature: tau > 0.

    Taught in notebooks/05
    """
    _check_temperature(temperature)
    _check_batch(queries, documents, negatives, negatives_mask)
    right = _own_scores(queries, documents[:, None]) / temperature  # (B, 1)
    wrong = _own_scores(queries, without_padding(negatives, negatives_mask)) / temperature  # (B, K)
    if negatives_mask is not None:
        wrong = wrong.masked_fill(~negatives_mask.bool(), -math.inf)
    return -torch.cat([right, wrong], dim=1).log_softmax(dim=1)[:, 0].mean()


def cosent_loss(queries: Tensor, documents: Tensor, scores: Tensor, *, temperature: float | Tensor) -> Tensor:
    """CoSENT for graded similarity, equation 2: it ranks the pairs, and does not copy their scores.

    log(1 + sum of e^{(cos(q_m, d_m) - cos(q_i, d_i))/tau} over pairs with true score_i > score_m). Pairs with equal
    scores are not compared; if all are equal, or B = 1, the loss is 0. A sum, not a mean: it grows with B. Several
    processes: pass the gathered batch on each; averaged gradients are then those of the joint batch.

    Args:
        queries, documents: (B, D), the two sides of each pair. scores: (B,), true similarities on any scale.
        temperature: tau > 0.

    Taught in notebooks/05
    """
    _check_temperature(temperature)
    _check_batch(queries, documents)
    _check_shape("scores", scores, (len(queries),), "a true similarity a pair")
    cosines = _own_scores(queries, documents[:, None])[:, 0] / temperature  # (B,)
    differences = cosines[None, :] - cosines[:, None]  # (i, m): by how much pair m is above pair i
    wrongly_above = differences.masked_fill(scores[:, None] <= scores[None, :], -math.inf)
    return torch.logsumexp(F.pad(wrongly_above.flatten(), (1, 0)), dim=0)  # the padded 0 is the 1 in the log


def distillation_loss(
    queries: Tensor,
    candidates: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor,
    teacher_temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's candidates against the reranker's, equation 3.

    -1/B sum_i sum_k softmax(teacher_i / teacher_temperature)_k log softmax(cos(q_i, d_ik) / tau)_k. Its minimum is
    the teacher's entropy, not 0. No gradient reaches the teacher.

    Args:
        queries: (B, D). candidates: (B, 1 + K, D), the positive first.
        teacher_logits: (B, 1 + K), logit(yes) - logit(no) of the reranker.
        temperature, teacher_temperature: > 0, of student and teacher.
        mask: (B, 1 + K) bool, False for padding. The positive always counts.

    Taught in notebooks/11
    """
    _check_temperature(temperature)
    _check_temperature(teacher_temperature)
    _check_batch(queries, None, candidates, mask, name="candidates")
    _check_shape("teacher_logits", teacher_logits, candidates.shape[:2], "a logit a candidate")
    student = _own_scores(queries, without_padding(candidates, mask)) / temperature  # (B, 1 + K)
    teacher = teacher_logits.detach().to(student.dtype) / teacher_temperature
    if mask is not None:
        padding = ~mask.bool()
        padding[:, 0] = False
        student, teacher = (logits.masked_fill(padding, -math.inf) for logits in (student, teacher))
    log_student, teacher = student.log_softmax(dim=1), teacher.softmax(dim=1)
    if mask is not None:
        log_student = log_student.masked_fill(padding, 0.0)  # the teacher's 0 times -inf would be NaN
    return -(teacher * log_student).sum(dim=1).mean()


def yes_no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Equation 4 for the reranker, -log p(l | I, q, d), with p over the two tokens "yes" and "no" alone.

    Against `next_token_loss`, where p is over the whole vocabulary, it lacks the term -log(p(yes) + p(no)): it
    teaches which of the two, and spends nothing on teaching to answer with one of them.

    Args:
        logits: (B, 2), those of [no, yes], or (B,), the margin logit(yes) - logit(no).
        labels: (B,), 1 for relevant, 0 for not.

    Taught in notebooks/10
    """
    _check_shape("labels", labels, logits.shape[:1], "a label a pair")
    if logits.ndim > 2 or logits.shape[1:] not in ((), (2,)):
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (B, 2) [no, yes] or (B,) margins")
    logits = _at_least_float32(logits)
    margin = logits[:, 1] - logits[:, 0] if logits.ndim == 2 else logits
    return -F.logsigmoid(torch.where(labels.bool(), margin, -margin)).mean()


def next_token_loss(vocab_logits: Tensor, yes_id: int, no_id: int, labels: Tensor) -> Tensor:
    """Equation 4 to the letter: -log p(l | I, q, d), p over the whole vocabulary. See `yes_no_loss`.

    Args:
        vocab_logits: (B, V), at the last position. yes_id, no_id: the tokens' ids. labels: (B,), 1 for relevant.

    Taught in notebooks/10
    """
    _check_shape("labels", labels, vocab_logits.shape[:1], "a label a pair")
    return F.cross_entropy(_at_least_float32(vocab_logits), torch.where(labels.bool(), yes_id, no_id))


def relevance_score(margin: Tensor) -> Tensor:
    """Equation 5, sigmoid(logit(yes) - logit(no)): margins of any shape to relevance in [0, 1].

    Taught in notebooks/10
    """
    return torch.sigmoid(_at_least_float32(margin))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _own_scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Cosines of each query with its own candidates: (B, D) and (B, K, D) to (B, K)."""
    return cosine(queries[:, None], candidates)[:, 0]


def without_padding(negatives: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Zeros in padded slots: what lies there, NaN included, must reach neither score nor gradient."""
    if negatives is None or mask is None:
        return negatives
    return negatives.masked_fill(~mask.bool()[..., None], 0.0)


def check_info_nce(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    temperature: float | Tensor,
    gathered: list[tuple[Tensor | None, Tensor | None]],
    offset: int,
) -> None:
    """ValueError if the arguments of `info_nce` do not fit. gathered: tensors of this process and of the batch."""
    _check_temperature(temperature)
    _check_batch(queries, documents, negatives, negatives_mask)
    _check_gathered(gathered, offset)


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"the temperature is {temperature}; expected a positive number, such as 0.02")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}: {meaning}")


def _check_batch(queries, documents, negatives=None, negatives_mask=None, name="negatives") -> None:
    if queries.ndim != 2 or len(queries) == 0:
        raise ValueError(f"queries have shape {tuple(queries.shape)}; expected (B, D) with B >= 1 rows")
    if documents is not None:
        _check_shape("documents", documents, queries.shape, "the positive of each query, row by row")
    if negatives is not None:
        if negatives.ndim != 3 or negatives.shape[::2] != queries.shape:
            expected = f"({len(queries)}, K, {queries.shape[1]}); pad ragged rows and pass a mask"
            raise ValueError(f"{name} have shape {tuple(negatives.shape)}; expected {expected}")
        if negatives_mask is not None:
            _check_shape(f"the mask of {name}", negatives_mask, negatives.shape[:2], "False for padding")


def _check_gathered(parts: list[tuple[Tensor | None, Tensor | None]], offset: int) -> None:
    """Each part is a tensor of this process and its gathered whole; the first is the documents."""
    own, n = len(parts[0][0]), len(parts[0][0] if parts[0][1] is None else parts[0][1])
    rows = {len(part if whole is None else whole) for part, whole in parts if part is not None}
    if rows != {n}:
        raise ValueError(f"the batch has {n} documents, but its tensors {sorted(rows)} rows; give all of them as all_*")
    if not 0 <= offset <= n - own:
        raise ValueError(f"offset {offset} with {own} rows is outside the batch of {n} rows; it is rank * B")
