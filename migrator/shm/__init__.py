"""Shared memory on its way: sent in rounds like any other, left out of CRIU's dump, and there before CRIU restores.

DESIGN.md in this folder says how that is done and what was measured.
"""
