"""The containers of this host over gRPC. Failures are raised as MigratorError; the server maps them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from agent import logs
from agent.container_records import Record, State
from agent.containers import Containers
from agent.executor import Execution
from agent.room import REASON, RoomGuard
from migrator.errors import InvalidArgument, MigratorError, NotFound
from migrator.v1 import container_pb2 as pb
from migrator.v1 import container_pb2_grpc

DEFAULT_STOP_MS = 10_000
DEFAULT_KILL_SIGNAL = 9
MAX_TIMEOUT_MS = 24 * 3600 * 1000
# Output pieces that a slow client has not taken: then the command waits, as at any full pipe.
OUTPUT_PIECES = 16
TERMINAL_SIZE = (24, 80)


class ContainerService(container_pb2_grpc.ContainerServiceServicer):
    """`migration_of` names the running migration of a container, empty if there is none; `missing_of` the host that has
    memory of it which is not here, and how many bytes."""

    def __init__(
        self,
        containers: Containers,
        host: str,
        migration_of: Callable[[str], str] = lambda name: "",
        room: RoomGuard | None = None,
        missing_of: Callable[[str], tuple[str, int]] = lambda name: ("", 0),
    ) -> None:
        self._containers = containers
        self._room = room
        self._host = host
        self._migration_of = migration_of
        self._missing_of = missing_of

    def describe(self, record: Record) -> pb.Container:
        """A container as clients see it."""
        name = record.name
        message = pb.Container(name=name, spec=record.spec, state=record.state.message, host=self._host)
        message.create_time.CopyFrom(_timestamp(record.create_time_ms * 1_000_000))
        if record.start_time_ms:
            message.start_time.CopyFrom(_timestamp(record.start_time_ms * 1_000_000))
        if record.state.is_live:
            message.pid = record.init_pid
            message.memory_bytes = self._containers.cgroup(name).memory_bytes()
        elif record.exit_code is not None:
            message.exit_code = record.exit_code
        if record.state is not State.ARRIVING:
            for volume, allocated in zip(message.spec.volumes, self._containers.disk_bytes(name), strict=True):
                volume.allocated_bytes = allocated
                message.disk_bytes += allocated
        message.migration = self._migration_of(name)
        message.pulls_from, message.missing_bytes = self._missing_of(name)
        message.restarts = record.restarts
        if record.lost_time_ms:
            message.lost_time.CopyFrom(_timestamp(record.lost_time_ms * 1_000_000))
        if record.state is State.PAUSED and self._room is not None and name in self._room.pauses():
            message.pause_reason = REASON
        return message

    def CreateContainer(
        self, request: pb.CreateContainerRequest, context: grpc.ServicerContext
    ) -> pb.CreateContainerResponse:
        record = self._containers.create(request.name, request.spec)
        return pb.CreateContainerResponse(container=self.describe(record))

    def GetContainer(self, request: pb.GetContainerRequest, context: grpc.ServicerContext) -> pb.GetContainerResponse:
        return pb.GetContainerResponse(container=self.describe(self._containers.record(request.name)))

    def ListContainers(
        self, request: pb.ListContainersRequest, context: grpc.ServicerContext
    ) -> pb.ListContainersResponse:
        return pb.ListContainersResponse(containers=[self.describe(record) for record in self._containers.all()])

    def DeleteContainer(
        self, request: pb.DeleteContainerRequest, context: grpc.ServicerContext
    ) -> pb.DeleteContainerResponse:
        self._containers.delete(request.name, force=request.force)
        return pb.DeleteContainerResponse()

    def StartContainer(
        self, request: pb.StartContainerRequest, context: grpc.ServicerContext
    ) -> pb.StartContainerResponse:
        return pb.StartContainerResponse(container=self.describe(self._containers.start(request.name)))

    def StopContainer(
        self, request: pb.StopContainerRequest, context: grpc.ServicerContext
    ) -> pb.StopContainerResponse:
        timeout_ms = request.timeout_ms or DEFAULT_STOP_MS
        if not 0 < timeout_ms <= MAX_TIMEOUT_MS:
            raise InvalidArgument(f"a timeout of {timeout_ms} ms is not between 1 ms and a day")
        return pb.StopContainerResponse(container=self.describe(self._containers.stop(request.name, timeout_ms / 1000)))

    def KillContainer(
        self, request: pb.KillContainerRequest, context: grpc.ServicerContext
    ) -> pb.KillContainerResponse:
        self._containers.kill(request.name, request.signal or DEFAULT_KILL_SIGNAL)
        return pb.KillContainerResponse()

    def PauseContainer(
        self, request: pb.PauseContainerRequest, context: grpc.ServicerContext
    ) -> pb.PauseContainerResponse:
        return pb.PauseContainerResponse(container=self.describe(self._containers.pause(request.name)))

    def ResumeContainer(
        self, request: pb.ResumeContainerRequest, context: grpc.ServicerContext
    ) -> pb.ResumeContainerResponse:
        if self._room is not None:
            self._room.check_resume(request.name)
        return pb.ResumeContainerResponse(container=self.describe(self._containers.resume(request.name)))

    def Exec(
        self, request_iterator: Iterator[pb.ExecRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ExecResponse]:
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgument("the first message of an exec has to be its start")
        start = first.start
        size = (start.rows or TERMINAL_SIZE[0], start.columns or TERMINAL_SIZE[1]) if start.terminal else None
        execution = self._containers.execute(
            start.name,
            list(start.command),
            environment=list(start.environment),
            working_directory=start.working_directory,
            user=start.user,
            terminal=size,
        )
        with execution:
            yield from _stream(execution, request_iterator, context)

    def ReadLog(self, request: pb.ReadLogRequest, context: grpc.ServicerContext) -> Iterator[pb.ReadLogResponse]:
        name = self._containers.record(request.name).name
        if request.tail < 0:
            raise InvalidArgument(f"{request.tail} lines cannot be read")

        def goes_on() -> bool:
            return context.is_active() and self._exists(name)

        path = self._containers.paths(name).log
        for entry in logs.read(path, tail=request.tail, follow=goes_on if request.follow else None):
            yield pb.ReadLogResponse(
                time=_timestamp(entry.time_ns), is_error_output=entry.is_error_output, text=entry.text
            )

    def _exists(self, name: str) -> bool:
        try:
            self._containers.record(name)
        except NotFound:
            return False
        return True


def _stream(
    execution: Execution, requests: Iterable[pb.ExecRequest], context: grpc.ServicerContext
) -> Iterator[pb.ExecResponse]:
    """Input from the requests and output to the responses, until the command has ended or the client is gone."""
    output: queue.Queue[pb.ExecResponse | MigratorError] = queue.Queue(OUTPUT_PIECES)
    gone = threading.Event()

    def leave() -> None:
        gone.set()
        execution.hang_up()

    def put(item: pb.ExecResponse | MigratorError) -> None:
        while not gone.is_set():
            try:
                output.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def sink(data: bytes, is_error_output: bool) -> None:
        put(pb.ExecResponse(error_output=data) if is_error_output else pb.ExecResponse(output=data))

    def work() -> None:
        try:
            put(pb.ExecResponse(exit_code=execution.run(sink)))
        except MigratorError as error:
            put(error)

    def listen() -> None:
        try:
            for request in requests:
                _handle(execution, request)
        except (grpc.RpcError, ValueError):
            # The call has ended: its callback sees to the rest.
            return

    if not context.add_callback(leave):
        return
    threading.Thread(target=work, name="exec-output", daemon=True).start()
    threading.Thread(target=listen, name="exec-input", daemon=True).start()
    while not gone.is_set():
        try:
            item = output.get(timeout=0.2)
        except queue.Empty:
            continue
        if isinstance(item, MigratorError):
            raise item
        yield item
        if item.WhichOneof("response") == "exit_code":
            return


def _handle(execution: Execution, request: pb.ExecRequest) -> None:
    match request.WhichOneof("request"):
        case "input":
            execution.write(request.input)
        case "input_end":
            execution.end_input()
        case "resize":
            execution.resize(request.resize.rows, request.resize.columns)


def _timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)
