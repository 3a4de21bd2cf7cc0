"""Where a webhook may go. A URL that a client chose must not make this machine a way into inner networks.

Pure: who resolves names is passed in. The addresses that come back are those to connect to, and no others: a name that
is asked once more may answer differently.
"""

import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

from broker.errors import AddressRefused, BadRequest

URL_MAX = 2_048
"""Characters of a URL."""

ADDRESSES_MAX = 16
"""Of what a name leads to, no more are looked at, or connected to."""

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a host, all that a connection could be made to; raises OSError where there is none."""

Address = IPv4Address | IPv6Address

_REFUSED: tuple[tuple[str, str], ...] = (
    ("0.0.0.0/8", "no address of a host"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by a provider's customers"),
    ("127.0.0.0/8", "this machine itself"),
    ("169.254.0.0/16", "link-local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "reserved"),
    ("192.88.99.0/24", "reserved"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "reserved"),
    ("198.51.100.0/24", "reserved"),
    ("203.0.113.0/24", "reserved"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/128", "no address of a host"),
    ("::1/128", "this machine itself"),
    ("::ffff:0:0/96", "an IPv4 address in disguise"),
    ("64:ff9b::/96", "an IPv4 address in disguise"),
    ("64:ff9b:1::/48", "an IPv4 address in disguise"),
    ("2001::/32", "an IPv4 address in disguise"),
    ("2001::/23", "reserved"),
    ("2001:db8::/32", "reserved"),
    ("2002::/16", "an IPv4 address in disguise"),
    ("3fff::/20", "reserved"),
    ("fc00::/7", "private"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
)
_NETWORKS = [(ipaddress.ip_network(network), kind) for network, kind in _REFUSED]
_PUBLIC_V6 = IPv6Network("2000::/3")
"""Of IPv6 only this has been given out; all else is of no network that a stranger could have."""


@dataclass(frozen=True)
class Target:
    """A URL, taken apart: where to connect, and what to ask for there."""

    scheme: str
    host: str  # as it stands in the URL, in ASCII; an IPv6 address without brackets
    port: int
    path: str  # with the query

    @property
    def netloc(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """What the paths of one server have in common."""
        return f"{self.scheme}://{self.netloc}"


_PORTS = {"http": 80, "https": 443}


def target_of(url: str) -> Target:
    """Takes a webhook's URL apart; raises BadRequest with what is wrong with it."""
    if len(url) > URL_MAX:
        raise BadRequest(f"a webhook's URL has at most {URL_MAX} characters", "webhook")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise BadRequest("a webhook's URL is written in ASCII, all else in percent signs", "webhook")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadRequest("the webhook is no URL", "webhook") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise BadRequest("a webhook is a URL like https://ci.example.com/hook", "webhook")
    if "@" in parts.netloc:
        raise BadRequest("a webhook's URL holds no user name", "webhook")
    if port == 0:
        raise BadRequest("a webhook's URL names no port 0", "webhook")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname.rstrip("."), port or _PORTS[parts.scheme], path)


async def checked(target: Target, allow: Iterable[str], resolve: Resolve) -> list[str]:
    """Gives the addresses that this host has now and a webhook may go to; raises AddressRefused where one of them is of
    an inner network and `allow` has neither it nor the host, and OSError where it has none."""
    found = [_address(text) for text in (await resolve(target.host, target.port))[:ADDRESSES_MAX]]
    if not found:
        raise OSError(f"{target.host} has no address")
    hosts, networks = _opened(allow)
    if target.host.lower() not in hosts:
        for address in found:
            kind = refused_as(address)
            if kind and not any(_within(address, network) for network in networks):
                raise AddressRefused(target.host, kind)
    return list(dict.fromkeys(str(address) for address in found))


def refused_as(address: Address) -> str:
    """Says what keeps webhooks from an address that nobody has opened to them, "" where nothing does."""
    for network, kind in _NETWORKS:
        if address.version == network.version and address in network:
            return kind
    return "" if address.version == 4 or address in _PUBLIC_V6 else "reserved"


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.partition("%")[0])  # what is behind it is a network card of this machine


def _opened(allow: Iterable[str]) -> tuple[set[str], list[IPv4Network | IPv6Network]]:
    hosts: set[str] = set()
    networks: list[IPv4Network | IPv6Network] = []
    for place in allow:
        try:
            networks.append(ipaddress.ip_network(place))
        except ValueError:
            hosts.add(place)
    return hosts, networks


def _within(address: Address, network: IPv4Network | IPv6Network) -> bool:
    return address.version == network.version and address in network
