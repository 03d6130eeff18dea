"""The lab: several hosts on one machine. Standard library alone, so that `scripts/lab run` starts at once."""
