"""`python -m deploy.checks.probe HOST:PORT [SERVICE]`: exit code 0 when a gRPC health check says SERVING."""

import os
import sys

# gRPC's own handlers abort what this process starts while it waits.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, service: str = "", seconds: float = 3.0) -> str:
    """Answer of a gRPC health check (`grpc.health.v1`) at host:port: SERVING, NOT_SERVING, or the error's name.

    Args:
        address: host:port.
        service: one of those that run there; empty: all together.
        seconds: to wait.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=seconds
            )
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1], "".join(sys.argv[2:3])) != "SERVING")
