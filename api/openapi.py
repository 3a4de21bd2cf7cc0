"""The OpenAPI document of this gateway, made of its routes and of what stands at them.

A route without a description is a KeyError here, which a test finds; nothing is listed a second time. It is made when
somebody first asks, and kept as bytes.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from api import errors as told
from api import shapes
from api.described import JSON, Answer, Described
from broker import errors
from broker.dialects import anthropic_schema, ollama_schema, openai_schema, responses_schema
from broker.dialects.json_schema import Schema, ref, some, text, whole

PATH = "/openapi.json"

_ABOUT = """\
A gateway in front of local LLM runtimes: OpenAI's, Anthropic's and Ollama's dialects, jobs, and an operator's verbs.

- Bodies are read as JSON whatever their content type says: UTF-8, at most 20 MiB, 1,000 keys and 200 levels, without
  `NaN` or numbers that a 64-bit float or 4,300 digits cannot hold. Of two equal keys the last one counts.
- A header of the gateway's that is empty counts as not sent.
- Every error has the form of the dialect that was asked, with a stable `code`; what waiting cures carries
  `Retry-After`. Once an answer has begun an error comes inside the stream, and an answer that is one object is cut off.
- A path that is not served answers 404 `not_found`, a method that a path does not take 405 `method_not_allowed` with
  `Allow`. A 500 `internal_error` is a bug of the gateway's, and its log has the number that the message names.
- Whatever the path, a request may end at the door: 400 `bad_http`, 408 `request_timeout` (it trickled in), 414
  `url_too_long`, 431 `head_too_large`, 415 `unsupported_encoding` (a compressed body), 403 `origin_refused` (a page of
  an origin that is not allowed), without keys 403 `host_refused` (not a name of this machine), and 503
  `too_many_connections`.
- An answer of one object may begin with spaces: they keep the connection alive while the client waits.
"""
_TAGS = {
    "openai": "OpenAI's dialect.",
    "anthropic": "Anthropic's dialect.",
    "ollama": "Ollama's dialect.",
    "batches": "Files of requests, and the batches that work them off.",
    "jobs": "Every generation is a job: look at it, follow it, cancel it.",
    "operator": "What an operator asks of models and hosts.",
    "keys": "Callers and their keys, for administrators.",
    "health": "How the gateway does.",
    "usage": "Who used what.",
    "webhooks": "Being told when jobs end.",
}
_SECURITY: Mapping[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of `gateway key new` or GATEWAY_KEYS."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same.",
    },
}


class Operation(NamedTuple):
    """One method of one path."""

    path: str
    method: str
    described: Described


class Document:
    """The document, of routes that never change while the process lives."""

    def __init__(self, routes: Collection[Any], *, version: str) -> None:
        self._routes = routes
        self._version = version
        self._made: dict[bool, bytes] = {}

    def read(self, *, with_keys: bool) -> bytes:
        """Gives its bytes, and makes them if nobody has asked before; `with_keys`: a request needs one now."""
        if with_keys not in self._made:
            found = document(operations(self._routes), version=self._version, with_keys=with_keys)
            self._made[with_keys] = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
        return self._made[with_keys]


def operations(routes: Iterable[Any]) -> Iterator[Operation]:
    """Walks over the routes, FastAPI's and our own: each one's path, methods and description."""
    for route in routes:
        path: str = route.path.replace(":path}", "}")
        what: Described = getattr(route, "endpoint", route).described
        for method in sorted(route.methods):
            yield Operation(path, method.lower(), what)


def document(found: Iterable[Operation], *, version: str, with_keys: bool) -> dict[str, Any]:
    """Writes the document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in found:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    schemas = {
        **openai_schema.SCHEMAS,
        **responses_schema.SCHEMAS,
        **anthropic_schema.SCHEMAS,
        **ollama_schema.SCHEMAS,
        **shapes.schemas(),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "warmlane",
            "version": version,
            "summary": "A gateway for local LLMs.",
            "description": _ABOUT,
        },
        "security": [{name: []} for name in _SECURITY] + ([] if with_keys else [{}]),
        "tags": [{"name": name, "description": words} for name, words in _TAGS.items()],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": schemas, "securitySchemes": _SECURITY},
    }


