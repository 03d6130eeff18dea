"""ploop folders and deltas: chains give the right bytes, and whatever is damaged is refused with a reason."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.extents import Range
from blockdev.formats import descriptor, ploop
from blockdev.formats.disk import copy
from blockdev.formats.errors import FormatError
from tests import disk_kit
from tests.disk_kit import NONE, TOP, DeltaSpec, chain_folder, guid

CLUSTER = 4096
KIB = 1024


def pattern(seed: int, clusters: int, holes: int = 3) -> bytes:
    """Clusters that differ from one another, every third a hole."""
    return b"".join(
        bytes(CLUSTER) if index % holes == 0 else bytes([seed, index % 251]) * (CLUSTER // 2)
        for index in range(clusters)
    )


def changed(state: bytes, seed: int, indices: list[int]) -> bytes:
    data = bytearray(state)
    for index in indices:
        data[index * CLUSTER : (index + 1) * CLUSTER] = bytes([seed, 255]) * (CLUSTER // 2)
    return bytes(data)


def whole(folder: Path, snapshot: str = "") -> bytes:
    with ploop.opened(folder, snapshot) as disk:
        data = bytearray(disk.size_bytes)
        for part in disk.ranges(0, disk.size_bytes):
            data[part.start : part.end] = disk.read(part.start, part.length)
        assert bytes(data) == disk.read(0, disk.size_bytes)
        return bytes(data)


def single(folder: Path, spec: DeltaSpec) -> Path:
    path = folder / "single.hds"
    path.write_bytes(disk_kit.delta(spec))
    return path


SPEC = DeltaSpec({0: b"zero", 2: b"two", 5: b"five"}, 7)


@pytest.mark.parametrize("versions", [(2, 2, 2), (1, 1, 1), (1, 2, 1)])
def test_a_chain_of_three_with_its_snapshots(tmp_path: Path, versions: tuple[int, int, int]) -> None:
    first = pattern(1, 40)
    second = changed(first, 2, [0, 1, 17])
    # Zeros that are written over data hide what is below.
    third = changed(second, 3, [1, 39])[: 20 * CLUSTER] + bytes(CLUSTER) + changed(second, 3, [1, 39])[21 * CLUSTER :]
    guids = chain_folder(tmp_path / "disk", [first, second, third], versions=versions)
    assert whole(tmp_path / "disk") == third
    assert whole(tmp_path / "disk", TOP.upper()) == third
    assert whole(tmp_path / "disk", guids[0]) == first
    assert whole(tmp_path / "disk", guids[1].strip("{}")) == second


def test_a_disk_that_grew_between_snapshots(tmp_path: Path) -> None:
    first = pattern(1, 10)
    second = changed(first.ljust(30 * CLUSTER, b"\0"), 9, [3, 29])
    guids = chain_folder(tmp_path / "disk", [first, second])
    assert whole(tmp_path / "disk") == second
    assert whole(tmp_path / "disk", guids[0]) == first


def test_a_plain_disk_is_as_quick_to_look_through_as_it_is_empty(tmp_path: Path) -> None:
    """With the clusters that its descriptor tells of this would take days."""
    size_bytes = 1 << 43
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/DiskDescriptor.xml").write_bytes(
        disk_kit.descriptor(size_bytes, [(TOP, "Plain", "root.hds")], [(TOP, NONE)], cluster_sectors=1)
    )
    with (tmp_path / "disk/root.hds").open("wb") as file:
        os.pwrite(file.fileno(), b"here" * KIB, size_bytes // 2)
        os.truncate(file.fileno(), size_bytes)
    with ploop.opened(tmp_path / "disk") as disk:
        assert list(disk.ranges(0, size_bytes)) == [Range(size_bytes // 2, size_bytes // 2 + 4096)]
        assert disk.read(size_bytes // 2 - 1, 5) == b"\0here"


def test_a_file_that_is_longer_than_any_disk_takes_no_memory(tmp_path: Path) -> None:
    path = single(tmp_path, SPEC)
    os.truncate(path, 1 << 43)
    with pytest.raises(FormatError, match="long enough for"), ploop.opened_delta(path):
        pass


def test_a_plain_base(tmp_path: Path) -> None:
    base = pattern(4, 12)
    top = changed(base, 5, [2, 11])
    chain_folder(tmp_path / "disk", [base, top])
    (tmp_path / "disk/root.hds").write_bytes(base)
    text = (tmp_path / "disk/DiskDescriptor.xml").read_text()
    (tmp_path / "disk/DiskDescriptor.xml").write_text(text.replace("Compressed", "Plain", 1))
    assert whole(tmp_path / "disk") == top
    assert whole(tmp_path / "disk", guid(1)) == base


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain_gives_the_bytes_of_each_state(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, 24))
    states = [data.draw(st.binary(min_size=clusters, max_size=clusters))]
    for _ in range(data.draw(st.integers(0, 3))):
        state = bytearray(states[-1])
        for index in data.draw(st.lists(st.integers(0, clusters - 1), max_size=5)):
            state[index] = data.draw(st.integers(0, 255))
        states.append(bytes(state))
    full = [b"".join(bytes([value]) * CLUSTER for value in state) for state in states]
    versions = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(full), max_size=len(full)))
    folder = tmp_path_factory.mktemp("chain") / "disk"
    guids = chain_folder(folder, full, versions=versions)
    for name, content in zip(guids, full, strict=True):
        assert whole(folder, name) == content
    offset = data.draw(st.integers(0, clusters * CLUSTER - 1))
    length = data.draw(st.integers(0, clusters * CLUSTER - offset))
    with ploop.opened(folder) as disk:
        assert disk.read(offset, length) == full[-1][offset : offset + length]
    shutil.rmtree(folder)


def test_what_is_copied_is_sparse(tmp_path: Path) -> None:
    data = pattern(1, 64)
    chain_folder(tmp_path / "disk", [data])
    target = tmp_path / "raw"
    target.touch()
    os.truncate(target, 32 * CLUSTER)
    with ploop.opened(tmp_path / "disk") as disk:
        copy(disk, Range(16 * CLUSTER, 48 * CLUSTER), target)
    assert target.read_bytes() == data[16 * CLUSTER : 48 * CLUSTER]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cut_bytes": 1}, "cut off"),
        ({"cut_bytes": 3 * CLUSTER}, "cut off"),
        ({"cut_bytes": 4 * CLUSTER - 20}, "cut off"),
        ({"magic": b"WithNoSpaceAtAll"}, "no ploop image"),
        ({"kind": 1}, "type 1"),
        ({"entries": {3: 77}}, "it is cut off or damaged"),
        ({"entries": {3: 0xFFFFFFFF}}, "it is cut off or damaged"),
        ({"entries": {6: 1, 5: 1}}, "used twice"),
        ({"cluster_sectors": 8, "entries": {3: 9}, "version": 1}, "no cluster's begin"),
        ({"in_use": 0x746F6E59}, "was not closed"),
        ({"in_use": 5}, "unknown mark"),
        ({"flags": 2}, "conversion"),
        ({"count": 6}, "table of 6"),
        ({"count": 0xFFFFFFFF}, "table of 4294967295"),
        ({"sectors": 0}, "cannot be"),
        ({"sectors": 1 << 60}, "cannot be"),
    ],
)
def test_damaged_deltas_are_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with ploop.opened_delta(single(tmp_path, SPEC)) as disk:
        assert disk.read(2 * CLUSTER, 3) == b"two"
    with pytest.raises(FormatError, match=reason), ploop.opened_delta(single(tmp_path, SPEC.but(**changes))):
        pass


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_changed_anywhere_do_no_harm(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It is refused, or read within its bounds: never another error, never more than there is."""
    image = bytearray(disk_kit.delta(SPEC.but(version=data.draw(st.sampled_from([1, 2])))))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, 95))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(image)))
    path = tmp_path_factory.mktemp("fuzz") / "image"
    path.write_bytes(image[:length] if data.draw(st.booleans()) else image)
    try:
        with ploop.opened_delta(path) as disk:
            assert disk.size_bytes <= 7 * (1 << 26) * 64
            for part in disk.ranges(0, min(disk.size_bytes, 1 << 20)):
                assert len(disk.read(part.start, part.length)) == part.length
    except FormatError:
        pass
    finally:
        shutil.rmtree(path.parent)


