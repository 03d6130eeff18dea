"""Generated from proto/migrator/v1 by scripts/generate."""
