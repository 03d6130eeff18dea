import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_MIGRATED: _ClassVar[Outcome]
    OUTCOME_ROLLED_BACK: _ClassVar[Outcome]
    OUTCOME_REFUSED: _ClassVar[Outcome]
    OUTCOME_CANCELLED: _ClassVar[Outcome]
    OUTCOME_CONTAINER_ENDED: _ClassVar[Outcome]
    OUTCOME_UNCERTAIN: _ClassVar[Outcome]
    OUTCOME_CHECKED: _ClassVar[Outcome]
    OUTCOME_TIMED_OUT: _ClassVar[Outcome]

class SnapshotHandling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SNAPSHOT_HANDLING_UNSPECIFIED: _ClassVar[SnapshotHandling]
    SNAPSHOT_HANDLING_MOVE: _ClassVar[SnapshotHandling]
    SNAPSHOT_HANDLING_DROP: _ClassVar[SnapshotHandling]

class OnNoConverge(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_NO_CONVERGE_UNSPECIFIED: _ClassVar[OnNoConverge]
    ON_NO_CONVERGE_FREEZE: _ClassVar[OnNoConverge]
    ON_NO_CONVERGE_ABORT: _ClassVar[OnNoConverge]
    ON_NO_CONVERGE_THROTTLE: _ClassVar[OnNoConverge]
    ON_NO_CONVERGE_POSTCOPY: _ClassVar[OnNoConverge]

class HandoverSide(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOVER_SIDE_UNSPECIFIED: _ClassVar[HandoverSide]
    HANDOVER_SIDE_SOURCE: _ClassVar[HandoverSide]
    HANDOVER_SIDE_DESTINATION: _ClassVar[HandoverSide]

class Keep(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KEEP_UNSPECIFIED: _ClassVar[Keep]
    KEEP_HERE: _ClassVar[Keep]
    KEEP_THERE: _ClassVar[Keep]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_MIGRATED: Outcome
OUTCOME_ROLLED_BACK: Outcome
OUTCOME_REFUSED: Outcome
OUTCOME_CANCELLED: Outcome
OUTCOME_CONTAINER_ENDED: Outcome
OUTCOME_UNCERTAIN: Outcome
OUTCOME_CHECKED: Outcome
OUTCOME_TIMED_OUT: Outcome
SNAPSHOT_HANDLING_UNSPECIFIED: SnapshotHandling
SNAPSHOT_HANDLING_MOVE: SnapshotHandling
SNAPSHOT_HANDLING_DROP: SnapshotHandling
ON_NO_CONVERGE_UNSPECIFIED: OnNoConverge
ON_NO_CONVERGE_FREEZE: OnNoConverge
ON_NO_CONVERGE_ABORT: OnNoConverge
ON_NO_CONVERGE_THROTTLE: OnNoConverge
ON_NO_CONVERGE_POSTCOPY: OnNoConverge
HANDOVER_SIDE_UNSPECIFIED: HandoverSide
HANDOVER_SIDE_SOURCE: HandoverSide
HANDOVER_SIDE_DESTINATION: HandoverSide
KEEP_UNSPECIFIED: Keep
KEEP_HERE: Keep
KEEP_THERE: Keep

class Phase(_message.Message):
    __slots__ = ("name", "start_ms", "duration_ms", "steps")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_ms: float
    duration_ms: float
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    def __init__(self, name: _Optional[str] = ..., start_ms: _Optional[float] = ..., duration_ms: _Optional[float] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("name", "duration_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    duration_ms: float
    def __init__(self, name: _Optional[str] = ..., duration_ms: _Optional[float] = ...) -> None: ...

class Bytes(_message.Message):
    __slots__ = ("memory", "disk", "wire")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    memory: int
    disk: int
    wire: int
    def __init__(self, memory: _Optional[int] = ..., disk: _Optional[int] = ..., wire: _Optional[int] = ...) -> None: ...

class Migration(_message.Message):
    __slots__ = ("name", "container", "source", "destination", "outcome", "downtime_ms", "total_ms", "bytes", "phases", "where_running", "error", "reason", "exit_code", "create_time", "progress", "notes", "queue_position", "queue_host", "missing_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DOWNTIME_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    WHERE_RUNNING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    QUEUE_HOST_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    container: str
    source: str
    destination: str
    outcome: Outcome
    downtime_ms: float
    total_ms: float
    bytes: Bytes
    phases: _containers.RepeatedCompositeFieldContainer[Phase]
    where_running: str
    error: str
    reason: str
    exit_code: int
    create_time: _timestamp_pb2.Timestamp
    progress: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    queue_position: int
    queue_host: str
    missing_bytes: int
    def __init__(self, name: _Optional[str] = ..., container: _Optional[str] = ..., source: _Optional[str] = ..., destination: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., downtime_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., bytes: _Optional[_Union[Bytes, _Mapping]] = ..., phases: _Optional[_Iterable[_Union[Phase, _Mapping]]] = ..., where_running: _Optional[str] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ..., exit_code: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., progress: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., queue_position: _Optional[int] = ..., queue_host: _Optional[str] = ..., missing_bytes: _Optional[int] = ...) -> None: ...

class CreateMigrationRequest(_message.Message):
    __slots__ = ("container", "destination", "check_only", "timeout_ms", "bandwidth_bytes_per_second", "verify", "max_downtime_ms", "on_no_converge", "snapshots")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    CHECK_ONLY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    MAX_DOWNTIME_MS_FIELD_NUMBER: _ClassVar[int]
    ON_NO_CONVERGE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    container: str
    destination: str
    check_only: bool
    timeout_ms: int
    bandwidth_bytes_per_second: int
    verify: bool
    max_downtime_ms: int
    on_no_converge: OnNoConverge
    snapshots: SnapshotHandling
    def __init__(self, container: _Optional[str] = ..., destination: _Optional[str] = ..., check_only: _Optional[bool] = ..., timeout_ms: _Optional[int] = ..., bandwidth_bytes_per_second: _Optional[int] = ..., verify: _Optional[bool] = ..., max_downtime_ms: _Optional[int] = ..., on_no_converge: _Optional[_Union[OnNoConverge, str]] = ..., snapshots: _Optional[_Union[SnapshotHandling, str]] = ...) -> None: ...

class CreateMigrationResponse(_message.Message):
    __slots__ = ("migration",)
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    migration: Migration
    def __init__(self, migration: _Optional[_Union[Migration, _Mapping]] = ...) -> None: ...

class GetMigrationRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetMigrationResponse(_message.Message):
    __slots__ = ("migration",)
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    migration: Migration
    def __init__(self, migration: _Optional[_Union[Migration, _Mapping]] = ...) -> None: ...

class ListMigrationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMigrationsResponse(_message.Message):
    __slots__ = ("migrations",)
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    migrations: _containers.RepeatedCompositeFieldContainer[Migration]
    def __init__(self, migrations: _Optional[_Iterable[_Union[Migration, _Mapping]]] = ...) -> None: ...

class CancelMigrationRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CancelMigrationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchMigrationRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchMigrationResponse(_message.Message):
    __slots__ = ("migration",)
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    migration: Migration
    def __init__(self, migration: _Optional[_Union[Migration, _Mapping]] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("container", "migration", "epoch", "side", "host", "peer", "since_time", "heard_time", "heard", "peer_answers", "answer")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    SINCE_TIME_FIELD_NUMBER: _ClassVar[int]
    HEARD_TIME_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    PEER_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    container: str
    migration: str
    epoch: int
    side: HandoverSide
    host: str
    peer: str
    since_time: _timestamp_pb2.Timestamp
    heard_time: _timestamp_pb2.Timestamp
    heard: str
    peer_answers: bool
    answer: str
    def __init__(self, container: _Optional[str] = ..., migration: _Optional[str] = ..., epoch: _Optional[int] = ..., side: _Optional[_Union[HandoverSide, str]] = ..., host: _Optional[str] = ..., peer: _Optional[str] = ..., since_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., heard_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., heard: _Optional[str] = ..., peer_answers: _Optional[bool] = ..., answer: _Optional[str] = ...) -> None: ...

class GetHandoverRequest(_message.Message):
    __slots__ = ("container",)
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    container: str
    def __init__(self, container: _Optional[str] = ...) -> None: ...

class GetHandoverResponse(_message.Message):
    __slots__ = ("handover",)
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    handover: Handover
    def __init__(self, handover: _Optional[_Union[Handover, _Mapping]] = ...) -> None: ...

class ResolveHandoverRequest(_message.Message):
    __slots__ = ("container", "epoch", "keep")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    container: str
    epoch: int
    keep: Keep
    def __init__(self, container: _Optional[str] = ..., epoch: _Optional[int] = ..., keep: _Optional[_Union[Keep, str]] = ...) -> None: ...

class ResolveHandoverResponse(_message.Message):
    __slots__ = ("handover",)
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    handover: Handover
    def __init__(self, handover: _Optional[_Union[Handover, _Mapping]] = ...) -> None: ...
