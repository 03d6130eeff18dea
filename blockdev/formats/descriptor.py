"""DiskDescriptor.xml: which files a ploop disk consists of, and the tree of its snapshots.

Elements as OpenVZ's ploop writes them (lib/xml.c): Disk_Parameters, StorageData/Storage/Image, Snapshots/Shot. Every
snapshot is the delta of the same GUID over its parents; TopGUID is the state that is written to.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, TreeBuilder, tostring
from xml.parsers import expat

from blockdev.formats.errors import FormatError

FILE = "DiskDescriptor.xml"
TOP_GUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
NO_GUID = "{00000000-0000-0000-0000-000000000000}"
LARGEST_BYTES = 1 << 20
DEEPEST = 16
MOST_DELTAS = 256
SECTOR_BYTES = 512
CLUSTER_SECTORS = 2048

_GUID = re.compile(r"\{?([0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\}?")


@dataclass(frozen=True)
class DeltaFile:
    """One file of the disk; a plain one holds the disk byte by byte and can only be the lowest."""

    guid: str
    file: str
    is_plain: bool


@dataclass(frozen=True)
class Descriptor:
    """A checked descriptor: every GUID has a file, and every file a parent or none."""

    size_bytes: int
    cluster_bytes: int
    top: str
    files: Mapping[str, DeltaFile]
    parents: Mapping[str, str]

    def chain(self, snapshot: str = "") -> list[DeltaFile]:
        """The files from the lowest to that of the snapshot, or to the newest. Raises FormatError."""
        at = parse_guid(snapshot) if snapshot else self.top
        if at not in self.files:
            known = ", ".join(self.files)
            raise FormatError(f"the disk has no snapshot {at}: it has {known}")
        chain: list[DeltaFile] = []
        while at != NO_GUID:
            if len(chain) == len(self.files):
                raise FormatError(f"{FILE}: the parents of {at} go round in a circle")
            if at not in self.files:
                raise FormatError(f"{FILE}: {chain[-1].guid} has the parent {at}, of which there is no image")
            chain.append(self.files[at])
            at = self.parents[at]
        chain.reverse()
        for delta in chain[1:]:
            if delta.is_plain:
                raise FormatError(f"{FILE}: {delta.file} is plain and has a parent: that cannot be")
        return chain


def parse_guid(text: str) -> str:
    """A GUID in lower case and braces. Raises FormatError."""
    match = _GUID.fullmatch(text.strip())
    if match is None:
        raise FormatError(f"{text!r} is not a GUID such as {TOP_GUID}")
    return f"{{{match[1].lower()}}}"


def parse(data: bytes) -> Descriptor:
    """Parse and check. Raises FormatError; document types and entities are refused, whatever they say."""
    root = _tree(data)
    size = _number(_text(root, "Disk_Parameters/Disk_size"), "Disk_size")
    storages = root.findall("StorageData/Storage")
    if root.find("StorageData/Volume/Parent") is not None:
        raise FormatError(f"{FILE}: the disk has a parent volume in another folder: merge it there first")
    if root.find("Disk_Parameters/Encryption/KeyId") is not None:
        raise FormatError(f"{FILE}: the disk is encrypted: decrypt it first")
    if len(storages) != 1:
        raise FormatError(f"{FILE}: the disk is split into {len(storages)} parts: only whole ones are understood")
    block = storages[0].find("Blocksize")
    cluster_sectors = _number(block.text or "", "Blocksize") if block is not None else CLUSTER_SECTORS
    files = _files(storages[0])
    parents: dict[str, str] = {}
    for shot in root.findall("Snapshots/Shot"):
        guid = parse_guid(_text(shot, "GUID"))
        if guid in parents:
            raise FormatError(f"{FILE}: snapshot {guid} is there twice")
        parents[guid] = parse_guid(_text(shot, "ParentGUID"))
    top = root.find("Snapshots/TopGUID")
    if not parents and len(files) == 1:
        # As ploop wrote it before the first snapshot.
        parents = dict.fromkeys(files, NO_GUID)
    for guid in files:
        if guid not in parents:
            raise FormatError(f"{FILE}: image {guid} is in no snapshot")
    if top is not None and top.text:
        newest = parse_guid(top.text)
    else:
        newest = TOP_GUID if TOP_GUID in files else next(iter(files)) if len(files) == 1 else ""
    if newest not in files:
        raise FormatError(f"{FILE}: there is no image of the newest state, TopGUID {newest or 'is missing'}")
    return Descriptor(size * SECTOR_BYTES, cluster_sectors * SECTOR_BYTES, newest, files, parents)


def write(size_bytes: int, file: str) -> bytes:
    """The descriptor of a disk of one delta; the size is a multiple of the cluster's."""
    sectors = size_bytes // SECTOR_BYTES
    root = Element("Parallels_disk_image", Version="1.0")
    parameters = SubElement(root, "Disk_Parameters")
    heads, per_track = 16, 63
    for name, number in (
        ("Disk_size", sectors),
        ("Cylinders", sectors // (heads * per_track)),
        ("Heads", heads),
        ("Sectors", per_track),
        ("Padding", 0),
    ):
        SubElement(parameters, name).text = str(number)
    storage = SubElement(SubElement(root, "StorageData"), "Storage")
    for name, number in (("Start", 0), ("End", sectors), ("Blocksize", CLUSTER_SECTORS)):
        SubElement(storage, name).text = str(number)
    image = SubElement(storage, "Image")
    for name, text in (("GUID", TOP_GUID), ("Type", "Compressed"), ("File", file)):
        SubElement(image, name).text = text
    snapshots = SubElement(root, "Snapshots")
    SubElement(snapshots, "TopGUID").text = TOP_GUID
    shot = SubElement(snapshots, "Shot")
    SubElement(shot, "GUID").text = TOP_GUID
    SubElement(shot, "ParentGUID").text = NO_GUID
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root) + b"\n"


