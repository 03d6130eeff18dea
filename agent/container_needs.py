"""What containers are made from, as `agent.containers` needs it: images, addresses and snapshots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from agent.container_records import Record
from migrator.v1.container_pb2 import ContainerSpec


class Image(Protocol):
    """What a container is cloned from."""

    @property
    def path(self) -> Path: ...

    @property
    def filesystem(self) -> str: ...


class Images(Protocol):
    """The host's images. `get` raises NotFound."""

    def get(self, name: str) -> Image: ...


class Addresses(Protocol):
    """Fills in names, MACs, bridges and automatic addresses, and refuses those that are taken (ADDRESS_IN_USE)."""

    def assign(self, container: str, spec: ContainerSpec, others: Sequence[ContainerSpec]) -> None: ...


class Snapshots(Protocol):
    """The containers' snapshots, which end with them."""

    def settle(self, container: str) -> Record:
        """Carry out a rollback that was begun; returns the container's record as it is then."""

    def delete_all(self, container: str) -> None: ...
