"""What strangers may say, at its edges."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import xxhash
import zstandard

from agent.database import Database
from agent.journal import KEPT, SCHEMA, Incomings, Outgoings
from blockdev.blocks import BATCH_PIECES, Batch, Piece
from migrator import store as store_module
from migrator import wire
from migrator.errors import InvalidArgument, PeerError
from migrator.files import write_file
from migrator.fill import store as page_store
from migrator.handover import HandoverError
from migrator.shm.store import SharedStore
from migrator.store import Store
from migrator.stream import Digests, Meter, Receiver, Sender
from migrator.v1 import peer_pb2


@pytest.mark.parametrize("name", ["", "m-", "x-1", "m-../x", "m-a/b", "m-\n", "m-" + "a" * 41, "m-\u0661"])
def test_names_that_no_migration_has(name: str) -> None:
    with pytest.raises(InvalidArgument):
        wire.check_migration(name)
    assert wire.check_migration("m-1234abcd") == "m-1234abcd"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\0b", "a\n", "x" * 129])
def test_names_that_no_file_gets(tmp_path: Path, name: str) -> None:
    with pytest.raises(PeerError):
        write_file(tmp_path, name, Piece(0, 1, b"x"))
    assert not list(tmp_path.iterdir())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("as it was")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/core-1.img").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "images", "core-1.img", Piece(0, 1, b"x"))
    assert (tmp_path / "outside").read_text() == "as it was"


def test_a_full_file_system_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    monkeypatch.setattr(wire, "LARGEST_RESERVE_BYTES", 1 << 62)
    monkeypatch.setattr(wire, "RESERVE_PART", 1)
    assert status.f_bavail < status.f_blocks
    with pytest.raises(PeerError, match="nearly full"):
        write_file(tmp_path, "core-1.img", Piece(0, 1, b"x"))


def test_a_host_with_little_memory_takes_no_more_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of nothing but zeros that travel packed count in full."""
    reservation = SimpleNamespace(memory=tmp_path, images=tmp_path, shared=SharedStore())
    page, rest = bytes(1 << 20), store_module.LOOK_BYTES >> 20
    for target in ("memory/7", "shared/memfd/1/a", "image/pages-1.img"):
        store = Store(cast("Any", reservation), live=True)
        monkeypatch.setattr(wire, "memory_available_bytes", lambda: wire.MEMORY_RESERVE_BYTES - 1)
        for number in range(rest):
            piece = peer_pb2.SendRequest(
                target=target, offset=number << 20, length=len(page), checksum=xxhash.xxh3_64_intdigest(page),
                encoding=peer_pb2.ENCODING_ZSTD, data=zstandard.compress(page),
            )  # fmt: skip
            if number < rest - 1:
                store.write(piece)
        with pytest.raises(PeerError, match="of memory left") as refused:
            store.write(piece)
        assert refused.value.reason == "NO_MEMORY"
        monkeypatch.undo()
        store.write(piece)
        store.close()


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("rest", ["memfd/" + "9" * 5000, "sysv/1/x", "memfd/1/" + "a" * 250, "memfd/1/%00", "x/1", ""])
def test_shared_memory_that_cannot_be(rest: str) -> None:
    store = SharedStore()
    with pytest.raises(PeerError):
        store.write(rest, Piece(0, 1, b"x"))
    assert not store._objects


def test_a_replaced_object_stays_open_until_the_end() -> None:
    """Another stream may be writing to it: its number must not become another file's."""
    store = SharedStore()
    before = open_files()
    for name in ("one", "two", "three"):
        store.write(f"memfd/7/{name}", Piece(0, 4, b"data"))
    assert len(open_files() - before) == 3
    store.close()
    assert not open_files() - before


def test_older_agents_take_what_is_sent_of_one_target() -> None:
    """Only one that says whose it is has more pieces, and those go to who knows of them."""
    sender = Sender("m", 1, Digests(), Meter())
    told = [[offset, -4096] for offset in range(3 * BATCH_PIECES)]
    requests = list(sender.batches("volume/0", (Batch(layout, b"") for layout in told)))
    assert [len(request.parts) for request in requests] == [2 * BATCH_PIECES] * 3
    whose = [Batch([7, 0, *([0, -4096] * BATCH_PIECES)], b"")] * 2
    for request in sender.batches("memory", whose):
        assert len(Receiver(Digests()).pieces(request)) == BATCH_PIECES + 1


def test_there_is_a_limit_to_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TARGETS", 3)
    digests = Digests()
    for number in range(3):
        digests.of(f"image/{number}")
    digests.of("image/0")
    with pytest.raises(PeerError, match="more than 3"):
        digests.of("image/3")