IMAGES = [(guid(1), "Compressed", "root.hds"), (TOP, "Compressed", "root.hds.top")]
SHOTS = [(guid(1), NONE), (TOP, guid(1))]


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"", "not XML"),
        (b"<Disk", "not XML"),
        (b"<Disk_image/>", "Disk_size is missing"),
        (b"<a>" * 100 + b"</a>" * 100, "nested"),
        (disk_kit.descriptor(4096, IMAGES, [(guid(1), TOP), (TOP, guid(1))]), "circle"),
        (disk_kit.descriptor(4096, IMAGES, [(guid(1), NONE), (TOP, TOP)]), "circle"),
        (disk_kit.descriptor(4096, IMAGES, [(guid(1), NONE), (TOP, guid(7))]), "of which there is no image"),
        (disk_kit.descriptor(4096, IMAGES, [*SHOTS, SHOTS[0]]), "there twice"),
        (disk_kit.descriptor(4096, IMAGES, SHOTS[:1]), "in no snapshot"),
        (disk_kit.descriptor(4096, [*IMAGES, IMAGES[0]], SHOTS), "there twice"),
        (disk_kit.descriptor(4096, IMAGES, SHOTS, top=guid(8)), "no image of the newest"),
        (disk_kit.descriptor(4096, IMAGES, SHOTS, top="x"), "not a GUID"),
        (disk_kit.descriptor(4096, [], []), "0 images"),
        (disk_kit.descriptor(4096, [(TOP, "Encrypted", "f")], []), "of type"),
        (disk_kit.descriptor(4096, [(TOP, "Compressed", "../etc/passwd")], []), "not the name of a file"),
        (disk_kit.descriptor(4096, [(TOP, "Compressed", "/etc/passwd")], []), "not the name of a file"),
        (disk_kit.descriptor(4096, [(TOP, "Compressed", "..")], []), "not the name of a file"),
        (disk_kit.descriptor(4096, [(guid(1), "Plain", "a"), (TOP, "Plain", "b")], SHOTS), "plain and has a parent"),
        (disk_kit.descriptor(4096, [(guid(1), "Plain", "a"), (TOP, "Plain", "a")], SHOTS), "stands for two"),
        (disk_kit.descriptor(4096, IMAGES, SHOTS).replace(b"<Disk_size>8", b"<Disk_size>-8"), "not a number"),
        (disk_kit.descriptor(4096, IMAGES, SHOTS).replace(b"UTF-8", b"KLINGON"), "not XML"),
        (
            disk_kit.descriptor(
                4096, IMAGES, SHOTS, prologue='<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;"><!ENTITY e "&d;&d;">]>'
            ),
            "document type",
        ),
        (
            disk_kit.descriptor(4096, IMAGES, SHOTS, prologue='<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'),
            "document type",
        ),
        (disk_kit.descriptor(4096, IMAGES, SHOTS).ljust(2 << 20), "that cannot be"),
    ],
)
def test_damaged_descriptors_are_refused(xml: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        descriptor.parse(xml).chain()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12), st.integers(0, 700), st.integers(0, 40))
def test_a_descriptor_changed_anywhere_is_parsed_or_refused(junk: bytes, at: int, length: int) -> None:
    xml = disk_kit.descriptor(4096, IMAGES, SHOTS)
    try:
        chain = descriptor.parse(xml[:at] + junk + xml[at + length :]).chain()
    except FormatError:
        return
    assert all("/" not in delta.file for delta in chain)


