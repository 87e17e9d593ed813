"""What Emoji World draws for a seed, as two digests a task: of words and labels, and of pixels.

Besides the tasks it does so for the two kinds of turns that Q3VL-tiny is pre-trained on.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from q3vl_mini.emoji_world import sprites, tasks
from q3vl_mini.emoji_world.bank import SpriteBank
from q3vl_mini.emoji_world.dialogues import dialogues, short_turns
from q3vl_mini.records import Instance

TURNS = ("short_turns", "dialogues")


def digests(rows: int, names: Iterable[str] | None = None) -> dict[str, tuple[str, str]]:
    """{task: (of texts and labels, of pixels)}."""
    found = {}
    for name in names or [*tasks.TASKS, *TURNS]:
        words, pixels = hashlib.sha256(), hashlib.sha256()
        for labels, instances in turns(name, 10 * rows) if name in TURNS else quadruples(name, rows):
            words.update(repr(labels).encode())
            for instance in instances:
                words.update(repr(instance.get("text")).encode())
                for visual in visuals(instance):
                    drawn = visual.render() if hasattr(visual, "render") else visual
                    pixels.update(np.asarray(getattr(drawn, "frames", drawn)).tobytes())
        found[name] = words.hexdigest(), pixels.hexdigest()
    return found


def quadruples(name: str, rows: int) -> Iterator[tuple[Any, list[Instance]]]:
    """Instruction and labels, and the first instances, of a task in each of its splits."""
    for split in ("train", "test") if name != "unseen_languages" else ("test",):
        quadruple = tasks.build(name, split, rows, 0)
        yield (quadruple.instruction, quadruple.relevance), [*quadruple.queries, *quadruple.corpus[:rows]]


def turns(name: str, n: int) -> Iterator[tuple[Any, list[Instance]]]:
    """Kind, answer and system message, and question and document, of each turn of a kind."""
    if name == "dialogues":
        made = dialogues(n, 0, share_judged=0.25)
    else:
        bank = SpriteBank(sprites.TRAIN_STYLES[:2], tasks.World("train", name, 0).keys[:20], houses=1)
        made = short_turns(bank, n, 0, strength=1.0)
    for turn in made:
        yield (turn.kind, turn.answer, turn.system), [turn.question, turn.document or {}]


def visuals(instance: Instance) -> Iterator[Any]:
    """Pictures, then clips."""
    for kind in ("image", "video"):
        value = instance.get(kind)
        yield from value if isinstance(value, list) else [value] if value is not None else []


if __name__ == "__main__":
    for name, (words, pixels) in digests(int(sys.argv[1]), sys.argv[2:]).items():
        print(name, words, pixels)