def test_memory_of_several_processes_comes_in_one_message(tmp_path: Path) -> None:
    store = Store(cast("Any", SimpleNamespace(memory=tmp_path)), live=True)
    sender = Sender("m", 1, digests := Digests(), Meter())
    batches = [Batch([7, 0, 4096, 4096, 0, -4096], b"a" * 4096), Batch([8, 0, 0, 4096], b"b" * 4096)]
    for request in sender.batches("memory", batches):
        store.write(request)
    assert page_store.path_of(tmp_path, 7).read_bytes() == bytes(4096) + b"a" * 4096
    assert page_store.path_of(tmp_path, 8).read_bytes() == b"b" * 4096
    assert store.digests.all() == digests.all()


@pytest.mark.parametrize("layout", [[0, 4], [0, 0, 0, 4], [10**10, 0, 0, 4], [1 << 40, 0, 0, 4]])
def test_memory_that_is_no_process_is_refused(tmp_path: Path, layout: list[int]) -> None:
    store = Store(cast("Any", SimpleNamespace(memory=tmp_path)), live=True)
    (request,) = Sender("m", 1, Digests(), Meter()).batches("memory", [Batch(layout, b"data")])
    with pytest.raises(PeerError, match="no process"):
        store.write(request)
    assert not list(tmp_path.iterdir())


def test_there_is_a_limit_to_the_pieces_of_a_message() -> None:
    parts = [0, -1] * (BATCH_PIECES + 2)
    request = peer_pb2.SendRequest(target="memory/1", encoding=peer_pb2.ENCODING_ZEROS, parts=parts)
    with pytest.raises(PeerError, match="pieces in one"):
        Receiver(Digests()).pieces(request)


def test_streams_side_by_side_do_not_share_a_decompressor() -> None:
    receiver = Receiver(Digests())
    wrong: list[int] = []

    def receive(number: int) -> None:
        plain = bytes([number]) * (256 << 10) + os.urandom(256 << 10)
        request = peer_pb2.SendRequest(
            target=f"volume/{number}",
            length=len(plain),
            encoding=peer_pb2.ENCODING_ZSTD,
            data=zstandard.ZstdCompressor().compress(plain),
            checksum=xxhash.xxh3_64_intdigest(plain),
        )
        for _ in range(50):
            if receiver.piece(request).data != plain:
                wrong.append(number)

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
def test_durations_can_be_computed_with(value: float) -> None:
    (step,) = wire.plausible_steps([peer_pb2.TimedStep(name="x" * 1000, duration_ms=value)])
    assert 0 <= step.duration_ms <= wire.LONGEST_MS
    assert len(step.name) < 100


def test_epochs_cannot_be_used_up(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db", [SCHEMA])
    outgoings, incomings = Outgoings(database), Incomings(database)
    for leap in (-1, 1 << 62, (1 << 63) - 1):
        with pytest.raises(InvalidArgument):
            outgoings.begin("m-1", "ct", "host-b", leap)
    for leap in (1 << 62, (1 << 63) - 1):
        with pytest.raises(InvalidArgument):
            incomings.begin("m-1", "ct", "host-b", leap)
    assert incomings.last_epoch("ct") == 0
    incomings.begin("m-1", "ct", "host-b", 1)
    with pytest.raises(HandoverError, match="before"):
        incomings.begin("m-1", "other", "host-c", 1)
    assert incomings.last_epoch("other") == 0
    database.close()


def test_finished_records_are_forgotten_in_time(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db", [SCHEMA])
    incomings = Incomings(database)
    database._connection.execute("PRAGMA synchronous=OFF")
    incomings.begin("m-open", "open", "host-b", 1)
    # One that its source has perhaps not heard the end of, whatever others do.
    incomings.begin("m-other", "other", "host-c", 1)
    incomings.refuse("m-other")
    incomings.finish("m-other")
    for number in range(KEPT + 20):
        incomings.begin(f"m-{number}", "ct", "host-b", number + 1)
        incomings.refuse(f"m-{number}")
        incomings.finish(f"m-{number}")
    assert incomings.get("m-open") is not None
    assert incomings.get("m-other") is not None
    assert incomings.get("m-0") is None
    assert incomings.get("m-30") is not None
    assert len(database.rows("SELECT 1 FROM incoming")) <= KEPT + 3
    assert incomings.last_epoch("ct") == KEPT + 20
    database.close()


def test_the_database_is_for_its_owner_only(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db", [SCHEMA])
    assert {file.name for file in tmp_path.iterdir()} == {"agent.db", "agent.db-wal", "agent.db-shm"}
    assert not any(file.stat().st_mode & 0o077 for file in tmp_path.iterdir())
    database.close()
