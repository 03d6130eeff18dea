"""Files that a caller sends, written below one folder: nothing about them is believed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from agent.tarball import Cancel
from migrator.errors import InvalidArgument, Precondition
from migrator.units import format_size
from migrator.v1 import image_pb2 as pb

MOST_FILES = 300
LONGEST_NAME_BYTES = 200
LARGEST_FILE_BYTES = 64 << 40
LARGEST_PIECE_BYTES = 1 << 20
# How often the room is looked at.
CHECK_BYTES = 64 << 20
REPORT_BYTES = 1 << 30


def check_name(name: str) -> str:
    """The name of a file in a folder, with nothing that leads out of it. Raises InvalidArgument."""
    if (
        name in ("", ".", "..")
        or "/" in name
        or not name.isprintable()
        or len(name.encode()) > LONGEST_NAME_BYTES
        or name.startswith("-")
    ):
        raise InvalidArgument(f"{name!r} cannot be the name of an uploaded file", reason="BAD_UPLOAD")
    return name


def receive(
    requests: Iterator[pb.UploadImageRequest],
    folder: Path,
    check_room: Callable[[int], None],
    report: Callable[[str], None],
    cancel: Cancel,
) -> list[Path]:
    """Write the files that the requests carry.

    Raises InvalidArgument (BAD_UPLOAD), Precondition (NO_SPACE), Cancelled.
    """
    files: dict[str, int] = {}
    received = 0
    size_bytes = 0
    with ExitStack() as current:
        descriptor = -1
        for request in requests:
            cancel.check()
            match request.WhichOneof("request"):
                case "file":
                    name, size_bytes = check_name(request.file.name), request.file.size_bytes
                    if name in files or len(files) == MOST_FILES or not 0 <= size_bytes <= LARGEST_FILE_BYTES:
                        raise InvalidArgument(f"the file {name} is not acceptable", reason="BAD_UPLOAD")
                    files[name] = size_bytes
                    current.close()
                    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    current.callback(os.close, descriptor)
                    os.truncate(descriptor, size_bytes)
                case "piece":
                    piece = request.piece
                    end = piece.offset + len(piece.data)
                    if descriptor < 0 or piece.offset < 0 or end > size_bytes or len(piece.data) > LARGEST_PIECE_BYTES:
                        raise InvalidArgument("a piece is outside of its file", reason="BAD_UPLOAD")
                    if received // CHECK_BYTES != (received + len(piece.data)) // CHECK_BYTES or not received:
                        check_room(CHECK_BYTES)
                    received += len(piece.data)
                    if received // REPORT_BYTES != (received - len(piece.data)) // REPORT_BYTES:
                        report(f"{format_size(received)} have arrived")
                    _write(descriptor, piece.data, piece.offset)
                case _:
                    raise InvalidArgument("a file or a piece of one was expected", reason="BAD_UPLOAD")
    if not files:
        raise InvalidArgument("no file was sent", reason="BAD_UPLOAD")
    return [folder / name for name in files]


def _write(descriptor: int, data: bytes, offset: int) -> None:
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Precondition("no room for what is sent: the pool is full", reason="NO_SPACE") from error
