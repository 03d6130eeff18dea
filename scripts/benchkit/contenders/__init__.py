"""Those who move a container in the benchmark: migrator, and others at the best settings that this machine allows."""
