"""Signed bytes: one string per statement, one signature per string, and keys that only their owner can read."""

from dataclasses import fields, replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InputError
from shared.messages.signature import (
    DOMAIN,
    SignatureError,
    Statement,
    check_signature,
    read_key,
    request_digest,
    sign,
)
from tests.signing import key_of, pem_of, public_of

OURS = Statement("train", "reply", "run", 3, "site-0", "a" * 64, "b" * 64, "c" * 64, 1000, 2000)
OTHERS = {
    "purpose": "audit",
    "direction": "request",
    "run": "run-2",
    "server_round": 4,
    "alias": "site-1",
    "request_digest": "d" * 64,
    "header_digest": "e" * 64,
    "arrays_digest": "f" * 64,
    "issued_ms": 1001,
    "expires_ms": 2001,
}
TEXT = st.text(max_size=8)
STATEMENTS = st.builds(
    Statement, st.sampled_from(["train", "audit"]), st.sampled_from(["request", "reply"]), TEXT,
    st.integers(0, 10**6), TEXT, TEXT, TEXT, TEXT, st.integers(0, 20), st.integers(0, 20),
)  # fmt: skip


def test_the_holder_of_the_key_is_believed():
    check_signature(public_of("site-0"), OURS, sign(key_of("site-0"), OURS))


@pytest.mark.parametrize("field", [each.name for each in fields(Statement)])
def test_a_signature_holds_for_one_purpose_direction_run_round_site_request_and_content(field):
    signature = sign(key_of("site-0"), OURS)
    with pytest.raises(SignatureError):
        check_signature(public_of("site-0"), replace(OURS, **{field: OTHERS[field]}), signature)


@pytest.mark.parametrize("public", [public_of("site-1"), "", "zz", "00" * 32, "ab" * 31])
def test_another_key_or_none_is_refused(public):
    with pytest.raises(SignatureError):
        check_signature(public, OURS, sign(key_of("site-0"), OURS))


@settings(max_examples=50)
@given(STATEMENTS, STATEMENTS)
def test_two_statements_never_share_their_bytes(one, two):
    assert (one.to_bytes() == two.to_bytes()) == (one == two)
    assert one.to_bytes()[8:].startswith(DOMAIN)


def test_text_cannot_move_from_one_field_to_the_next():
    assert replace(OURS, run="a", alias="bc").to_bytes() != replace(OURS, run="ab", alias="c").to_bytes()


def test_the_same_statement_has_the_same_signature_each_time():
    assert sign(key_of("site-0"), OURS) == sign(key_of("site-0"), OURS)


def test_a_request_is_named_by_header_and_arrays():
    names = {request_digest("a", "b"), request_digest("b", "a"), request_digest("ab", ""), request_digest("a", "c")}
    assert len(names) == 4


def test_a_key_that_others_can_read_or_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "site-sign.key"
    with pytest.raises(InputError, match="make it"):
        read_key(path, "make it")
    path.write_bytes(pem_of(key_of("site-0")))
    path.chmod(0o640)
    with pytest.raises(InputError, match="0640"):
        read_key(path, "make it")
    path.chmod(0o600)
    assert pem_of(read_key(path, "make it")) == pem_of(key_of("site-0"))
    other = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for data in (b"garbage", other):
        path.write_bytes(data)
        with pytest.raises(InputError, match="make it"):
            read_key(path, "make it")