def _operation(operation: Operation) -> dict[str, Any]:
    path, method, what = operation
    said: dict[str, Any] = {
        "operationId": _id(method, path),
        "summary": what.summary,
        "tags": [what.tag],
        "responses": _responses(operation),
    }
    if what.words:
        said["description"] = what.words
    parameters = [_parameter(name, "path", schema) for name, schema in what.within.items()]
    parameters += [_parameter(name, "query", schema) for name, schema in what.query.items()]
    parameters += [_parameter(name, "header", schema) for name, schema in what.headers.items()]
    if parameters:
        said["parameters"] = parameters
    if what.body:
        said["requestBody"] = {"required": not what.bodyless, "content": {what.body_type: {"schema": ref(what.body)}}}
    if what.keyless:
        said["security"] = []
    return said


def _id(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "_").strip("/").split("/")
    return "_".join([method, *words]).rstrip("_")


def _parameter(name: str, where: str, schema: Schema) -> Schema:
    words = schema.get("description", "")
    bare = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, "in": where, "required": where == "path", "description": words, "schema": bare}


def _responses(operation: Operation) -> dict[str, Any]:
    path, method, what = operation
    dialects = [told.dialect_of(path)]
    if told.VERSION in what.headers:
        dialects.append(told.dialect_of(path, version="any"))
    found = {str(status): _answer(answer) for status, answer in what.answers.items()}
    for status, kinds in sorted(fails_by_status(dialects, what.all_fails).items()):
        found[str(status)] = _failure(dialects, status, kinds)
    if method == "head":
        for response in found.values():
            response.pop("content", None)
    return found


def fails_by_status(
    dialects: Iterable[told.Dialect], kinds: Iterable[type[errors.BrokerError]]
) -> dict[int, list[type[errors.BrokerError]]]:
    """Sorts kinds of errors by the statuses that tell of them in these dialects."""
    found: dict[int, list[type[errors.BrokerError]]] = {}
    for kind in kinds:
        for status in {status for dialect in dialects for status in told.statuses(kind, dialect)}:
            found.setdefault(status, []).append(kind)
    return found


def _answer(answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {"description": answer.words}
    if answer.content:
        said["content"] = {
            media_type: {"schema": schema} if schema else {} for media_type, schema in answer.content.items()
        }
    if answer.headers:
        said["headers"] = {name: _header(schema) for name, schema in answer.headers.items()}
    return said


def _failure(dialects: Iterable[told.Dialect], status: int, kinds: list[type[errors.BrokerError]]) -> dict[str, Any]:
    schemas = [dialect.schema for dialect in dialects if status in fails_by_status([dialect], kinds)]
    lines = [f"- `{kind.code}`: {(kind.__doc__ or '').splitlines()[0]}" for kind in kinds]
    said: dict[str, Any] = {
        "description": f"{_phrase(status)}\n\n" + "\n".join(lines),
        "content": {JSON: {"schema": _told_as(schemas, [kind.code for kind in kinds])}},
    }
    waits = [told.ROWS[kind].retry_after_s_max for kind in kinds if told.ROWS[kind].retry_after_s is not None]
    if waits:
        seconds = whole("When to come back, in seconds.", least=1, most=max(waits))
        said["headers"] = {"Retry-After": _header(seconds, required=True)}
    if status == HTTPStatus.UNAUTHORIZED:
        said["headers"] = {"WWW-Authenticate": _header(text("How to send a key."), required=True)}
    return said


def _told_as(schemas: list[str], codes: list[str]) -> Schema:
    """The error object of one of these schemas, with one of these codes."""
    told_as = [ref(name) for name in schemas]
    code: Schema = {"properties": {"code": {"enum": codes}}}
    return {
        "allOf": [
            told_as[0] if len(told_as) == 1 else some(*told_as),
            code if schemas == ["OllamaError"] else {"properties": {"error": code}},
        ]
    }


def _header(schema: Schema, *, required: bool = False) -> Schema:
    bare = {key: value for key, value in schema.items() if key != "description"}
    return {"description": schema.get("description", ""), "required": required, "schema": bare}


def _phrase(status: int) -> str:
    return {499: "Cancelled", 529: "Overloaded"}.get(status) or HTTPStatus(status).phrase
