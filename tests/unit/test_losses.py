"""What is noted of a container that has ended without anybody having seen how."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent import container_records
from agent.container_records import Records, State
from agent.database import Database
from migrator.v1.container_pb2 import ContainerSpec


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with closing(Database(tmp_path / "agent.db", [container_records.SCHEMA])) as database:
        made = Records(database)
        made.insert("ct", ContainerSpec(image="redis"), State.RUNNING)
        yield made


def test_a_loss_is_told_until_it_is_heeded(records: Records) -> None:
    assert records.get("ct").lost_time_ms == 0
    assert records.note_loss("ct").lost_time_ms > 0
    # A restart by its policy is none that an operator has asked for.
    assert records.update("ct", state=State.RUNNING).lost_time_ms > 0
    assert [record.lost_time_ms > 0 for record in records.all()] == [True]
    records.heed_loss("ct")
    assert records.get("ct").lost_time_ms == 0


def test_another_container_of_the_name_has_lost_nothing(records: Records) -> None:
    records.note_loss("ct")
    records.delete("ct")
    assert records.insert("ct", ContainerSpec(image="redis"), State.CREATED).lost_time_ms == 0
