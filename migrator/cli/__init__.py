"""The operator's command line: it speaks gRPC to an agent and never touches a container by itself."""
