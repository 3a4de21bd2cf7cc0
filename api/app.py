"""The api process: `python -P -m api.app`. Wires the endpoints to the broker and runs them under uvicorn.

Exit codes: 0 after an orderly stop, 1 when a part of it broke, 2 when it may not or cannot listen, 3 without a Redis.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from api import errors as told
from api.asgi import App, Receive, Scope, Send
from api.connection import Connection, look_at_all
from api.cors import Cors
from api.door import Door
from api.exchange import CutConnection, Exchange
from api.gateway import Gateway, new_api_id
from api.limits import limits_here
from api.listen import Listen
from api.openapi import Document
from api.routes import (
    anthropic,
    audit,
    background,
    batches,
    chat,
    completions,
    dead,
    embeddings,
    files,
    health,
    job_lists,
    jobs,
    keys,
    models,
    new_jobs,
    ollama,
    ollama_generations,
    openapi,
    operator,
    page,
    responses,
    tune,
    usage,
    watch,
    webhooks,
)
from api.settings import ApiSettings
from api.state_dir import CannotStart
from broker import collector, errors, logs, tracing
from broker.callers import Keys
from broker.keybook import KeyBook
from broker.settings import SettingsInvalid, read_settings
from broker.store import Store
from broker.version import version

log = logging.getLogger("warmlane.api")

BROKEN, CANNOT_LISTEN, NO_REDIS = 1, 2, 3
HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
    ("content-security-policy", "frame-ancestors 'none'"),
]
"""On every answer, whoever gives it; a page adds a policy of its own, and browsers keep to both."""

LOOK_EVERY = 10
"""uvicorn's ticks, of a tenth of a second, from one look at all connections to the next."""
STOP_MARGIN_S = 1

HOT = (
    chat.ChatCompletions,
    completions.Completions,
    embeddings.Embeddings,
    responses.Responses,
    anthropic.Messages,
    anthropic.CountTokens,
    ollama_generations.OllamaChat,
    ollama_generations.OllamaGenerate,
    ollama_generations.OllamaEmbed,
    ollama_generations.OllamaEmbeddings,
)
REST = (
    page.router,
    operator.router,
    keys.router,
    audit.router,
    models.router,
    jobs.router,
    background.router,
    new_jobs.router,
    job_lists.router,
    dead.router,
    files.router,
    batches.router,
    ollama.router,
    health.router,
    watch.router,
    usage.router,
    tune.router,
    webhooks.router,
    openapi.router,
)


def create_app(gateway: Gateway, *, crashed: Callable[[], None] = lambda: None) -> App:
    """Gives the ASGI application; its lifespan runs the gateway's parts and calls `crashed` when one of them breaks."""
    hot = {kind.path: kind(gateway) for kind in HOT}
    rest = rest_of(gateway, crashed)
    at_the_door = Door(gateway.origins, host=gateway.host)

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        # The hot routes stay outside of FastAPI, whose middleware would touch every piece of every answer.
        if scope["type"] != "http":
            return await rest(scope, receive, send)
        wrong = at_the_door.wrong_with(scope, anonymous=not gateway.keys)
        if wrong is not None:
            return await Exchange(scope, receive, send).refuse(wrong)
        await (hot.get(scope["path"]) or rest)(scope, receive, send)

    return Cors(door, gateway.origins) if gateway.origins else door


