"""What a migration asks of the two hosts: the agent implements these, tests have fakes of them.

Every method is synchronous, raises a MigratorError if it failed, and may be called again after it failed.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blockdev.blocks import Piece
from blockdev.tracker import WriteTracker
from migrator.memory import MemoryTracker
from migrator.network import Neighbour
from migrator.shm.store import SharedStore
from migrator.snapshots import LeavingSnapshot
from migrator.v1 import container_pb2, peer_pb2


@dataclass(frozen=True)
class LeavingVolume:
    """A volume at the source. `at` and `device` are None while the container is stopped: then nothing writes to it."""

    image: Path
    size_bytes: int
    device: Path | None
    at: Path | None


class Checkpoint(Protocol):
    """A CRIU process that waits; after `dump` it holds the tasks until the context ends."""

    def rehearse(self) -> None:
        """While the tasks run: do what a dump needs as far as it can be done now."""

    def prepare(self, sent: Sequence[os.stat_result]) -> None:
        """The tasks are frozen: do the rest of it. The contents of these objects of shared memory are left out: their
        state, as it is now, says which they are."""

    def dump(self, check: Callable[[], None]) -> None:
        """Write the container's images into its images folder. `check` is called now and then; what it raises ends the
        dump."""


class LeavingContainer(Protocol):
    """A container at the source, under an exclusive lease for the whole migration."""

    name: str
    spec: container_pb2.ContainerSpec
    state: container_pb2.ContainerState
    create_time_ms: int
    start_time_ms: int

    @property
    def volumes(self) -> Sequence[LeavingVolume]: ...

    @property
    def snapshots(self) -> Sequence[LeavingSnapshot]:
        """Those that move with it; parents come before their children."""

    @property
    def images(self) -> Path:
        """A folder on a tmpfs for CRIU's images, empty at the start."""

    def early_images(self) -> Sequence[Path]:
        """Copies of what will be among the images after a dump, as it is now, which are worth sending before. They are
        the caller's to delete."""

    @property
    def log(self) -> Path: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def unwritten_bytes(self) -> int:
        """Of the page cache: what the container has written and its volumes have not got yet."""

    def stdio(self) -> Sequence[str]:
        """Standard input, output and error of the first process as CRIU names them; empty if it does not run."""

    def objections(self) -> Sequence[peer_pb2.Objection]:
        """What forbids a live migration of this container, found without touching it."""

    def track_writes(self, volume: LeavingVolume) -> AbstractContextManager[WriteTracker]: ...

    def pause(self) -> AbstractContextManager[None]:
        """Every task stands still during the block."""

    def track_memory(self) -> AbstractContextManager[tuple[MemoryTracker | None, str]]:
        """A tracker that has begun, or None where memory has to be dumped by CRIU; and why. Raises Untrackable."""

    def pid_inside(self, pid: int) -> int:
        """The pid that a process of the container has in the container. Raises ProcessGone."""

    def prepare_checkpoint(self, *, with_memory: bool) -> AbstractContextManager[Checkpoint]: ...

    def guard(self, migration: str) -> AbstractContextManager[None]:
        """A process beside the agent: if the agent dies in this context, it aborts what is not released and resumes."""

    def throttle(self, share: float | None) -> None:
        """Let it use this part of the processor time that it may use; None: all of it. Repeatable."""

    def freeze(self) -> None:
        """Freeze the control group and wait until every task is frozen."""

    def go_on(self) -> None:
        """Undo `freeze` where nothing else has been done since."""

    def neighbours(self) -> Sequence[Neighbour]:
        """What its kernel knows of the link addresses around it."""

    def disconnect(self) -> None:
        """Take the container's links off the network."""

    def volumes_ready(self) -> AbstractContextManager[None]:
        """While the context is open, `freeze_volumes` takes no time."""

    def freeze_volumes(self) -> None:
        """Flush and freeze the file systems."""

    def thaw_volumes(self) -> None:
        """Undo `freeze_volumes`; repeatable."""

    def resume(self) -> None:
        """Undo the freeze from wherever it is: volumes, links, tasks. Repeatable; one paused before stays paused."""

    def is_settled(self) -> bool:
        """Whether an earlier migration to this host has nothing left to do for it."""

    def has_ended(self) -> bool:
        """Whether the first process is gone."""

    def kill(self) -> None:
        """The container lives elsewhere now: end the frozen tasks without letting them run."""

    def remove(self) -> None:
        """Delete everything that was the container's here; after `kill`, repeatable."""


