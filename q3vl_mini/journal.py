"""Work on many assets that may be stopped at any time: each result is written at once, and nothing is done twice."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .endpoint import NoAnswer
from .records import Rejected

NO_ANSWER = "no answer"  # the only reason for which an asset is worked on again in the next run
SILENT = 20  # assets in a row without an answer: the endpoint is down


@dataclass(frozen=True)
class Asset:
    """A picture or clip of the seed pool: an id that stays, "image" or "video", and any value that media reads."""

    id: str
    kind: str
    value: Any


class Journal:
    """What is known of the assets, step by step, in two files that are only ever appended to.

    answers: by step and asset. rejects: why an asset was left out, by step and asset. A last line that a kill cut off
    is dropped.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, dict[str, Any]] = {}
        self.rejects: dict[str, dict[str, str]] = {}
        for line in self._lines("answers.jsonl"):
            self.answers.setdefault(line["step"], {})[line["asset"]] = line["answer"]
        for line in self._lines("rejects.jsonl"):
            if line["reason"] != NO_ANSWER:
                self.rejects.setdefault(line["step"], {})[line["asset"]] = line["reason"]

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        file = self.folder / name
        if file.is_file():
            whole = file.read_bytes().rpartition(b"\n")[0]
            os.truncate(file, len(whole) + bool(whole))
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: not JSON ({error}); remove the line") from error

    def _append(self, name: str, **line: Any) -> None:
        with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def take(self, step: str, asset: str, answer: Any) -> None:
        """Keep what a step learned of an asset."""
        self._append("answers.jsonl", step=step, asset=asset, answer=answer)
        self.answers.setdefault(step, {})[asset] = answer

    def reject(self, step: str, asset: str, why: Rejected) -> None:
        """Leave an asset out."""
        self._append("rejects.jsonl", step=step, asset=asset, reason=why.reason, detail=why.detail)
        self.rejects.setdefault(step, {})[asset] = why.reason

    def left(self, step: str, assets: Iterable[Asset]) -> list[Asset]:
        """The assets about which a step has said nothing yet."""
        known = self.answers.get(step, {}).keys() | self.rejects.get(step, {}).keys()
        return [asset for asset in assets if asset.id not in known]

    def taken(self, step: str, assets: Iterable[Asset]) -> list[Asset]:
        """The assets that passed a step."""
        return [asset for asset in assets if asset.id in self.answers.get(step, {})]

    def report(self) -> dict[str, dict[str, int]]:
        """By step: how many assets passed, and how many were left out for which reason."""
        steps = dict.fromkeys([*self.answers, *self.rejects])
        return {
            step: {"passed": len(self.answers.get(step, {})), **Counter(self.rejects.get(step, {}).values())}
            for step in steps
        }


def for_each(
    step: str,
    assets: Sequence[Asset],
    work: Callable[[Asset], Any],
    journal: Journal,
    workers: int,
    progress: bool = True,
) -> list[Asset]:
    """Do `work` on the assets that a step has not seen, `workers` at a time; returns those that pass.

    What work returns is taken; Rejected and NoAnswer leave the asset out.

    Raises:
        ConnectionError: SILENT assets in a row without an answer. Whatever else `work` raises. Both after all that was
        finished is written.
    """
    todo, silent = journal.left(step, assets), 0
    waiting = iter(todo)
    running: dict[Future, Asset] = {}
    bar = tqdm(total=len(assets), initial=len(assets) - len(todo), desc=step, disable=not progress)
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(running) < 2 * workers and (asset := next(waiting, None)) is not None:
                running[pool.submit(work, asset)] = asset
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                silent = silent + 1 if _settle(step, running.pop(future), future, journal) else 0
                bar.update()
                bar.set_postfix(left_out=len(journal.rejects.get(step, {})))
                if silent == SILENT:
                    raise ConnectionError(
                        f"{step}: {SILENT} assets in a row got no answer ({future.exception()}); start the endpoint "
                        "and run the same command again: it goes on from here"
                    )
    finally:
        pool.shutdown(cancel_futures=True)
        for future, asset in running.items():
            if not future.cancelled() and future.exception() is None:
                journal.take(step, asset.id, future.result())
        bar.close()
    return journal.taken(step, assets)


def _settle(step: str, asset: Asset, future: Future, journal: Journal) -> bool:
    """Write down what came of an asset; True if nobody answered."""
    try:
        journal.take(step, asset.id, future.result())
    except Rejected as why:
        journal.reject(step, asset.id, why)
    except NoAnswer as error:
        journal.reject(step, asset.id, Rejected(NO_ANSWER, str(error)))
        return True
    return False
