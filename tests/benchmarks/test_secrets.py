import base64

from benchmarks.secrets import forms, hits
from deploy.identity.keys import create_node_key, create_secret, create_signing_key
from deploy.identity.site_certificates import DOOR_CERTIFICATE, DOOR_KEY, create_door_authority


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


def test_of_a_key_with_its_certificate_only_the_key_is_a_secret(tmp_path):
    create_door_authority(tmp_path)
    both, certificate = (tmp_path / DOOR_KEY).read_bytes(), (tmp_path / DOOR_CERTIFICATE).read_bytes()
    assert certificate in both
    needles = {"key": forms(both)}
    assert sorted(hits(both, needles)) == ["a private key", "key"]
    assert hits(certificate, needles) == []


def test_a_key_of_one_line_is_looked_for(tmp_path):
    create_signing_key(tmp_path / "sign.key")
    lines = (tmp_path / "sign.key").read_bytes().splitlines()
    assert forms((tmp_path / "sign.key").read_bytes()) == [lines[1]]
