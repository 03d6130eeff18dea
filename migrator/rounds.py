"""Disk and memory at the source, round by round while the container runs, and what is left when it has stopped."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from migrator import convergence
from migrator.convergence import Next, OnNoConverge, Round
from migrator.disk import DiskCopy
from migrator.errors import NotConverged
from migrator.files import differing, digests, read_file
from migrator.memory import Moment
from migrator.memory_copy import MemoryCopy
from migrator.options import Options
from migrator.ports import LeavingContainer, Peer
from migrator.progress import Progress
from migrator.stream import Sender
from migrator.units import format_duration, format_size
from migrator.v1 import peer_pb2

# How often a container is let go on that was stopped, and what it takes, in times of what should have been left.
RETREATS = 3
RETREAT = 4
# Rounds just before it is stopped, at the most, and how little ends them; then syncs, of which one that is short is the
# last.
LAST_ROUNDS, LAST_ROUNDS_S, LITTLE_BYTES = 6, 2.0, 1 << 20
SYNCS, SHORT_SYNC_S = 3, 0.01
# What takes longer to send is not sent once more just before: as much would be left.
LAST_ROUND_S = 0.25
# How often it is asked what CRIU has done with: to ask more often would slow it down.
DUMP_POLL_S = 0.01
# Of CRIU's images: those that travel many at a time.
SMALL_BYTES = 64 << 10


class Rounds:
    """`memory` is None where CRIU dumps it, and for a container that does not run."""

    def __init__(
        self,
        container: LeavingContainer,
        peer: Peer,
        sender: Callable[[], Sender],
        disk: DiskCopy,
        memory: MemoryCopy | None,
        progress: Progress,
        options: Options,
    ) -> None:
        self.disk = disk
        self._container = container
        self._peer = peer
        self._sender = sender
        self._memory = memory
        self._progress = progress
        self._options = options
        # Digests of images that were sent before the dump, by name.
        self._early: dict[str, list[bytes]] = {}
        # Of what the last look has found.
        self._disk_bytes = 0
        # What may be left when it stops; None if it stops whatever is left.
        self._limit_bytes: int | None = None
        # Whether last rounds are of use to its memory.
        self._hurries = True

    def converge(self, undo: ExitStack) -> None:
        """Rounds until what is left can be sent while the container stands still, or as the operator wants it.

        Raises NotConverged.
        """
        options, done = self._options, list[Round]()
        shares = iter(convergence.CPU_SHARES)
        left = self._look()
        while (step := convergence.decide(done, left, options.max_downtime_s)) is not Next.FREEZE:
            if step is Next.STUCK:
                self._progress.note(f"does not converge: {options.on_no_converge.value}")
                if options.on_no_converge is OnNoConverge.FREEZE or self._leave_memory(done):
                    self._limit_bytes = None
                    is_near = convergence.standstill_s(done, left) <= LAST_ROUND_S
                    self._hurries = is_near and options.on_no_converge is OnNoConverge.FREEZE
                    return
                self._throttle(undo, next(shares, None), done, left)
                done.clear()
            began, sent = time.monotonic(), left
            self._peer.send(chain(self.disk.requests(sender := self._sender()), self._changed(sender)))
            seconds = time.monotonic() - began
            left = self._look()
            done.append(Round(sent, seconds, left))
            self._progress.note(
                f"round {len(done)}: {format_size(sent)} in {format_duration(seconds * 1000)}, {format_size(left)} left"
            )
        self._limit_bytes = convergence.limit_bytes(done, options.max_downtime_s)

    def hurry(self) -> None:
        """When all is ready to stop: send what was written meanwhile, until little is left or it stays as much."""
        if not self._early:
            self._send_early()
        deadline, before = time.monotonic() + LAST_ROUNDS_S, None
        for _ in range(LAST_ROUNDS):
            left = self._look_quickly()
            if left <= LITTLE_BYTES or (before is not None and left > convergence.SHRINK * before):
                break
            self._peer.send(chain(self.disk.requests(sender := self._sender()), self._changed(sender)))
            if time.monotonic() > deadline:
                break
            before = left
        for _ in range(SYNCS):
            began = time.monotonic()
            self.disk.sync()
            if time.monotonic() - began < SHORT_SYNC_S:
                break

    def _send_early(self) -> None:
        images = self._container.early_images()
        if large := [image for image in images if image.stat().st_size > SMALL_BYTES]:
            self._peer.send(self._large(self._sender(), large))
            self._early = {image.name: digests(image) for image in large}
        for image in images:
            image.unlink()

    def stop(self, undo: ExitStack, stop_tasks: Callable[[], None]) -> None:
        """After `hurry`: stop the tasks. If more was written meanwhile than may be left, it stays behind where that was
        asked for; if much more, they are let go on."""
        retreats = 0
        while True:
            stop_tasks()
            if self._memory is None:
                return
            with self._progress.step("collect"):
                left = self._memory.collect(Moment.STOPPED)
            if self._limit_bytes is None:
                return
            may_stay = self._options.on_no_converge is OnNoConverge.POSTCOPY
            if may_stay and self._memory.shared_bytes <= self._limit_bytes < left:
                self._memory.stays_behind = True
                self._progress.note(f"{format_size(left)} were left after it had stopped: that stays behind")
                return
            if left <= RETREAT * self._limit_bytes or retreats == RETREATS:
                return
            retreats += 1
            self._container.go_on()
            self._progress.note(f"{format_size(left)} were left after it had stopped: it goes on")
            self.converge(undo)
            self.hurry()

    def left_out(self) -> list[os.stat_result]:
        """With the container stopped: the shared memory that CRIU need not dump."""
        return self._memory.left_out() if self._memory else []

    def last(self, dumped: "Future[None]") -> Iterator[peer_pb2.SendRequest]:
        """With the container stopped: its memory, and CRIU's images once they are there."""
        sender = self._sender()
        yield from self._changed(sender)
        if self._memory:
            self._memory.compare()
            yield from self._changed(sender)
        if self.disk.is_quick:
            # While the dump goes on: what is left of the disk after it is next to nothing.
            self.disk.sync()
            self.disk.collect()
            yield from self.disk.requests(sender)
        # CRIU has written to its processes: system calls into their code, which it took back.
        while self._memory and not dumped.done():
            self._memory.collect_dumped(self._container.images)
            yield from self._changed(sender)
            futures.wait([dumped], DUMP_POLL_S)
        dumped.result()
        if self._memory:
            with self._progress.step("last collect"):
                self._memory.collect(Moment.LAST)
                self._memory.complete(self._container.images)
            if self._memory.stays_behind:
                yield from self._memory.leave(sender, self._container.images)
        yield from self._changed(sender)
        images = [image for image in self._container.images.iterdir() if not image.is_symlink()]  # to the parent
        small = [image for image in images if image.stat().st_size <= SMALL_BYTES]
        yield from sender.files("images", ((image.name, image.read_bytes()) for image in small))
        yield from self._large(sender, set(images).difference(small))

    def _look(self) -> int:
        """What a round would have to send now, in bytes."""
        self.disk.sync()
        memory = self._memory.collect() if self._memory else 0
        self._disk_bytes = self.disk.collect() + self._container.unwritten_bytes
        return self._disk_bytes + memory

    def _leave_memory(self, done: list[Round]) -> bool:
        """Post-copy, if that was asked for and is of use: only private memory can be left behind."""
        if self._options.on_no_converge is not OnNoConverge.POSTCOPY:
            return False
        assert self._memory is not None  # or it would not have come as far
        rest = self._disk_bytes + self._memory.shared_bytes
        if rest > convergence.limit_bytes(done, self._options.max_downtime_s):
            raise NotConverged(
                f"{self._container.name} writes faster to its disk and to shared memory than can be sent: "
                f"{format_size(rest)} are left, and only private memory can be pulled after the handover. Allow more "
                "with --max-downtime, or use --on-no-converge freeze or throttle"
            )
        self._memory.stays_behind = True
        return True

    def _look_quickly(self) -> int:
        """As `_look`, but not at a disk that has to be read whole, nor at memory where a look stops it, or of which
        as much would be left."""
        left = 0
        if self.disk.is_quick:
            self.disk.sync()
            left = self.disk.collect()
        if self._memory and self._memory.is_quick and self._hurries:
            left += self._memory.collect(Moment.HURRIED)
        return left

    def _changed(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        if self._memory:
            yield from self._memory.requests(sender)

    def _large(self, sender: Sender, images: Iterable[Path]) -> Iterator[peer_pb2.SendRequest]:
        """Of those that were sent before: what has changed."""
        for image in images:
            known = self._early.get(image.name)
            pieces = read_file(image) if known is None else differing(image, known)
            yield from sender.requests(f"image/{image.name}", pieces)

    def _throttle(self, undo: ExitStack, share: float | None, done: list[Round], left: int) -> None:
        name = self._container.name
        if self._options.on_no_converge is not OnNoConverge.THROTTLE or share is None:
            seconds = convergence.standstill_s(done, left)
            raise NotConverged(
                f"{name} writes faster than it can be sent: after {len(done)} rounds what is left would keep it still "
                f"for {seconds:.1f} s. Allow that with --max-downtime or --on-no-converge freeze, slow it down with "
                "--on-no-converge throttle, or try when it is less busy"
            )
        if share == convergence.CPU_SHARES[0]:
            undo.callback(self._container.throttle, None)
        self._container.throttle(share)
