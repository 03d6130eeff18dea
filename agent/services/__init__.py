"""gRPC services of the agent, one module per resource."""
