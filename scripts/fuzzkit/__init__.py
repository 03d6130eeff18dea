"""Malformed and untimely messages for an agent's PeerService, and what they must not do."""
