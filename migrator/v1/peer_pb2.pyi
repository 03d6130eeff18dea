from migrator.v1 import container_pb2 as _container_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_PLAIN: _ClassVar[Encoding]
    ENCODING_ZEROS: _ClassVar[Encoding]
    ENCODING_ZSTD: _ClassVar[Encoding]

class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_UNSPECIFIED: _ClassVar[Decision]
    DECISION_RELEASED: _ClassVar[Decision]
    DECISION_ABORTED: _ClassVar[Decision]

class Ownership(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OWNERSHIP_UNSPECIFIED: _ClassVar[Ownership]
    OWNERSHIP_OWNER: _ClassVar[Ownership]
    OWNERSHIP_REFUSED: _ClassVar[Ownership]

class ArrivalStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ARRIVAL_STAGE_UNSPECIFIED: _ClassVar[ArrivalStage]
    ARRIVAL_STAGE_PREPARED: _ClassVar[ArrivalStage]
    ARRIVAL_STAGE_READY: _ClassVar[ArrivalStage]
    ARRIVAL_STAGE_OWNER: _ClassVar[ArrivalStage]
    ARRIVAL_STAGE_REFUSED: _ClassVar[ArrivalStage]
ENCODING_UNSPECIFIED: Encoding
ENCODING_PLAIN: Encoding
ENCODING_ZEROS: Encoding
ENCODING_ZSTD: Encoding
DECISION_UNSPECIFIED: Decision
DECISION_RELEASED: Decision
DECISION_ABORTED: Decision
OWNERSHIP_UNSPECIFIED: Ownership
OWNERSHIP_OWNER: Ownership
OWNERSHIP_REFUSED: Ownership
ARRIVAL_STAGE_UNSPECIFIED: ArrivalStage
ARRIVAL_STAGE_PREPARED: ArrivalStage
ARRIVAL_STAGE_READY: ArrivalStage
ARRIVAL_STAGE_OWNER: ArrivalStage
ARRIVAL_STAGE_REFUSED: ArrivalStage

class ExamineRequest(_message.Message):
    __slots__ = ("container", "spec", "kernel", "cpu_flags", "criu_version", "memory_bytes", "disk_bytes")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    CPU_FLAGS_FIELD_NUMBER: _ClassVar[int]
    CRIU_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    container: str
    spec: _container_pb2.ContainerSpec
    kernel: str
    cpu_flags: _containers.RepeatedScalarFieldContainer[str]
    criu_version: str
    memory_bytes: int
    disk_bytes: int
    def __init__(self, container: _Optional[str] = ..., spec: _Optional[_Union[_container_pb2.ContainerSpec, _Mapping]] = ..., kernel: _Optional[str] = ..., cpu_flags: _Optional[_Iterable[str]] = ..., criu_version: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ...) -> None: ...

class Objection(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ExamineResponse(_message.Message):
    __slots__ = ("host", "objections", "kernel", "criu_version", "features", "last_epoch")
    HOST_FIELD_NUMBER: _ClassVar[int]
    OBJECTIONS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    CRIU_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    host: str
    objections: _containers.RepeatedCompositeFieldContainer[Objection]
    kernel: str
    criu_version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    last_epoch: int
    def __init__(self, host: _Optional[str] = ..., objections: _Optional[_Iterable[_Union[Objection, _Mapping]]] = ..., kernel: _Optional[str] = ..., criu_version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., last_epoch: _Optional[int] = ...) -> None: ...

class QueueRequest(_message.Message):
    __slots__ = ("migration", "waited_ms", "leave")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    migration: str
    waited_ms: int
    leave: bool
    def __init__(self, migration: _Optional[str] = ..., waited_ms: _Optional[int] = ..., leave: _Optional[bool] = ...) -> None: ...

class QueueResponse(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("migration", "epoch", "container", "spec", "state", "stdio", "features", "create_time_ms", "start_time_ms", "snapshots", "memory_bytes")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STDIO_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    container: str
    spec: _container_pb2.ContainerSpec
    state: _container_pb2.ContainerState
    stdio: _containers.RepeatedScalarFieldContainer[str]
    features: _containers.RepeatedScalarFieldContainer[str]
    create_time_ms: int
    start_time_ms: int
    snapshots: _containers.RepeatedCompositeFieldContainer[PeerSnapshot]
    memory_bytes: int
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., container: _Optional[str] = ..., spec: _Optional[_Union[_container_pb2.ContainerSpec, _Mapping]] = ..., state: _Optional[_Union[_container_pb2.ContainerState, str]] = ..., stdio: _Optional[_Iterable[str]] = ..., features: _Optional[_Iterable[str]] = ..., create_time_ms: _Optional[int] = ..., start_time_ms: _Optional[int] = ..., snapshots: _Optional[_Iterable[_Union[PeerSnapshot, _Mapping]]] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class PeerSnapshot(_message.Message):
    __slots__ = ("name", "parent", "base", "create_time_ms", "is_current", "volumes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    IS_CURRENT_FIELD_NUMBER: _ClassVar[int]
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: int
    base: int
    create_time_ms: int
    is_current: bool
    volumes: _containers.RepeatedCompositeFieldContainer[_container_pb2.Volume]
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[int] = ..., base: _Optional[int] = ..., create_time_ms: _Optional[int] = ..., is_current: _Optional[bool] = ..., volumes: _Optional[_Iterable[_Union[_container_pb2.Volume, _Mapping]]] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("has_base",)
    HAS_BASE_FIELD_NUMBER: _ClassVar[int]
    has_base: bool
    def __init__(self, has_base: _Optional[bool] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("migration", "epoch", "target", "offset", "length", "encoding", "data", "checksum", "stream", "number", "parts")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    target: str
    offset: int
    length: int
    encoding: Encoding
    data: bytes
    checksum: int
    stream: int
    number: int
    parts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., target: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ..., stream: _Optional[int] = ..., number: _Optional[int] = ..., parts: _Optional[_Iterable[int]] = ...) -> None: ...

class SendResponse(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class KeepSnapshotsRequest(_message.Message):
    __slots__ = ("migration", "epoch")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class KeepSnapshotsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DigestVolumeRequest(_message.Message):
    __slots__ = ("migration", "epoch", "target", "chunk_bytes")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    target: str
    chunk_bytes: int
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., target: _Optional[str] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class DigestVolumeResponse(_message.Message):
    __slots__ = ("first_chunk", "digests")
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    first_chunk: int
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, first_chunk: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class HoldTrafficRequest(_message.Message):
    __slots__ = ("migration", "epoch", "neighbours")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    neighbours: _containers.RepeatedCompositeFieldContainer[Neighbour]
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., neighbours: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ...) -> None: ...

class Neighbour(_message.Message):
    __slots__ = ("interface", "address", "mac")
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    interface: str
    address: str
    mac: str
    def __init__(self, interface: _Optional[str] = ..., address: _Optional[str] = ..., mac: _Optional[str] = ...) -> None: ...

class HoldTrafficResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("migration", "epoch", "digests")
    class DigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    digests: _containers.ScalarMap[str, bytes]
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., digests: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class RestoreResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[TimedStep]
    def __init__(self, steps: _Optional[_Iterable[_Union[TimedStep, _Mapping]]] = ...) -> None: ...

class TimedStep(_message.Message):
    __slots__ = ("name", "duration_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    duration_ms: float
    def __init__(self, name: _Optional[str] = ..., duration_ms: _Optional[float] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("migration", "epoch", "decision")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    decision: Decision
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., decision: _Optional[_Union[Decision, str]] = ...) -> None: ...

class DecideResponse(_message.Message):
    __slots__ = ("ownership", "resume_ms", "total_ms", "steps", "refusal", "missing_bytes")
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    RESUME_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    ownership: Ownership
    resume_ms: float
    total_ms: float
    steps: _containers.RepeatedCompositeFieldContainer[TimedStep]
    refusal: str
    missing_bytes: int
    def __init__(self, ownership: _Optional[_Union[Ownership, str]] = ..., resume_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., steps: _Optional[_Iterable[_Union[TimedStep, _Mapping]]] = ..., refusal: _Optional[str] = ..., missing_bytes: _Optional[int] = ...) -> None: ...

class GetDecisionRequest(_message.Message):
    __slots__ = ("migration", "epoch")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class GetDecisionResponse(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    def __init__(self, decision: _Optional[_Union[Decision, str]] = ...) -> None: ...

class GetArrivalRequest(_message.Message):
    __slots__ = ("migration", "epoch")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class GetArrivalResponse(_message.Message):
    __slots__ = ("stage",)
    STAGE_FIELD_NUMBER: _ClassVar[int]
    stage: ArrivalStage
    def __init__(self, stage: _Optional[_Union[ArrivalStage, str]] = ...) -> None: ...

class PullMemoryRequest(_message.Message):
    __slots__ = ("migration", "epoch", "pid", "ranges")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    migration: str
    epoch: int
    pid: int
    ranges: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, migration: _Optional[str] = ..., epoch: _Optional[int] = ..., pid: _Optional[int] = ..., ranges: _Optional[_Iterable[int]] = ...) -> None: ...

class PullMemoryResponse(_message.Message):
    __slots__ = ("piece",)
    PIECE_FIELD_NUMBER: _ClassVar[int]
    piece: SendRequest
    def __init__(self, piece: _Optional[_Union[SendRequest, _Mapping]] = ...) -> None: ...
