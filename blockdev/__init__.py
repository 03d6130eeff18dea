"""Block images: volumes on loop devices, write tracking, transfer. Knows nothing of containers, CRIU or gRPC."""
