"""Specs that cannot become a container, and what a container in each state refuses."""

import pytest

from agent.container_records import Record, State
from agent.specs import MAXIMUM_VOLUMES, check_arrival, complete
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


def test_a_volume_is_as_many_whole_blocks_as_were_asked_for() -> None:
    """400 MB are no multiple of 4096 bytes; what a destination is told is what it takes."""
    asked = volumes(2)
    asked.volumes[0].size_bytes, asked.volumes[1].size_bytes = 10**9, 400 * 10**6
    made = complete("a", asked, "xfs")
    assert [volume.size_bytes for volume in made.volumes] == [1_000_001_536, 400_003_072]
    check_arrival("a", made)


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
