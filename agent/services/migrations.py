"""MigrationService: migrations away from this host."""

from collections.abc import Iterator

import grpc

from agent.handovers import Handovers
from agent.migrations import Migrations
from migrator.v1 import migration_pb2 as pb
from migrator.v1 import migration_pb2_grpc


class MigrationService(migration_pb2_grpc.MigrationServiceServicer):
    """See proto/migrator/v1/migration.proto."""

    def __init__(self, migrations: Migrations, handovers: Handovers) -> None:
        self._migrations = migrations
        self._handovers = handovers

    def CreateMigration(
        self, request: pb.CreateMigrationRequest, context: grpc.ServicerContext
    ) -> pb.CreateMigrationResponse:
        return pb.CreateMigrationResponse(migration=self._migrations.create(request))

    def GetMigration(self, request: pb.GetMigrationRequest, context: grpc.ServicerContext) -> pb.GetMigrationResponse:
        return pb.GetMigrationResponse(migration=self._migrations.get(request.name))

    def ListMigrations(
        self, request: pb.ListMigrationsRequest, context: grpc.ServicerContext
    ) -> pb.ListMigrationsResponse:
        return pb.ListMigrationsResponse(migrations=self._migrations.list())

    def CancelMigration(
        self, request: pb.CancelMigrationRequest, context: grpc.ServicerContext
    ) -> pb.CancelMigrationResponse:
        self._migrations.cancel(request.name)
        return pb.CancelMigrationResponse()

    def GetHandover(self, request: pb.GetHandoverRequest, context: grpc.ServicerContext) -> pb.GetHandoverResponse:
        return pb.GetHandoverResponse(handover=self._handovers.get(request.container))

    def ResolveHandover(
        self, request: pb.ResolveHandoverRequest, context: grpc.ServicerContext
    ) -> pb.ResolveHandoverResponse:
        return pb.ResolveHandoverResponse(
            handover=self._handovers.resolve(request.container, request.epoch, request.keep)
        )

    def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchMigrationResponse]:
        for migration in self._migrations.watch(request.name, context.is_active):
            yield pb.WatchMigrationResponse(migration=migration)
