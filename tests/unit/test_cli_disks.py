"""`migrator image import` and `migrator volume` against an agent that is real gRPC and otherwise made up."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.cli import images, transfer
from migrator.cli.main import main
from migrator.errors import InvalidArgument, PeerError
from migrator.v1 import image_pb2
from tests.fakes.agent import FakeAgent

MIB = 1 << 20


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(str(tmp_path / "agent.sock"))
    yield fake
    fake.close()


def run(agent: FakeAgent, *words: str) -> Result:
    return CliRunner().invoke(main, ["--socket", agent.socket, *words], catch_exceptions=False)


def test_import_names_what_it_means(agent: FakeAgent) -> None:
    done = run(agent, "image", "import", "web", "disk.raw", "--format", "raw", "--partition", "0", "--keep-identity")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "web\n", "copying ext4\n")
    (sent,) = agent.images.imports
    assert (sent.name, sent.path, sent.format, sent.filesystem) == ("web", str(Path.cwd() / "disk.raw"), "raw", "")
    assert sent.HasField("partition") and sent.partition == 0 and sent.keep_identity


def test_import_leaves_open_what_was_not_said(agent: FakeAgent) -> None:
    assert run(agent, "image", "import", "web", "/vz/root.hdd", "--snapshot", "{5}").exit_code == 0
    (sent,) = agent.images.imports
    assert not sent.HasField("partition") and (sent.format, sent.snapshot) == ("", "{5}")
    assert run(agent, "image", "import", "web", "x", "--format", "vmdk").exit_code == 2
    assert run(agent, "image", "import", "web", "x", "--partition", "-1").exit_code == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5 * MIB), st.binary(min_size=1, max_size=3)), max_size=6))
def test_uploads_keep_the_bytes(tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]) -> None:
    path = tmp_path_factory.mktemp("upload") / "file"
    path.touch()
    os.truncate(path, 5 * MIB + 17)
    with path.open("r+b") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
    found = bytearray(path.stat().st_size)
    first, begun, *pieces = images._upload(image_pb2.ImportImageRequest(name="x"), [path])
    assert first.start.name == "x" and begun.file.size_bytes == len(found)
    for request in pieces:
        assert len(request.piece.data) <= MIB
        found[request.piece.offset : request.piece.offset + len(request.piece.data)] = request.piece.data
    assert bytes(found) == path.read_bytes()
    path.unlink()


def test_what_is_sent_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("b")
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert [path.name for path in transfer.files_of(tmp_path)] == ["a", "b"]
    for path in (tmp_path / "none", tmp_path / "pipe", tmp_path / "folder"):
        with pytest.raises(InvalidArgument):
            transfer.files_of(path)


def test_volumes_are_listed(agent: FakeAgent) -> None:
    assert json.loads(run(agent, "volume", "ls", "-o", "json").stdout) == [
        {
            "container": "ct101",
            "mount_point": "/",
            "size_bytes": 1 << 30,
            "allocated_bytes": 1 << 20,
            "filesystem": "ext4",
        }
    ]
    assert run(agent, "volume", "ls").stdout.splitlines()[1].split() == ["ct101", "/", "1GiB", "1MiB", "ext4"]


@pytest.mark.parametrize(
    ("volume", "mount_point"), [("ct101", "/"), ("ct101:/data", "/data"), ("ct101:/a:b", "/a:b"), ("ct101:/", "/")]
)
def test_resize(agent: FakeAgent, volume: str, mount_point: str) -> None:
    assert run(agent, "volume", "resize", volume, "20GiB").stdout == f"ct101:{mount_point} has 20GiB\n"
    answer = json.loads(run(agent, "volume", "resize", volume, "20GiB", "-o", "json").stdout)
    assert (answer["mount_point"], answer["size_bytes"]) == (mount_point, 20 << 30)


def test_resize_refused(agent: FakeAgent) -> None:
    for words in (["CT", "1GiB"], ["ct101:data", "1GiB"], ["ct101", "-1"], ["ct101", "much"]):
        assert run(agent, "volume", "resize", *words).exit_code == 2
    done = run(agent, "volume", "resize", "full", "1TiB", "-o", "json")
    assert (done.exit_code, json.loads(done.stdout)["error"]["reason"]) == (3, "NO_SPACE")


def test_export_to_a_file_and_to_a_folder(agent: FakeAgent, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(agent, "volume", "export", "ct101", str(out / "a.qcow2"), "--format", "qcow2")
    assert done.exit_code == 2 and "there is no folder" in done.stderr
    out.mkdir()
    done = run(agent, "volume", "export", "ct101", str(out / "a.qcow2"), "--format", "qcow2")
    assert (done.exit_code, done.stdout) == (0, f"{out / 'a.qcow2'}\n")
    file = out / "a.qcow2"
    assert file.read_bytes() == bytes(MIB) + b"x" * 100 + bytes(2 * MIB - 100)
    assert file.stat().st_blocks * 512 < MIB
    done = run(agent, "volume", "export", "ct101", str(out / "a.hdd"), "--format", "ploop", "-o", "json")
    assert json.loads(done.stdout)["written_bytes"] == 103
    assert sorted(path.name for path in (out / "a.hdd").iterdir()) == ["DiskDescriptor.xml", "root.hds"]
    assert sorted(path.name for path in out.iterdir()) == ["a.hdd", "a.qcow2"]


@pytest.mark.parametrize("words", [["broken"], ["evil", "--format", "ploop"], ["broken", "--format", "ploop"]])
def test_a_broken_export_leaves_nothing(agent: FakeAgent, tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run(agent, "volume", "export", *words, str(out / "a")).exit_code == 1
    assert list(out.iterdir()) == []


def test_an_export_overwrites_nothing(agent: FakeAgent, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a", "link"):
        assert run(agent, "volume", "export", "ct101", str(tmp_path / name)).exit_code == 2
    assert (tmp_path / "a").read_text() == "precious"


def test_pieces_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    download = transfer.Download(tmp_path / "a", is_folder=False)
    with pytest.raises(PeerError):
        download.write(0, b"x")
    download.begin("a", 10)
    for offset in (-1, 10, 1 << 62):
        with pytest.raises(PeerError):
            download.write(offset, b"x")
    download.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_check_names_what_is_damaged_and_exits_with_3(agent: FakeAgent) -> None:
    done = run(agent, "volume", "check", "ct101")
    assert (done.exit_code, done.stderr) == (0, "checking ct101\n")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["ct101", "/", "ext4", "whole"],
        ["ct101", "/data", "ext4", "whole"],
    ]
    done = run(agent, "volume", "check", "broken")
    assert done.exit_code == 3
    assert "damaged" in done.stdout
    assert "broken:/data: wrong count" in done.stderr
    assert run(agent, "volume", "check", "broken:/").exit_code == 0
    done = run(agent, "volume", "check", "broken:/data", "--repair", "-o", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == [
        {
            "container": "broken",
            "mount_point": "/data",
            "filesystem": "ext4",
            "problem": "wrong count",
            "repaired": True,
            "state": "repaired",
        }
    ]
    assert run(agent, "volume", "check", "broken:data").exit_code == 2
