from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ContainerVolume(_message.Message):
    __slots__ = ("container", "mount_point", "size_bytes", "allocated_bytes", "filesystem")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILESYSTEM_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    size_bytes: int
    allocated_bytes: int
    filesystem: str
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ..., size_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., filesystem: _Optional[str] = ...) -> None: ...

class ListVolumesRequest(_message.Message):
    __slots__ = ("container",)
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    container: str
    def __init__(self, container: _Optional[str] = ...) -> None: ...

class ListVolumesResponse(_message.Message):
    __slots__ = ("volumes",)
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    volumes: _containers.RepeatedCompositeFieldContainer[ContainerVolume]
    def __init__(self, volumes: _Optional[_Iterable[_Union[ContainerVolume, _Mapping]]] = ...) -> None: ...

class ResizeVolumeRequest(_message.Message):
    __slots__ = ("container", "mount_point", "size_bytes")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    size_bytes: int
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ResizeVolumeResponse(_message.Message):
    __slots__ = ("volume",)
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    volume: ContainerVolume
    def __init__(self, volume: _Optional[_Union[ContainerVolume, _Mapping]] = ...) -> None: ...

class ExportVolumeRequest(_message.Message):
    __slots__ = ("container", "mount_point", "format", "snapshot")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    format: str
    snapshot: str
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ..., format: _Optional[str] = ..., snapshot: _Optional[str] = ...) -> None: ...

class ExportedFile(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ExportedPiece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ExportVolumeResponse(_message.Message):
    __slots__ = ("progress", "file", "piece")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    progress: str
    file: ExportedFile
    piece: ExportedPiece
    def __init__(self, progress: _Optional[str] = ..., file: _Optional[_Union[ExportedFile, _Mapping]] = ..., piece: _Optional[_Union[ExportedPiece, _Mapping]] = ...) -> None: ...

class CheckVolumeRequest(_message.Message):
    __slots__ = ("container", "mount_point")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ...) -> None: ...

class CheckedVolume(_message.Message):
    __slots__ = ("container", "mount_point", "filesystem", "problem", "repaired")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    FILESYSTEM_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    filesystem: str
    problem: str
    repaired: bool
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ..., filesystem: _Optional[str] = ..., problem: _Optional[str] = ..., repaired: _Optional[bool] = ...) -> None: ...

class CheckVolumeResponse(_message.Message):
    __slots__ = ("progress", "volume")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    progress: str
    volume: CheckedVolume
    def __init__(self, progress: _Optional[str] = ..., volume: _Optional[_Union[CheckedVolume, _Mapping]] = ...) -> None: ...

class RepairVolumeRequest(_message.Message):
    __slots__ = ("container", "mount_point")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    MOUNT_POINT_FIELD_NUMBER: _ClassVar[int]
    container: str
    mount_point: str
    def __init__(self, container: _Optional[str] = ..., mount_point: _Optional[str] = ...) -> None: ...

class RepairVolumeResponse(_message.Message):
    __slots__ = ("progress", "volume")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VOLUME_FIELD_NUMBER: _ClassVar[int]
    progress: str
    volume: CheckedVolume
    def __init__(self, progress: _Optional[str] = ..., volume: _Optional[_Union[CheckedVolume, _Mapping]] = ...) -> None: ...
