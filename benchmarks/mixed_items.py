"""What embedder and reranker are timed on: texts of 3 to 150 words, pictures of 64 to 256 pixels, and both together."""

from typing import Any

import numpy as np

from q3vl_mini.emoji_world.tasks import build

WORDS, EDGES = (3, 10, 40, 150), (64, 96, 128, 192, 256)


def mixed_items(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Half of them texts, three tenths pictures (PIL, decoded), two tenths pictures with a text; in random order."""
    rng = np.random.default_rng(seed)
    drawn = build("text_to_image", "train", n, seed)
    words = " ".join(query["text"] for query in drawn.queries).split()

    def text() -> str:
        low, high = sorted(rng.choice(WORDS, 2, replace=False))
        start, length = rng.integers(len(words)), int(rng.integers(low, high + 1))
        return " ".join((words[start:] + words)[:length])

    def picture(i: int):
        return drawn.corpus[i]["image"].render().resize(tuple(int(edge) for edge in rng.choice(EDGES, 2)))

    items = []
    for i in range(n):
        kind = rng.random()
        item = {} if kind < 0.5 else {"image": picture(i % len(drawn.corpus))}
        items.append(item if 0.5 <= kind < 0.8 else {**item, "text": text()})
    return items