def check_file_name(text: str) -> str:
    """The name of a file in the folder itself. Raises FormatError."""
    name = text.strip().removeprefix("./")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name.encode()) > 255:
        raise FormatError(f"{FILE}: {text!r} is not the name of a file in its folder")
    return name


def _files(storage: Element) -> dict[str, DeltaFile]:
    files: dict[str, DeltaFile] = {}
    for image in storage.findall("Image"):
        guid, kind = parse_guid(_text(image, "GUID")), _text(image, "Type")
        if kind not in ("Compressed", "Plain"):
            raise FormatError(f"{FILE}: an image of type {kind!r}: Compressed and Plain are known")
        if guid in files or guid == NO_GUID:
            raise FormatError(f"{FILE}: image {guid} is there twice, or has no GUID")
        files[guid] = DeltaFile(guid, check_file_name(_text(image, "File")), kind == "Plain")
    if not 0 < len(files) <= MOST_DELTAS:
        raise FormatError(f"{FILE}: the disk has {len(files)} images: 1 to {MOST_DELTAS} are understood")
    if len({delta.file for delta in files.values()}) < len(files):
        raise FormatError(f"{FILE}: one file stands for two images")
    return files


def _tree(data: bytes) -> Element:
    if len(data) > LARGEST_BYTES:
        raise FormatError(f"{FILE} has more than {LARGEST_BYTES} bytes: that cannot be")
    builder = TreeBuilder()
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise FormatError(f"{FILE}: elements are nested more than {DEEPEST} deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise FormatError(f"{FILE} has a document type declaration: it may define entities, and is refused")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise FormatError(f"{FILE} is not XML: {error}") from error
    return builder.close()


def _text(element: Element, path: str) -> str:
    found = element.find(path)
    if found is None or not (found.text or "").strip():
        raise FormatError(f"{FILE}: {path} is missing")
    return (found.text or "").strip()


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text.strip()):
        raise FormatError(f"{FILE}: {name} is {text!r}, not a number")
    return int(text)