def test_a_descriptor_without_snapshots() -> None:
    found = descriptor.parse(disk_kit.descriptor(8192, [(guid(3), "Compressed", "root.hds")], [], top=guid(3)))
    assert [delta.file for delta in found.chain()] == ["root.hds"]


def test_our_own_descriptor_is_understood() -> None:
    found = descriptor.parse(descriptor.write(64 << 20, "root.hds"))
    assert (found.size_bytes, found.cluster_bytes, found.top) == (64 << 20, 1 << 20, TOP)
    assert [delta.file for delta in found.chain()] == ["root.hds"]


def test_snapshots_that_are_not_there(tmp_path: Path) -> None:
    chain_folder(tmp_path / "disk", [pattern(1, 4)])
    for wanted, reason in ((guid(77), "no snapshot"), ("rm -rf", "not a GUID")):
        with pytest.raises(FormatError, match=reason), ploop.opened(tmp_path / "disk", wanted):
            pass


def test_files_that_lead_elsewhere(tmp_path: Path) -> None:
    """A delta that is a link, a pipe, a folder or not there; a descriptor that says another size; other clusters."""
    data = pattern(1, 8)
    secret = tmp_path / "secret"
    secret.write_bytes(disk_kit.delta(SPEC))

    def refused(reason: str) -> None:
        with pytest.raises(FormatError, match=reason), ploop.opened(folder):
            pass
        shutil.rmtree(folder)

    folder = tmp_path / "disk"
    for spoil, reason in (
        (lambda path: path.symlink_to(secret), "cannot be opened"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: None, "cannot be opened"),
    ):
        chain_folder(folder, [data])
        (folder / "root.hds").unlink()
        spoil(folder / "root.hds")
        refused(reason)
    chain_folder(folder, [data])
    xml = (folder / "DiskDescriptor.xml").read_bytes()
    (folder / "DiskDescriptor.xml").write_bytes(xml.replace(b"<Disk_size>64<", b"<Disk_size>128<"))
    refused("gives the disk")
    chain_folder(folder, [data])
    (folder / "DiskDescriptor.xml").write_bytes(xml.replace(b"<Blocksize>8<", b"<Blocksize>16<"))
    refused("has clusters of")
    folder.mkdir()
    refused("DiskDescriptor.xml cannot be opened")


def test_images_of_qemu(tmp_path: Path) -> None:
    """What qemu-img writes is read as qemu-img reads it, and what is merged here it reads the same."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    raw = tmp_path / "a.raw"
    raw.touch()
    os.truncate(raw, 9 << 20)
    with raw.open("r+b") as file:
        for at in (0, 1 << 20, (5 << 20) + 7, (9 << 20) - 100):
            file.seek(at)
            file.write(os.urandom(100))
    hds = tmp_path / "a.hds"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "parallels", raw, hds], check=True)
    with ploop.opened_delta(hds) as disk:
        assert disk.read(0, disk.size_bytes) == raw.read_bytes()
    ours = tmp_path / "ours.hds"
    ours.write_bytes(disk_kit.delta(DeltaSpec(disk_kit.split(raw.read_bytes(), 1 << 20), 9, 2048)))
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "parallels", raw, ours], check=True, capture_output=True)
