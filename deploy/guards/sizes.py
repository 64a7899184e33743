"""What a message would be once it is put together, added up before it is.

A chunk of 5 MB that an array lists 4,000 times is 20 GB: Flower joins first, and whoever checks sizes comes too late.
So the declared lengths of all arrays are added up from the pulled pieces, repetitions included, and compared with the
most that the receiver takes. The same code runs at the coordinator and at a site.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from deploy.guards import replace

LARGEST_VARIABLE = "MASKFED_LARGEST_MESSAGE_BYTES"
LARGEST_MESSAGE_BYTES = 4 * 2**30
"""Weights of 233 million parameters in float32 are 0.9 GB; a question may carry two of that."""
LARGEST_RECORD_BYTES = 2**20
"""One object that is not a chunk: header, names, the list of an array's chunks."""
MOST_DIMENSIONS = 8
_HOME = "flwr.supercore.inflatable.inflatable_utils"
_BORROWER = "flwr.superlink.grid.http_grid"
"""It takes the function's name over when it is loaded, so that it gets the guarded one afterwards."""


class OversizedMessageError(ValueError):
    """A message is larger than its receiver takes; the text names value and limit."""


def check_before_inflating() -> None:
    """Let Flower inflate no message in this process that is larger than the environment's `LARGEST_VARIABLE` says.

    It is read each time: the ServerApp knows only with each question how large an answer may be.
    """
    _guard(importlib.import_module(_HOME))
    if _BORROWER in sys.modules:
        _guard(sys.modules[_BORROWER])


def check_sizes(contents: Mapping[str, bytes], limit: int) -> int:
    """Bytes of all arrays once joined.

    Args:
        contents: the pulled objects by id, each "TYPE children length", a zero byte, the body.
        limit: of the sum, in bytes.

    Raises:
        OversizedMessageError: the sum, an array's shape or a single record is too large, or an object is malformed.
    """
    total = 0
    for content in contents.values():
        kind, children, body = _parts(content)
        if kind != "ArrayChunk" and len(content) > LARGEST_RECORD_BYTES:
            raise OversizedMessageError(f"a {kind} of {len(content)} bytes, at most {LARGEST_RECORD_BYTES} are taken")
        if kind != "Array":
            continue
        described = _description(body)
        total += sum(_chunk_bytes(contents, children, index) for index in described["arraychunk_ids"])
        if total > limit or math.prod(described["shape"]) > limit:
            raise OversizedMessageError(f"the arrays add up to {total} bytes or more, at most {limit} are taken")
    return total


def _guard(module: ModuleType) -> None:
    inflate = vars(module)["inflate_object_from_contents"]

    def checked(object_id: str, object_contents: dict[str, bytes], **options: Any) -> object:  # noqa: ANN401
        if options.get("objects") is None:  # the outermost of Flower's recursive calls
            check_sizes(object_contents, int(os.environ.get(LARGEST_VARIABLE, LARGEST_MESSAGE_BYTES)))
        return inflate(object_id, object_contents, **options)

    replace(module, {"inflate_object_from_contents": checked})


def _parts(content: bytes) -> tuple[str, list[str], memoryview]:
    end = content.find(b"\0", 0, LARGEST_RECORD_BYTES)
    fields = content[:end].decode("ascii", "replace").split(" ") if end > 0 else []
    if len(fields) != 3:
        raise OversizedMessageError("an object without a head")
    return fields[0], fields[1].split(",") if fields[1] else [], memoryview(content)[end + 1 :]


def _description(body: memoryview) -> dict[str, list[int]]:
    try:
        described = json.loads(bytes(body))
        found = {name: list(described[name]) for name in ("shape", "arraychunk_ids")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OversizedMessageError(f"an array without a description ({type(error).__name__})") from error
    if any(type(number) is not int or not 0 <= number < 2**63 for numbers in found.values() for number in numbers):
        raise OversizedMessageError("an array whose shape or chunks are no natural numbers")
    if len(found["shape"]) > MOST_DIMENSIONS:
        raise OversizedMessageError(
            f"an array of {len(found['shape'])} dimensions, at most {MOST_DIMENSIONS} are taken"
        )
    return found


def _chunk_bytes(contents: Mapping[str, bytes], children: list[str], index: int) -> int:
    if index >= len(children) or children[index] not in contents:
        raise OversizedMessageError("an array lists a chunk that it does not bring")
    return len(contents[children[index]])
