import base64

from benchmarks.secrets import forms, hits
from deploy.identity.keys import create_node_key, create_secret


def test_a_planted_secret_is_found_in_every_form(tmp_path):
    create_secret(tmp_path / "secret")
    secret = (tmp_path / "secret").read_bytes()
    needles = {"secret": forms(secret)}
    for leaked in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        assert hits(b"before " + leaked + b" after", needles) == ["secret"]
    assert hits(b"nothing of that kind", needles) == []


def test_a_line_of_a_private_key_is_found(tmp_path):
    create_node_key(tmp_path / "node.key")
    key = (tmp_path / "node.key").read_bytes()
    needles = {"key": forms(key)}
    assert hits(key.splitlines()[3], needles) == ["key"]
    assert hits(key, {}) == ["a private key"]
    assert hits((tmp_path / "node.key.pub").read_bytes(), needles) == []
