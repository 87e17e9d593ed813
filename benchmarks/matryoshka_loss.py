"""InfoNCE at six prefixes, forward and backward, against MatryoshkaLoss over MultipleNegativesRankingLoss.

    python benchmarks/matryoshka_loss.py

Both get the same random embeddings of a batch of 1024 and compute the terms query-document, query-query and
document-document in one softmax. Ours also masks false negatives by margin and by id, which theirs does not.
"""

import argparse

import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from side_by_side import ratio, seconds_of, write
from torch import Tensor, nn

from q3vl_mini.prefix_info_nce import prefix_info_nce

DIMS = (1024, 512, 256, 128, 64, 32)
TEMPERATURE = 0.05


class Given(nn.Module):
    """Stands for a SentenceTransformer whose embeddings are there already."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return DIMS[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    topic = torch.randn(options.batch, DIMS[0])
    start = {name: topic + 2 * torch.randn_like(topic) for name in ("queries", "documents")}
    ids = torch.arange(options.batch)

    terms = ("query_to_doc", "query_to_query", "doc_to_doc")
    inner = MultipleNegativesRankingLoss(Given(), scale=1 / TEMPERATURE, directions=terms)
    inner.model = model = Given()
    theirs = MatryoshkaLoss(model, inner, list(DIMS))

    def gradients(loss) -> tuple[Tensor, ...]:
        leaves = {name: x.clone().requires_grad_() for name, x in start.items()}
        value = loss(**leaves)
        value.backward()
        return value.detach(), *(x.grad for x in leaves.values())

    def ours(margin: float = 0.1):
        constants = {"temperature": TEMPERATURE, "margin": margin, "document_ids": ids}
        return lambda **x: prefix_info_nce(**x, **constants, dims=DIMS)

    def peer(queries: Tensor, documents: Tensor) -> Tensor:
        return theirs([{"sentence_embedding": x} for x in (queries, documents)], None)

    differences = [(a - b).abs().max().item() for a, b in zip(gradients(ours(2.0)), gradients(peer), strict=True)]
    seconds = seconds_of({"ours": lambda: gradients(ours()), "peer": lambda: gradients(peer)}, options.rounds)
    write(
        "matryoshka_loss",
        f"batch {options.batch}, {len(DIMS)} prefixes {DIMS}, three terms, forward and backward",
        [ratio("sentence-transformers over ours, time", seconds["peer"], seconds["ours"], "at least", 2)],
        largest_difference_without_margin=max(differences),
    )


if __name__ == "__main__":
    main()
