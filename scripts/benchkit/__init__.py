"""The benchmark: containers that move under a client that asks every 0.2 ms, ours and those of others, in turns."""
