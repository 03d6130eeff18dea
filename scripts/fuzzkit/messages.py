"""Messages of PeerService: right ones, and what can be made of them field by field by their descriptors."""

import random
from typing import Any

import xxhash
import zstandard
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from migrator.v1 import container_pb2, peer_pb2

GIB = 1 << 30
# If a name ever becomes a path, a file of this name is somewhere.
MARK = "fuzz-was-here"
STRINGS = (
    "", ".", "..", "/", "a/b", f"../{MARK}", f"../../../../../../tmp/{MARK}", f"/tmp/{MARK}", f"{MARK}\0x", "a\nb",
    "\u0661\u0662", "\x1b[31m", "%2e%2e%2f", "x" * 200, "y" * 20_000, "$(id)", "'; DROP TABLE incoming; --", "-rf",
    "m-1", "m-0", "ct", "ct-0", "volume/0", "volume/99", "volume/-1", "log", "log/x", "image/core-1.img", "image/..",
    f"image/../{MARK}", "image/descriptors.json", "memory", "memory/1", "memory/0", "memory/-1", "memory/" + "9" * 5000,
    "missing/1", "missing/../1", "missing/" + "9" * 5000,
    "memory/\u0661", "shared/memfd/1/x", "shared/memfd/1/y", "shared/sysv/1", "shared/sysv/" + "9" * 5000,
    "shared/memfd/1/%00", "snapshot/0/0", "snapshot/1/0", "snapshot/99/0", "snapshot/0/99", "snapshot/\u0660/0",
)  # fmt: skip
TARGETS = (
    "volume/0", "volume/0", "image/core-1.img", "memory/7", "memory", "missing/7", "log", "shared/memfd/5/name",
    "shared/sysv/3", "snapshot/0/0",
)  # fmt: skip
INTEGERS = (
    0, 1, 2, 3, 7, 63, 64, 65, 4095, 4096, 65535, 65536, 1 << 20, (1 << 20) + 1, GIB, 1 << 31, (1 << 31) - 1, 1 << 40,
    (1 << 47) - 4096, 1 << 47, 1 << 62, (1 << 63) - 1,
)  # fmt: skip
_INT = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_UINT = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
_FLOAT = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def spec(chance: random.Random) -> container_pb2.ContainerSpec:
    """A container that an agent could have made."""
    kinds = ["ext4", *chance.sample(["ext4", "xfs"], chance.randrange(2))]
    made = container_pb2.ContainerSpec(image="img", hostname="ct", command=["sleep", "1"])
    for index, kind in enumerate(kinds):
        made.volumes.add(mount_point=f"/{index or ''}", size_bytes=GIB, filesystem=kind)
    made.interfaces.add(name="eth0", mac="02:00:00:00:00:01", bridge="br0", addresses=["10.77.2.5/16"])
    return made


def prepare(chance: random.Random, migration: str, container: str, epoch: int) -> peer_pb2.PrepareRequest:
    """A request that is accepted, unless one of that container has been."""
    made = peer_pb2.PrepareRequest(
        migration=migration,
        epoch=epoch,
        container=container,
        spec=spec(chance),
        state=container_pb2.CONTAINER_STATE_RUNNING,
        stdio=["pipe:[1]"] * 3,
        memory_bytes=64 << 20,
        create_time_ms=1_700_000_000_000,
    )
    for number in range(chance.randrange(3)):
        taken = made.snapshots.add(name=f"s{number}", parent=number, create_time_ms=number)
        taken.volumes.extend(made.spec.volumes)
    return made


