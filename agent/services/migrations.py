"""MigrationService: migrations away from this host."""

from collections.abc import Iterator

import grpc

from agent.migrations import Migrations
from migrator.v1 import migration_pb2 as pb
from migrator.v1 import migration_pb2_grpc


class MigrationService(migration_pb2_grpc.MigrationServiceServicer):
    """See proto/migrator/v1/migration.proto."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations

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

    def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchMigrationResponse]:
        for migration in self._migrations.watch(request.name, context.is_active):
            yield pb.WatchMigrationResponse(migration=migration)
