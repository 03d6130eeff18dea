"""What one migration sends: its streams have one account of digests and of bytes, and go on where the last one was."""

from collections.abc import Iterator
from pathlib import Path

from migrator import faults
from migrator.files import read_file
from migrator.progress import Progress
from migrator.stream import Digests, Sender
from migrator.v1 import peer_pb2


class Outbox:
    """`planned_bytes` are what the disk has to send at least: progress is told as a part of that."""

    def __init__(self, migration: str, epoch: int, progress: Progress, planned_bytes: int) -> None:
        self.digests = Digests()
        self._migration = migration
        self._epoch = epoch
        self._progress = progress
        self._planned_bytes = planned_bytes
        self._log_bytes = 0

    def sender(self) -> Sender:
        """For one stream."""
        return Sender(self._migration, self._epoch, self.digests, self._progress.meter, self._sent)

    def log(self, sender: Sender, path: Path) -> Iterator[peer_pb2.SendRequest]:
        """What conmon has written there since the last call."""
        if path.exists():
            for piece in read_file(path, self._log_bytes):
                self._log_bytes = piece.offset + piece.length
                yield from sender.requests("log", [piece])

    def _sent(self) -> None:
        """After each piece: stop if asked to, and say how far it is."""
        faults.point("source.piece")
        self._progress.check()
        self._progress.sent(self._planned_bytes)