def piece(chance: random.Random, migration: str, epoch: int, stream: int, number: int) -> peer_pb2.SendRequest:
    """One that fits where it is sent in turn."""
    target = chance.choice((*TARGETS, f"image/pages-{chance.randrange(9)}.img"))
    offset = chance.randrange(64) * 4096
    made = peer_pb2.SendRequest(
        migration=migration, epoch=epoch, target=target, offset=offset, stream=stream, number=number
    )
    plain = chance.choice([b"\1", b"text "]) * chance.choice([1, 512, 4096])
    match chance.randrange(4):
        case 0:
            made.length, made.encoding = 4096, peer_pb2.ENCODING_ZEROS
        case 1:
            made.length, made.encoding = len(plain), peer_pb2.ENCODING_ZSTD
            made.data = zstandard.ZstdCompressor(level=1).compress(plain)
            made.checksum = xxhash.xxh3_64_intdigest(plain)
        case 2:
            made.length, made.encoding, made.data = len(plain), peer_pb2.ENCODING_PLAIN, plain
            made.checksum = xxhash.xxh3_64_intdigest(plain)
            made.parts.extend([0, len(plain), 1 << 30, -4096] if chance.random() < 0.5 else [])
        case _:
            made.length, made.encoding, made.data = len(plain), peer_pb2.ENCODING_PLAIN, plain
            made.checksum = xxhash.xxh3_64_intdigest(plain)
    if target == "memory":
        length = -made.length if made.encoding == peer_pb2.ENCODING_ZEROS else made.length
        made.parts[:] = [7, 0, *(made.parts or [offset, length])]
    return made


def mutated(chance: random.Random, message: Message) -> Message:
    """The message with one to three of its fields, at any depth, as they should not be."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        _mutate(chance, message)
    return message


def _mutate(chance: random.Random, message: Message) -> None:
    fields: Any = message.DESCRIPTOR.fields
    field: FieldDescriptor = chance.choice(fields)
    name = field.name
    if chance.random() < 0.1:
        message.ClearField(name)
        return
    value = getattr(message, name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(chance.choice([1, 3, 200])):
            target = chance.choice(STRINGS)[:5000] + str(chance.randrange(1000))
            value[target] = chance.randbytes(chance.choice([0, 16]))
    elif field.is_repeated:
        _mutate_repeated(chance, field, value)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        _mutate(chance, value)
    else:
        setattr(message, name, _scalar(chance, field))


def _mutate_repeated(chance: random.Random, field: FieldDescriptor, value: Any) -> None:
    count = chance.choice([1, 1, 2, 50, 3000])
    if len(value) and chance.random() < 0.3:
        del value[chance.randrange(len(value)) :]
    elif field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
        # A message has at most 4 MiB, which gRPC sees to.
        value.extend([_small(_scalar(chance, field)) for _ in range(count)])
    elif len(value) and chance.random() < 0.6:
        _mutate(chance, chance.choice(value))
    else:
        for _ in range(min(count, 200)):
            _mutate(chance, value.add())


def _small(value: Any) -> Any:
    return value[:100] if isinstance(value, str | bytes) else value


def _scalar(chance: random.Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return _bytes(chance)
        return chance.choice(STRINGS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind in _FLOAT:
        return chance.choice([0.0, -1.0, 1e300, float("inf"), float("nan")])
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice([0, 1, 2, 3, 7, 99, -1, (1 << 31) - 1])
    bits = 31 if kind in (_INT[0], _UINT[0]) else 63
    number = min(chance.choice(INTEGERS), (1 << bits) - 1)
    return -number if kind in _INT and chance.random() < 0.3 else number


def _bytes(chance: random.Random) -> bytes:
    match chance.randrange(5):
        case 0:
            return b""
        case 1:
            return chance.randbytes(chance.choice([1, 16, 4096]))
        case 2:
            # A mebibyte, of which the frame does not say so.
            packer = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
            return packer.compress(bytes(1 << 20)) + packer.flush()
        case 3:
            return zstandard.ZstdCompressor(level=1).compress(bytes(2 << 20))
        case _:
            whole = zstandard.ZstdCompressor(level=1).compress(b"text" * 1000)
            return whole[: chance.randrange(len(whole))]


def garbage(chance: random.Random, message: Message) -> bytes:
    """Bytes that may be no message at all."""
    content = bytearray(message.SerializeToString())
    for _ in range(chance.choice([1, 4, 16])):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(3):
            case 0:
                content[at:at] = chance.randbytes(chance.choice([1, 8]))
            case 1:
                del content[at : at + chance.choice([1, 8])]
            case _ if at < len(content):
                content[at] = chance.randrange(256)
    return bytes(content)
