import json

import pytest

from server.federation.fleet.registry import Registry
from shared.errors import InputError
from tests.signing import public_of

KEY, OTHER = "ecdsa-sha2-nistp384 AAAA comment", "ecdsa-sha2-nistp384 BBBB"
SIGNING, OTHER_SIGNING = public_of("site-a"), public_of("site-b")


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "sites.json")


def test_a_site_is_kept_without_the_keys_comment(registry):
    registry.add("site-a", KEY, SIGNING)
    assert [(site.alias, site.public_key) for site in registry.sites()] == [("site-a", "ecdsa-sha2-nistp384 AAAA")]


def test_adding_the_same_site_again_changes_nothing(registry):
    first = registry.add("site-a", KEY, SIGNING)
    assert registry.add("site-a", KEY, SIGNING) == first
    assert len(registry.sites()) == 1


def test_an_alias_belongs_to_one_key_and_a_key_to_one_alias(registry):
    registry.add("site-a", KEY, SIGNING)
    with pytest.raises(InputError, match="taken by another key"):
        registry.add("site-a", OTHER, OTHER_SIGNING)
    with pytest.raises(InputError, match="belongs to site 'site-a'"):
        registry.add("site-b", KEY, OTHER_SIGNING)
    with pytest.raises(InputError, match="belongs to site 'site-a'"):
        registry.add("site-b", OTHER, SIGNING)


def test_a_revoked_alias_is_not_active_and_never_given_again(registry):
    registry.add("site-a", KEY, SIGNING)
    registry.set_node_id("site-a", 7)
    assert registry.revoke("site-a").node_id == 7
    assert registry.active() == []
    with pytest.raises(InputError, match="revoked"):
        registry.add("site-a", OTHER, OTHER_SIGNING)
    with pytest.raises(InputError, match="not registered"):
        registry.revoke("site-a")


@pytest.mark.parametrize("alias", ["", "Site", "a b", "../x", "a" * 33])
def test_a_malformed_alias_is_refused(registry, alias):
    with pytest.raises(InputError, match="alias"):
        registry.add(alias, KEY, SIGNING)
    assert not registry.path.exists()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"sites": [{"alias": "x"}]})])
def test_a_damaged_registry_is_one_clear_line(registry, text):
    registry.path.write_text(text)
    with pytest.raises(InputError, match="registry"):
        registry.sites()
