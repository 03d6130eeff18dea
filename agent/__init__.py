"""The daemon on a host: gRPC services, container lifecycle, networks, images."""
