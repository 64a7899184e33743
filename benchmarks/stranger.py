"""`python -m benchmarks.stranger KIND HOST:PORT CONNECTIONS`: somebody without a key in front of a door.

`connections`: half of them send the first byte of a handshake, half a handshake and a request without its end; each is
opened again as soon as the door closes it. `bodies`: each sends eight megabytes that cost a parser hundreds.
"""

import asyncio
import ssl
import sys
from collections import Counter

from deploy.identity.addresses import split_address

BODY = b"\x1a\x80\xa4\xe8\x03" + b"\x12\x00" * 4_000_000
"""A push of one object tree with four million empty children."""
FIRST_BYTE = b"\x16"
PARTIAL = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nX: "
FULL = (
    b"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Type: application/protobuf\r\nContent-Length: %d\r\n\r\n" % len(BODY)
)


def main(kind: str, address: str, connections: str) -> None:
    """Attack until somebody ends this, and say now and then how often what happened."""
    asyncio.run(attack(kind, *split_address(address), int(connections)))


async def attack(kind: str, host: str, port: int, connections: int) -> None:
    """All connections at once, without end."""
    counts: Counter[str] = Counter()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    ways = {"connections": (None, FIRST_BYTE), "requests": (context, PARTIAL), "bodies": (context, FULL + BODY)}
    kinds = ("connections", "requests") if kind == "connections" else (kind,)
    each = [again(host, port, *ways[kinds[number % len(kinds)]], counts) for number in range(connections)]
    await asyncio.gather(report(counts), *each)


async def report(counts: Counter[str]) -> None:
    """One line every five seconds."""
    while True:
        await asyncio.sleep(5)
        print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())), flush=True)


async def again(host: str, port: int, context: ssl.SSLContext | None, said: bytes, counts: Counter[str]) -> None:
    """One connection after the other."""
    while True:
        counts[await once(host, port, context, said)] += 1
        await asyncio.sleep(0.05)


async def once(host: str, port: int, context: ssl.SSLContext | None, said: bytes) -> str:
    """Say something and wait until the other side closes; how it ended."""
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:
        return "not opened"
    try:
        writer.write(said)
        await writer.drain()
        answer = await reader.read(64)
        return f"answered {answer[9:12].decode('latin-1')}" if answer.startswith(b"HTTP/") else "closed"
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


if __name__ == "__main__":
    main(*sys.argv[1:])