class Reservation(Protocol):
    """A container on its way in: everything of it that exists at the destination."""

    has_base: bool
    """The first volume began as a clone of the image of the container's name for it."""
    shared: SharedStore

    @property
    def volumes(self) -> Sequence[Path]:
        """The image files, in the order of the spec."""

    @property
    def images(self) -> Path: ...

    @property
    def memory(self) -> Path:
        """A folder on a tmpfs: in it a file `mem-PID` for each process, with its pages at their addresses."""

    @property
    def log(self) -> Path: ...

    def write_snapshot(self, name: str, piece: Piece) -> None:
        """Store a piece of a snapshot, NUMBER/VOLUME. Raises PeerError, BlockError."""

    def keep_snapshots(self) -> None:
        """All pieces are there: make the snapshots durable, and clone the volumes from the current one. Repeatable."""

    def warm_up(self) -> None:
        """Start all of the restore that needs no image, and have it wait."""

    def hold_traffic(self, neighbours: Sequence[Neighbour]) -> None:
        """Take the container's frames and keep them; its kernel here is to know these neighbours."""

    def mount(self) -> None:
        """Attach and mount the volumes."""

    def amend_images(self) -> None:
        """Make CRIU's images ready for `restore`; while `mount` is at work."""

    def restore(self) -> Mapping[str, float]:
        """Restore the tasks and hold them before their first instruction. Returns milliseconds by step."""

    def is_held(self) -> bool:
        """Whether a restored copy waits for its verdict, also one from before a restart of the agent."""

    def complete(self) -> Mapping[str, float]:
        """Make the restored copy one that needs nothing more to run: frozen, and not reached by any traffic.

        Repeatable, as long as nothing is lost: that raises. Returns milliseconds by step.
        """

    def run(self) -> Mapping[str, float]:
        """Let the tasks run, connect them and replay what was held; or, stopped before, take the container as it is.
        Where an operator has put their word in the place of the source's, it is completed first.

        Repeatable. Returns milliseconds by step.
        """

    def missing_bytes(self) -> int:
        """Of its memory, what was left at the source and has not come yet (`migrator.fill.missing`)."""

    def lose(self, why: str) -> None:
        """What is missing will never come: after `run`, kill it."""

    def settle(self) -> bool:
        """After the handover: register the container as this host's own and delete what the migration needed.

        False as long as its memory is still being filled in: then this has to be called again.
        """

    def give_up(self) -> None:
        """Nothing of it runs, is heard or draws traffic any more; `discard` does the rest. Repeatable, before `run`."""

    def discard(self) -> None:
        """Kill and delete everything; repeatable, and right at any moment before `run`."""


class ArrivalHost(Protocol):
    """The host that a container comes to."""

    def examine(self, source: str, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        """What speaks against a container of the host `source`, and what this one can do."""

    def check(self, request: peer_pb2.PrepareRequest) -> None:
        """Raise a MigratorError for a container that cannot come here. Changes nothing."""

    def reserve(self, request: peer_pb2.PrepareRequest) -> Reservation:
        """Reserve name, room and network; undone by itself if it fails."""

    def reserved(self, migration: str, container: str) -> tuple[Reservation, container_pb2.ContainerState]:
        """The reservation that a former life of the agent made, and the state that the container had at the source."""


class Decider(Protocol):
    """The destination's agent where it is only about who has the container; failures as those of `Peer`."""

    host: str

    def stage(self, migration: str, epoch: int) -> peer_pb2.ArrivalStage:
        """How far it is; changes nothing there."""

    def decide(self, migration: str, epoch: int, decision: peer_pb2.Decision) -> peer_pb2.DecideResponse: ...


class Peer(Decider, Protocol):
    """The destination's agent as the source calls it; failures are Unreachable, or what the peer has raised."""

    def watch(self, check: Callable[[], None]) -> None:
        """Call this every few milliseconds while anything but `decide` waits; what it raises breaks off the call."""

    def examine(self, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse: ...

    def queue(self, migration: str, waited_s: float, *, leave: bool = False) -> int:
        """Get or stay in line there, or leave it: see `migrator.line`. The position in line; 0 if it may come."""

    def prepare(self, request: peer_pb2.PrepareRequest) -> peer_pb2.PrepareResponse: ...

    def keep_snapshots(self, migration: str, epoch: int) -> None: ...

    def digest_volume(
        self, migration: str, epoch: int, target: str, chunk_bytes: int
    ) -> Iterator[peer_pb2.DigestVolumeResponse]: ...

    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None: ...

    def hold_traffic(self, migration: str, epoch: int, neighbours: Sequence[Neighbour]) -> None: ...

    def restore(self, migration: str, epoch: int, digests: Mapping[str, bytes]) -> Sequence[peer_pb2.TimedStep]: ...
