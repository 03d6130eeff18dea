"""How large the file system of a new image is made."""

SLACK_BYTES = 128 << 20
# mkfs.xfs makes nothing smaller than 300 MiB, mkfs.btrfs nothing much below this.
SMALLEST_BYTES = {"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 256 << 20}


def size_for(content_bytes: int, kind: str) -> int:
    """For files of so many bytes together, in whole MiB."""
    return whole_mib(max(int(content_bytes * 1.3) + SLACK_BYTES, SMALLEST_BYTES[kind]))


def whole_mib(size_bytes: int) -> int:
    """Rounded up."""
    return -(-size_bytes >> 20) << 20
