"""Specs that cannot become a container, and what a container in each state refuses."""

import pytest

from agent.container_records import Record, State
from agent.specs import MAXIMUM_VOLUMES, complete
from migrator.errors import Busy, InvalidArgument, Precondition
from migrator.v1.container_pb2 import ContainerSpec, Interface, PublishedPort, Volume

PORT = PublishedPort(host_port=8080, container_port=80, protocol="tcp")


def volumes(count: int) -> ContainerSpec:
    extra = [Volume(mount_point=f"/v{number}", size_bytes=1 << 30) for number in range(count - 1)]
    return ContainerSpec(image="i", volumes=[Volume(mount_point="/"), *extra])


def test_no_more_volumes_than_a_destination_takes() -> None:
    assert len(complete("a", volumes(MAXIMUM_VOLUMES), "ext4").volumes) == MAXIMUM_VOLUMES
    with pytest.raises(InvalidArgument, match="17 volumes are too many"):
        complete("a", volumes(MAXIMUM_VOLUMES + 1), "ext4")


def test_ports_need_an_address() -> None:
    complete("a", ContainerSpec(image="i", ports=[PORT], interfaces=[Interface(addresses=["auto"])]), "ext4")
    for interfaces in ([], [Interface()]):
        with pytest.raises(InvalidArgument, match="no address"):
            complete("a", ContainerSpec(image="i", ports=[PORT], interfaces=interfaces), "ext4")


def record(state: State) -> Record:
    return Record("a", ContainerSpec(), state, False, 0, 0, None, 0, 0, 0, 0, 0)


def test_a_container_on_its_way_here_is_busy() -> None:
    with pytest.raises(Busy, match="on its way"):
        record(State.ARRIVING).refuse("delete", State.ARRIVING)
    with pytest.raises(Busy, match="on its way"):
        record(State.ARRIVING).require("pause", State.RUNNING)
    with pytest.raises(Precondition, match="it is stopped, not running"):
        record(State.STOPPED).require("pause", State.RUNNING)
    record(State.ARRIVING).require("unreserve", State.ARRIVING)
