"""Disks under load beside a replica that gets only what a write tracker reports, for scripts/soak-disk and tests."""
