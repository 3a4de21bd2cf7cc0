"""Where webhooks may go: every way to write an inner address is refused, and what an administrator opened is not."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import AddressRefused, BadRequest
from broker.policy.policy import Policy
from broker.trust.addresses import Target, checked, refused_as, target_of
from broker.trust.resolver import resolve

INNER = {
    "127.0.0.1": "this machine itself", "127.9.9.9": "this machine itself", "::1": "this machine itself",
    "10.1.2.3": "private", "172.16.0.1": "private", "172.31.255.255": "private", "192.168.1.1": "private",
    "fd00::1": "private", "fc00::1": "private",
    "169.254.169.254": "link-local", "fe80::1": "link-local",
    "100.64.0.1": "shared by a provider's customers", "100.127.255.255": "shared by a provider's customers",
    "0.0.0.0": "no address of a host", "0.1.2.3": "no address of a host", "::": "no address of a host",
    "224.0.0.1": "multicast", "239.255.255.255": "multicast", "ff02::1": "multicast",
    "255.255.255.255": "reserved", "240.0.0.1": "reserved", "192.0.2.1": "reserved", "198.18.0.1": "reserved",
    "2001:db8::1": "reserved", "100::1": "reserved", "::127.0.0.1": "reserved", "fec0::1": "reserved",
    "::ffff:127.0.0.1": "an IPv4 address in disguise", "::ffff:8.8.8.8": "an IPv4 address in disguise",
    "64:ff9b::7f00:1": "an IPv4 address in disguise", "64:ff9b:1::a00:1": "an IPv4 address in disguise",
    "2002:7f00:1::": "an IPv4 address in disguise", "2001:0:4136:e378::1": "an IPv4 address in disguise",
}  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.215.14", "172.32.0.1", "100.128.0.1", "192.169.0.1", "2606:4700::1111", "2a00:1450::1"]


def to(host: str) -> Target:
    return Target("https", host, 443, "/")


def names(**told: list[str]) -> object:
    async def found(host: str, _port: int) -> list[str]:
        return told[host.replace(".", "_")]

    return found


@pytest.mark.parametrize(("address", "kind"), INNER.items())
async def test_an_inner_address_is_refused_however_it_is_written(address: str, kind: str) -> None:
    assert refused_as(ipaddress.ip_address(address)) == kind
    with pytest.raises(AddressRefused, match=kind):
        await checked(to("ci.example.com"), [], names(ci_example_com=[address]))  # type: ignore[arg-type]


@pytest.mark.parametrize("address", PUBLIC)
async def test_a_public_address_is_not(address: str) -> None:
    assert await checked(to("ci.example.com"), [], names(ci_example_com=[address])) == [address]  # type: ignore[arg-type]


@given(st.ip_addresses(v=4))
def test_no_public_ipv4_address_is_one_that_python_calls_local(address: ipaddress.IPv4Address) -> None:
    """Two lists that were made by different people."""
    inner = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    assert not inner or refused_as(address)


@given(st.ip_addresses(v=6))
def test_no_public_ipv6_address_is_one_that_python_calls_local(address: ipaddress.IPv6Address) -> None:
    assert address.is_global or refused_as(address)


@pytest.mark.parametrize(
    "written", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0x7f000001", "017700000001", "localhost", "[::1]", "0"]
)
async def test_the_machine_s_own_resolver_hides_nothing(written: str) -> None:
    """What it reads as an address of this machine is refused as that."""
    target = target_of(f"http://{written}/")
    try:
        assert await resolve(target.host, target.port)
    except OSError:
        return  # this machine's resolver does not know that way to write it
    with pytest.raises(AddressRefused):
        await checked(target, [], resolve)


async def test_one_inner_address_among_public_ones_is_enough() -> None:
    with pytest.raises(AddressRefused):
        await checked(to("a"), [], names(a=["8.8.8.8", "10.0.0.1"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "address", "allow"),
    [
        ("ci.internal", "10.0.0.7", ["ci.internal"]), ("CI.internal", "10.0.0.7", ["ci.internal"]),
        ("a", "10.0.0.7", ["10.0.0.0/8"]), ("10.0.0.7", "10.0.0.7", ["10.0.0.7"]),
        ("a", "fd00::7", ["fd00::/8"]), ("a", "fe80::1%eth0", ["fe80::/10"]),
    ],
)  # fmt: skip
async def test_what_the_policy_opens_is_open(host: str, address: str, allow: list[str]) -> None:
    async def found(*_: object) -> list[str]:
        return [address]

    assert await checked(to(host), allow, found) == [address.partition("%")[0]]


async def test_an_open_network_opens_no_other() -> None:
    for allow in (["10.0.0.0/9"], ["other.internal"], ["::/0"], []):
        with pytest.raises(AddressRefused):
            await checked(to("a"), allow, names(a=["10.200.0.1"]))  # type: ignore[arg-type]


async def test_the_refusal_names_a_line_that_opens_it() -> None:
    """Written as it stands into a policy, it does."""
    with pytest.raises(AddressRefused) as refused:
        await checked(to("ci.internal"), [], names(ci_internal=["10.0.0.7"]))  # type: ignore[arg-type]
    assert refused.value.code == "address_refused" and "10.0.0.7" not in str(refused.value)
    line = str(refused.value).split("`")[1]
    policy = Policy.parse(f"models: {{ m: {{ backend: simulated, model: m }} }}\n{line}\n")
    assert await checked(to("ci.internal"), policy.webhooks.allow, names(ci_internal=["10.0.0.7"])) == ["10.0.0.7"]  # type: ignore[arg-type]


async def test_a_name_without_an_address_is_no_refusal() -> None:
    with pytest.raises(OSError):
        await checked(to("a"), [], names(a=[]))  # type: ignore[arg-type]
    with pytest.raises(OSError):
        await resolve("a..b." + "x" * 70, 80)


@pytest.mark.parametrize(
    "url",
    [
        "", "ci.example.com/hook", "ftp://ci.example.com/", "file:///etc/passwd", "https:///hook", "https://",
        "https://me:secret@ci.example.com/", "https://ci.example.com:0/", "https://ci.example.com:99999/",
        "https://ci.example.com:x/", "https://[::1/", "https://ci.example.com/ä", "https://a b/",
        "https://ci.example.com/\r\nx: y", "https://ci.example.com\\@10.0.0.1/", "https://a/" + "x" * 2_048,
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_webhook(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        target_of(url)
    assert refused.value.param == "webhook"


def test_a_url_is_taken_apart() -> None:
    assert target_of("https://CI.example.com/hook?a=b#c") == Target("https", "ci.example.com", 443, "/hook?a=b")
    assert target_of("http://[fd00::1]:8080").netloc == "[fd00::1]:8080"
    assert target_of("http://ci.example.com:80/x").origin == "http://ci.example.com"
