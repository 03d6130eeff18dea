"""What goes to standard output: tables for people, and JSON whose shapes do not change."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from migrator.v1 import container_pb2


def write_json(value: object) -> None:
    """One JSON value and a newline on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def error_object(reason: str, message: str, exit_code: int) -> dict[str, object]:
    return {"reason": reason, "message": message, "exit_code": exit_code}


def iso(time: Timestamp) -> str | None:
    """ISO 8601 in UTC with milliseconds, or None for a time that was not set."""
    if not time.seconds and not time.nanos:
        return None
    moment = datetime.fromtimestamp(time.seconds + time.nanos / 1e9, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def enum_name(enum: Any, value: int) -> str:
    """CONTAINER_STATE_RUNNING as running; the prefix is the enum's own name."""
    prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return str(enum.Name(value)).removeprefix(prefix).lower()


def container_object(container: container_pb2.Container) -> dict[str, object]:
    """A container as `ps -o json` shows it."""
    addresses = [address for interface in container.spec.interfaces for address in interface.addresses]
    return {
        "name": container.name,
        "state": enum_name(container_pb2.ContainerState, container.state),
        "host": container.host,
        "image": container.spec.image,
        "ip": addresses[0].partition("/")[0] if addresses else None,
        "memory_bytes": container.memory_bytes,
        "disk_bytes": container.disk_bytes,
        "pid": container.pid or None,
        "started": iso(container.start_time),
        "exit_code": container.exit_code if container.HasField("exit_code") else None,
        "migration": container.migration or None,
        "pause_reason": container.pause_reason or None,
        "pulls_from": container.pulls_from or None,
        "missing_bytes": container.missing_bytes,
        "lost": iso(container.lost_time) if container.HasField("lost_time") else None,
    }


def to_object(message: Message) -> dict[str, object]:
    """Any message with the API's field names; 64-bit numbers as numbers, times in ISO 8601, enums in lower case."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> object:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> object:
    if isinstance(value, Timestamp):
        return iso(value)
    if isinstance(value, Message):
        return to_object(value)
    if field.enum_type is not None:
        names = field.enum_type.values_by_number
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return names[value].name.removeprefix(prefix).lower() if value in names else str(value)
    return value


def write_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns padded to their widest cell. Control characters are shown, never sent to a terminal."""
    lines = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_fields(value: dict[str, Any], indent: int = 0) -> None:
    """Nested values as indented lines, for people; empty ones are left out."""
    for name, item in value.items():
        label = " " * indent + name.replace("_", " ")
        if item in (None, "", [], {}, 0):
            continue
        if isinstance(item, dict):
            print(f"{label}:")
            write_fields(item, indent + 2)
        elif isinstance(item, list) and isinstance(item[0], dict):
            print(f"{label}:")
            for entry in item:
                print(" " * (indent + 2) + "-")
                write_fields(entry, indent + 4)
        elif isinstance(item, list):
            print(f"{label}: {' '.join(printable(str(entry)) for entry in item)}")
        else:
            print(f"{label}: {printable(str(item))}")


def printable(text: str) -> str:
    """The text with everything that could command a terminal escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
