"""What one migration sends: its streams have one account of digests and of bytes, and go on where the last one was."""

from collections.abc import Iterator
from pathlib import Path

from migrator import faults
from migrator.files import read_file
from migrator.progress import Progress
from migrator.stream import Digests, Meter, Sender
from migrator.v1 import peer_pb2


class Outbox:
    """`planned_bytes` are what the disk has to send at least: progress is told as a part of that."""

    def __init__(
        self, migration: str, epoch: int, progress: Progress, planned_bytes: int, bandwidth_bytes_per_s: int
    ) -> None:
        self.digests = Digests()
        self._migration = migration
        self._epoch = epoch
        self._progress = progress
        self._planned_bytes = planned_bytes
        self._meter = Meter(bandwidth_bytes_per_s)
        self._log_bytes = 0

    def sender(self) -> Sender:
        """For one stream."""
        return Sender(self._migration, self._epoch, self.digests, self._meter, self._sent)

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
        content = self._meter.content_bytes
        copied = content.get("volume", 0) + content.get("snapshot", 0)
        self._progress.sent(
            memory=sum(content.get(kind, 0) for kind in ("memory", "shared", "image", "images")),
            disk=copied,
            wire=self._meter.wire_bytes,
            part=copied / self._planned_bytes if self._planned_bytes else 1.0,
        )
