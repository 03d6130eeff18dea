"""HostService: what this host is, whom it knows, and what it lacks."""

import grpc

from agent import doctor
from agent.config import Config
from agent.findings import Severity
from agent.hosts import Hosts
from migrator.v1 import host_pb2 as pb
from migrator.v1 import host_pb2_grpc

SEVERITIES = {
    Severity.OK: pb.SEVERITY_OK,
    Severity.WARNING: pb.SEVERITY_WARNING,
    Severity.PROBLEM: pb.SEVERITY_PROBLEM,
}


class HostService(host_pb2_grpc.HostServiceServicer):
    """See proto/migrator/v1/host.proto."""

    def __init__(self, hosts: Hosts, config: Config) -> None:
        self._hosts = hosts
        self._config = config

    def GetHost(self, request: pb.GetHostRequest, context: grpc.ServicerContext) -> pb.GetHostResponse:
        return pb.GetHostResponse(host=self._hosts.here())

    def ListHosts(self, request: pb.ListHostsRequest, context: grpc.ServicerContext) -> pb.ListHostsResponse:
        return pb.ListHostsResponse(hosts=self._hosts.all())

    def Diagnose(self, request: pb.DiagnoseRequest, context: grpc.ServicerContext) -> pb.DiagnoseResponse:
        return pb.DiagnoseResponse(
            findings=[
                pb.Finding(
                    subject=finding.subject,
                    severity=SEVERITIES[finding.severity],
                    message=finding.message,
                    remedy=finding.remedy,
                )
                for finding in doctor.diagnose(self._config)
            ]
        )
