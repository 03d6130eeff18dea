"""The demo: a Redis that moves to another host and back under a client that counts."""
