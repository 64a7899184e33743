import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.federation.fleet.admission import recorded, synchronise
from server.federation.fleet.registry import Registry
from server.federation.fleet.superlink import node_key
from server.federation.fleet.superlink_types import Node
from shared.errors import InputError
from tests.signing import public_of


def public_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class SuperLink:
    """Nodes by id, as a SuperLink with its state on disk would remember them."""

    def __init__(self) -> None:
        self.known: dict[int, Node] = {}

    def nodes(self) -> list[Node]:
        return list(self.known.values())

    def register(self, site) -> int:
        key = node_key(site.public_key)
        for node in self.known.values():
            if node.public_key == key and node.status != "unregistered":
                return node.node_id
        node_id = len(self.known) + 1
        self.known[node_id] = Node(node_id, site.alias, "registered", key)
        return node_id

    def unregister(self, node_id: int) -> None:
        assert self.known[node_id].status != "unregistered"
        node = self.known[node_id]
        self.known[node_id] = Node(node_id, node.alias, "unregistered", node.public_key)


def test_a_site_that_was_removed_while_the_superlink_was_down_is_not_let_in_by_its_database(tmp_path: Path):
    registry, control = Registry(tmp_path / "sites.json"), SuperLink()
    for alias in ("stays", "leaves"):
        registry.add(alias, public_key(), public_of(alias))
    synchronise(control, registry)  # type: ignore[arg-type]
    registry.revoke("leaves")
    registry.add("comes", public_key(), public_of("comes"))
    for _ in range(2):
        synchronise(control, registry)  # type: ignore[arg-type]
        status = {node.alias: node.status for node in control.nodes()}
        assert status == {"stays": "registered", "leaves": "unregistered", "comes": "registered"}
    assert {site.alias: site.node_id for site in registry.active()} == {"stays": 2, "comes": 3}


def test_each_change_and_each_refusal_is_one_line(tmp_path: Path):
    with recorded(tmp_path, "added") as aliases:
        aliases.append("site-a")
    with pytest.raises(InputError), recorded(tmp_path, "added"):
        raise InputError("the signature is not valid")
    lines = [json.loads(line) for line in (tmp_path / "logs" / "admissions.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["added", "added refused"]
    assert lines[0]["sites"] == ["site-a"]
    assert lines[1]["reason"] == "the signature is not valid"
