"""`python -m deploy.checks.probe HOST:PORT`: exit code 0 when a gRPC health check says SERVING, for containers."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, seconds: float = 3.0) -> str:
    """Answer of a gRPC health check (`grpc.health.v1`) at host:port: SERVING, NOT_SERVING, or the error's name."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1]) != "SERVING")
