"""Moving a container: the two ends of a migration, its streams, the handover, and the operator's command line."""
