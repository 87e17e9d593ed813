"""Whose turn it is at something that threads share: many readers at once, or one writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, RLock


class Turns:
    """A writer waits for the readers that are there, and whoever comes then waits for the writer.

    A thread that writes may begin to write again; it must not read through `reading`.
    """

    def __init__(self):
        self._door, self._left, self._readers = RLock(), Condition(), 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """To be held while nothing may change."""
        with self._door, self._left:
            self._readers += 1
        try:
            yield
        finally:
            with self._left:
                self._readers -= 1
                self._left.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """To be held while something changes."""
        with self._door, self._left:
            self._left.wait_for(lambda: self._readers == 0)
            yield
