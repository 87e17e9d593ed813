"""What Emoji World draws for a seed, as two digests a task: of words and labels, and of pixels."""

import hashlib
import sys

import numpy as np

from q3vl_mini.emoji_world import tasks


def digests(rows: int, names=None) -> dict[str, tuple[str, str]]:
    """{task: (of texts and labels, of pixels)}."""
    found = {}
    for name in names or tasks.TASKS:
        words, pixels = hashlib.sha256(), hashlib.sha256()
        for split in ("train", "test") if name != "unseen_languages" else ("test",):
            quadruple = tasks.build(name, split, rows, 0)
            words.update(repr((quadruple.instruction, quadruple.relevance)).encode())
            for instance in [*quadruple.queries, *quadruple.corpus[:rows]]:
                words.update(repr(instance.get("text")).encode())
                for kind in ("image", "video"):
                    value = instance.get(kind)
                    for visual in value if isinstance(value, list) else [value] if value is not None else []:
                        drawn = visual.render()
                        pixels.update(np.asarray(getattr(drawn, "frames", drawn)).tobytes())
        found[name] = words.hexdigest(), pixels.hexdigest()
    return found


if __name__ == "__main__":
    for name, (words, pixels) in digests(int(sys.argv[1]), sys.argv[2:]).items():
        print(name, words, pixels)
