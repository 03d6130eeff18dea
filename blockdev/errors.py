"""Errors of block images."""


class BlockError(Exception):
    """A block image, its loop device or its file system could not do what was asked; the text says which and why."""
