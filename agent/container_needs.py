"""What containers are made from, as `agent.containers` needs it: images and addresses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

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
