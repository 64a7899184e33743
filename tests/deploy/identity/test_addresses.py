import pytest

from deploy.errors import ProvisionError
from deploy.identity.addresses import join_address, split_address, split_proxy


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fleet.example:443", ("fleet.example", 443)),
        ("Fleet.Example.:443", ("Fleet.Example.", 443)),
        ("10.0.0.7:1", ("10.0.0.7", 1)),
        ("[::1]:9443", ("::1", 9443)),
        ("[2001:DB8:0:0::7]:65535", ("2001:db8::7", 65535)),
    ],
)
def test_hosts_of_every_family_are_taken_apart(address: str, parts: tuple[str, int]):
    assert split_address(address) == parts
    assert split_address(join_address(*parts)) == parts


@pytest.mark.parametrize(
    "address",
    ["fleet.example", "fleet.example:", ":443", "a b:1", "http://a:1", "a:\u0663", "a@b:1", "-a:1"],
)
def test_an_address_needs_host_and_port(address: str):
    with pytest.raises(ProvisionError, match="host:port"):
        split_address(address)


@pytest.mark.parametrize("address", ["a:0", "a:65536", "[::1]:99999"])
def test_a_port_that_is_none_is_called_so(address: str):
    with pytest.raises(ProvisionError, match=r"port \d+ is none: give 1 to 65535"):
        split_address(address)


@pytest.mark.parametrize(
    "address", ["::1:9443", "[::1:9443", "[fleet]:1", "[fe80::1%eth0]:1", "2001:db8::7:443", "[]:1"]
)
def test_an_ipv6_address_that_is_not_in_brackets_is_told_so(address: str):
    with pytest.raises(ProvisionError, match="in brackets"):
        split_address(address)


def test_a_name_with_an_underscore_is_told_the_truth():
    with pytest.raises(ProvisionError, match=r"no underscore.*hyphen"):
        split_address("fl_server:9443")


def test_a_proxy_is_a_plain_http_address():
    assert split_proxy("http://proxy.example:3128") == ("proxy.example", 3128)
    assert split_proxy("http://[::1]:3128/") == ("::1", 3128)


@pytest.mark.parametrize(
    "proxy", ["proxy.example:3128", "https://p:1", "socks5://p:1", "http://p", "http://user:secret@p:1", "http://p:1/x"]
)
def test_other_proxies_are_refused_without_showing_a_password(proxy: str):
    with pytest.raises(ProvisionError) as caught:
        split_proxy(proxy)
    assert "secret" not in str(caught.value)