def rest_of(gateway: Gateway, crashed: Callable[[], None] = lambda: None) -> FastAPI:
    """Gives the endpoints that are not hot, as FastAPI serves them."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            async with gateway.running():
                yield
        except BaseExceptionGroup as group:
            for error in group.exceptions:
                log.critical("event=part_broke reason=%s", logs.kind_of(error), exc_info=error)
            crashed()
            raise

    rest = FastAPI(
        title="warmlane", version=gateway.version, summary="A gateway for local LLMs.", lifespan=lifespan,
        redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None,  # ours is `openapi`
    )  # fmt: skip
    rest.state.gateway = gateway
    for router in REST:
        rest.include_router(router)
    routes = [route for router in REST for route in router.routes]
    rest.state.document = Document([*HOT, *routes], version=gateway.version)

    @rest.exception_handler(errors.BrokerError)
    async def refused(request: Request, error: errors.BrokerError) -> Response:
        return _response(told.wrong(error), request)

    @rest.exception_handler(404)
    async def not_served(request: Request, _error: Exception) -> Response:
        return _response(told.Wrong("not_found", f"there is no {request.url.path} here", 404, told.INVALID), request)

    @rest.exception_handler(405)
    async def other_method(request: Request, _error: Exception) -> Response:
        words = f"{request.url.path} does not take {request.method}"
        response = _response(told.Wrong("method_not_allowed", words, 405, told.INVALID), request)
        here = (r for r in routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE)
        response.headers["allow"] = ", ".join(sorted({method for route in here for method in route.methods or ()}))
        return response

    @rest.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _response(told.wrong(errors.BadRequest(str(first["msg"]), str(first["loc"][-1]))), request)

    @rest.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # nobody hears it

    @rest.exception_handler(Exception)
    async def broke(request: Request, error: Exception) -> Response:
        return _response(told.unexpected(error), request)

    return rest


def _response(wrong: told.Wrong, request: Request) -> Response:
    dialect = told.dialect_of(request.url.path, version=request.headers.get(told.VERSION, ""))
    response = Response(dialect.body(wrong), dialect.status(wrong))
    response.raw_headers = [*response.raw_headers, *wrong.headers()]
    return response


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM is an orderly end with exit code 0, and the gateway hears of it first."""

    def __init__(self, gateway: Gateway, *, stop_after_s: float) -> None:
        self.broken = False
        self._gateway = gateway
        self._stop_after_s = stop_after_s
        super().__init__(
            uvicorn.Config(
                create_app(gateway, crashed=self._crashed),
                http=partial(Connection, limits=gateway.limits, refused=gateway.metrics.connection_refused),  # type: ignore[arg-type]  # called like a class
                proxy_headers=False,  # nothing here asks where a request came from
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                headers=HEADERS,
                timeout_keep_alive=int(gateway.limits.keep_alive_s),
                timeout_graceful_shutdown=int(stop_after_s) + STOP_MARGIN_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hears Ctrl-C and SIGTERM on the loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        """Ends connections on which something takes too long."""
        if counter % LOOK_EVERY == 0:
            look_at_all(self.server_state.connections, asyncio.get_running_loop().time())  # type: ignore[arg-type]  # ours
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new connections, and gives the running answers a moment."""
        self._gateway.stop_in(self._stop_after_s)
        await super().shutdown(sockets)

    def _crashed(self) -> None:
        self.broken = True
        self.should_exit = True


async def serve(settings: ApiSettings) -> int:
    """Runs the api until it is told to stop; gives the exit code."""
    api_id = new_api_id()
    try:
        place = Listen.on(settings.host, settings.port)
        listener = _bind(place)
    except CannotStart as problem:
        print(problem, file=sys.stderr)
        return CANNOT_LISTEN
    try:
        store = await Store.open(settings.redis_url, namespace=settings.namespace, name=api_id)
    except errors.BrokerUnavailable as problem:
        listener.close()
        print(_sentence(str(problem)), file=sys.stderr)
        return NO_REDIS
    try:
        keys = KeyBook(store, Keys.parse(settings.keys.get_secret_value()), anonymous=place.is_loopback)
        try:
            await keys.reload()
        except errors.BrokerUnavailable as problem:
            listener.close()
            print(_sentence(str(problem)), file=sys.stderr)
            return NO_REDIS
        if not keys and not place.is_loopback:
            listener.close()
            print(place.needs_keys, file=sys.stderr)
            return CANNOT_LISTEN
        for sentence in await store.unfit():
            log.warning("event=unfit_redis reason=%s", sentence)
        server = Server(
            Gateway(
                store,
                keys,
                version=version(),
                api_id=api_id,
                origins=settings.origins,
                host=settings.host,
                limits=limits_here(),
            ),
            stop_after_s=settings.stop_after_ms / 1000,
        )
        log.info("event=listening url=%s api=%s", place.url, api_id)
        collector.settle()
        await server.serve(sockets=[listener])
        return BROKEN if server.broken else 0
    finally:
        await store.close()


def main() -> int:
    """Reads the settings and runs the api."""
    try:
        settings = read_settings(ApiSettings)
    except SettingsInvalid as problem:
        print(problem, file=sys.stderr)
        return CANNOT_LISTEN
    logs.begin(settings.log_level, settings.log_format, part="api")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_worth_a_line)
    with tracing.exporting(os.environ, part="api"), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(settings))


def _bind(place: Listen) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CannotStart(f"Port {place.port} of {place.host} can't be used: {error.strerror}.") from error
    return listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows has none
        return None
    return uvloop.new_event_loop


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Keeps uvicorn from reporting an answer that we broke off because nothing else was honest, and each piece of
    nonsense that somebody sends: those are counted, and a line each would be a way to fill our disk."""
    return not record.getMessage().startswith("Invalid HTTP request") and not (
        record.exc_info and isinstance(record.exc_info[1], CutConnection)
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


if __name__ == "__main__":
    sys.exit(main())
