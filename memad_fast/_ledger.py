"""What workers were at when they died: kept by a process that outlives them, which loads nothing else.

A batch whose worker failed is repeated image by image. Which image the next worker fails at, only someone else can
say afterwards: so a worker tells the ledger before it begins. A batch goes by its first position, an image by its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DIED = "its process ended (killed, or out of memory)"


@dataclass
class _Batch:
    """What is known of a batch whose results nobody has read yet."""

    attempts: int = 0
    image: int | None = None  # the one that is being scored alone
    reason: str = DIED  # of the failure of the worker that is at it, should it fail
    failed: dict[int, str] = field(default_factory=dict)


class Ledger:
    """Which batches are under way, how often each was begun, and the images that two workers failed at.

    Args:
        workers: how many there are.

    Example:
        >>> from memad_fast._ledger import Ledger
        >>> ledger = Ledger(workers=1)
        >>> ledger.enter(0)  # a worker begins with the batch, all its images at once, and dies
        (1, {})
        >>> ledger.enter(0)  # the next one takes image by image
        (2, {})
        >>> ledger.at(0, 5)
        >>> ledger.enter(0)  # and died at image 5
        (3, {5: 'its process ended (killed, or out of memory)'})
    """

    def __init__(self, workers: int) -> None:
        self._batches: dict[int, _Batch] = {}
        self._loading = 0
        self._workers = workers

    def begin_loading(self) -> int:
        """A worker begins to load. One that dies at it never says that it has.

        Returns:
            At how many that must have happened: those that neither have loaded nor can be loading now.
        """
        self._loading += 1
        return max(0, self._loading - self._workers)

    def has_loaded(self) -> None:
        """A worker is ready."""
        self._loading -= 1

    def enter(self, batch: int) -> tuple[int, dict[int, str]]:
        """A worker begins with a batch: the how-many-th that does, and why two workers failed at which images."""
        known = self._batches.setdefault(batch, _Batch())
        if known.image is not None:
            known.failed[known.image] = known.reason
        known.attempts, known.image, known.reason = known.attempts + 1, None, DIED
        return known.attempts, known.failed

    def at(self, batch: int, image: int | None) -> None:
        """From now on the batch's worker scores this image alone; None: it is between images."""
        self._batches[batch].image = image

    def failing(self, batch: int, reason: str) -> None:
        """The batch's worker is about to end itself."""
        self._batches[batch].reason = reason

    def arrived(self, batch: int) -> None:
        """The results of a batch were read: it will not be begun again."""
        self._batches.pop(batch, None)
