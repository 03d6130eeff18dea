"""What is wrong with a disk image that somebody brought."""

from blockdev.errors import BlockError


class FormatError(BlockError):
    """An image is damaged, hostile, or of a kind that is not understood; the text names the file and says why."""
