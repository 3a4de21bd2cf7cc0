"""One POST to where a caller wants it: to the address that was checked, whatever its name resolves to by now.

No redirect is followed, no proxy asked, and of the answer's body only a little is read, and thrown away: an endpoint
that somebody chose must neither lead us elsewhere nor keep us busy.
"""

import asyncio
import ssl
from functools import cache, cached_property
from typing import Self

import httpx

from broker.trust.addresses import Target
from workers.webhooks import Answer, retry_after_s

TIMEOUTS = httpx.Timeout(connect=3.0, write=5.0, read=8.0, pool=3.0)
WHOLE_S = 10.0
"""How long an attempt may last in all, however slowly its answer comes."""

BODY_BYTES_MAX = 16_384
BODY_S = 1.0
"""So much of an answer's body is read, and for so long, so that a usual one ends in peace."""

ADDRESSES_TRIED = 3


class Post:
    """Sends requests; one for a whole process."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """`transport` stands in for the network (tests)."""
        self._transport = transport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if "_client" in self.__dict__:
            await self._client.aclose()

    async def __call__(self, target: Target, addresses: list[str], headers: dict[str, str], body: str) -> Answer:
        """Posts to the first of the addresses that takes a connection; never raises for what goes wrong out there."""
        answer = Answer(0, "there is no address to ask")
        try:
            async with asyncio.timeout(WHOLE_S):
                await asyncio.to_thread(_certificates)
                for address in addresses[:ADDRESSES_TRIED]:
                    try:
                        return await self._at(address, target, headers, body)
                    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                        answer = Answer(0, _words(error))
        except TimeoutError:
            return Answer(0, f"no answer within {WHOLE_S:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Answer(0, _words(error))
        return answer

    async def _at(self, address: str, target: Target, headers: dict[str, str], body: str) -> Answer:
        host = f"[{address}]" if ":" in address else address
        request = self._client.build_request(
            "POST",
            f"{target.scheme}://{host}:{target.port}{target.path}",
            headers={**headers, "host": target.netloc, "content-type": "application/json"},
            content=body.encode(),
            extensions={"sni_hostname": target.host},  # what the certificate must be for
        )
        response = await self._client.send(request, stream=True)
        try:
            async with asyncio.timeout(BODY_S):
                read = 0
                async for part in response.aiter_raw():
                    read += len(part)
                    if read > BODY_BYTES_MAX:
                        break
        except (httpx.HTTPError, TimeoutError):
            pass  # the status is what counts
        finally:
            await response.aclose()
        said = "" if response.is_success else f"it answered {response.status_code}"
        if response.is_redirect:
            said += ", and redirects are not followed"
        return Answer(response.status_code, said, retry_after_s(response.headers.get("retry-after", "")))

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=self._transport,
            verify=_certificates(),
            timeout=TIMEOUTS,
            # a connection is known by its address: kept open it would serve another name that has the same one
            limits=httpx.Limits(max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=False,
            headers={"user-agent": "warmlane-webhooks", "accept-encoding": "identity"},
        )


@cache
def _certificates() -> ssl.SSLContext:
    """Reads the machine's certificates once: that takes tens of ms."""
    return ssl.create_default_context()


def _words(error: Exception) -> str:
    """What went wrong, without the URL, which may hold a token."""
    kind = type(error).__name__
    return _WORDS.get(kind, kind)


_WORDS = {
    "ConnectError": "no connection could be made",
    "ConnectTimeout": f"no connection within {TIMEOUTS.connect:g} s",
    "ReadTimeout": f"no answer within {TIMEOUTS.read:g} s",
    "WriteTimeout": f"the request was not taken within {TIMEOUTS.write:g} s",
    "ReadError": "the connection broke",
    "WriteError": "the connection broke",
    "RemoteProtocolError": "what came back was no HTTP answer",
}
