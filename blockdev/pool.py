"""A folder whose files can be cloned: the state folder itself, or a sparse XFS file mounted in it."""

import os
from pathlib import Path

from blockdev import filesystem, loop, reflink
from blockdev.errors import BlockError

FILE = "pool.img"
FOLDER = "pool"
MINIMUM_BYTES = 300 << 20  # mkfs.xfs makes none smaller


def ensure(state_dir: Path, size_bytes: int) -> Path:
    """The pool of a state folder, made or adopted as it is found."""
    image, folder = state_dir / FILE, state_dir / FOLDER
    if not image.exists() and reflink.supported(state_dir):
        return state_dir
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.path.ismount(folder):
        return folder
    if not image.exists():
        _make(image, size_bytes)
    devices = loop.find(image)
    device = devices[0] if devices else loop.attach(image)
    try:
        filesystem.mount(device.path, folder, "xfs")
    except OSError:
        device.detach()
        raise
    return folder


def close(state_dir: Path) -> None:
    """Unmount and detach the pool file, if there is one; repeatable."""
    image, folder = state_dir / FILE, state_dir / FOLDER
    if os.path.ismount(folder):
        filesystem.unmount(folder)
    if image.exists():
        for device in loop.find(image):
            device.detach()


def _make(image: Path, size_bytes: int) -> None:
    if size_bytes < MINIMUM_BYTES:
        raise BlockError(f"a pool of {size_bytes} bytes is too small: at least {MINIMUM_BYTES}")
    unfinished = image.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)
    filesystem.make(unfinished, "xfs")
    unfinished.rename(image)
