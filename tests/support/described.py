"""The OpenAPI document as a judge of answers: each must be as it is described, and it remembers those it saw."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs

Saw = tuple[str, str, str, str]
"""A method, a path as it is documented, a status, and an error's code or a media type ("" where there is no body)."""


class Book:
    """The document, and what of it has been seen."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: set[Saw] = set()

    def described(self) -> set[Saw]:
        """Everything that it says may be answered."""
        return set(self._answers())

    def judge(self, method: str, path: str, answer: httpx.Response) -> None:
        """Notes an answer that is as it is described, and fails on any other."""
        described = self.document["paths"][path][method]["responses"].get(str(answer.status_code))
        assert described is not None, f"{method} {path} is not described to answer {answer.status_code}: {answer.text}"
        for name, header in described.get("headers", {}).items():
            assert name.lower() in answer.headers or not header["required"], f"{path} {answer.status_code} lacks {name}"
        media_type = answer.headers.get("content-type", "").split(";")[0] if "content" in described else ""
        saw = method, path, str(answer.status_code), media_type
        if media_type:
            assert media_type in described["content"], f"{path} answers {media_type}"
            schema = described["content"][media_type].get("schema", {})
            said = answer.json() if media_type == "application/json" else answer.text
            jsonschema_rs.Draft202012Validator({**schema, "components": self.document["components"]}).validate(said)
            if answer.status_code >= 400 and media_type == "application/json" and path != "/readyz":
                saw = *saw[:3], (said if isinstance(said["error"], str) else said["error"])["code"]
        else:
            assert answer.content == b""
        self.seen.add(saw)

    def _answers(self) -> Iterator[Saw]:
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                for status, described in operation["responses"].items():
                    for media_type, content in described.get("content", {"": {}}).items():
                        for code in _codes(content.get("schema", {})) or [media_type]:
                            yield method, path, status, code


def _codes(schema: Any) -> list[str]:
    if "allOf" not in schema:
        return []
    narrowed = schema["allOf"][1]["properties"]
    found: list[str] = narrowed.get("error", {"properties": narrowed})["properties"]["code"]["enum"]
    return found
