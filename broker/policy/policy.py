"""The policy: what one file decides, ready to be asked which lane a request goes to."""

import hashlib
import json
import os.path
from collections.abc import Callable
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError

from broker.errors import PolicyInvalid, UnknownModel
from broker.policy import checks, lanes
from broker.policy.content import Content, Priority, Schema
from broker.policy.document import Document, read
from broker.policy.lanes import Lane
from broker.policy.sentences import from_validation, near_words
from broker.policy.warnings import warnings_of


def _exists(file: str) -> bool:
    return os.path.exists(os.path.expanduser(file))


def _size_of(file: str) -> int:
    try:
        return os.path.getsize(os.path.expanduser(file))
    except OSError:
        return 0


class Policy(Content):
    """One policy file that has passed every check. It is made by `parse`, never changes, and is compared by digest."""

    _document: Document = PrivateAttr()
    _text: str = PrivateAttr()
    _lanes: dict[str, Lane] = PrivateAttr()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a policy file; PolicyInvalid holds a sentence with line and path for each problem."""
        document = read(text)
        if document.problems:
            raise PolicyInvalid(document.problems)
        try:
            policy = cls.model_validate(document.data)
        except ValidationError as error:
            raise PolicyInvalid(document.in_order(from_validation(error))) from None
        problems = checks.problems(policy)
        if problems:
            raise PolicyInvalid(document.in_order(problems))
        policy._document = document
        policy._text = text
        policy._lanes = lanes.make_lanes(policy)
        return policy

    @property
    def text(self) -> str:
        """The file as it was written; `parse` of it gives this policy again."""
        return self._text

    @property
    def digest(self) -> str:
        """A hash of what the file decides.

        Comments, spacing, the order of keys and defaults that are written out do not count. The order of models, lanes
        and rules does, because status lists them and rules are read in it.
        """
        said = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).hexdigest()

    def all_lanes(self) -> dict[str, Lane]:
        """Gives every lane by its name: each model's own, its batch lane, and those of `lanes:`."""
        return dict(self._lanes)

    def lane(self, name: str) -> Lane | None:
        """Gives the lane of exactly this name; aliases and routing names are no lanes."""
        return self._lanes.get(name)

    def route(
        self, asked: str, *, caller: str, endpoint: str, prompt_tokens: int, priority: Priority = "interactive"
    ) -> Lane:
        """Gives the lane of a request; `lanes` says how the rules are read. UnknownModel where nothing has the name.

        `asked` is what the client named, `endpoint` the path it called (`/v1/chat/completions`).
        """
        lane = lanes.choose(
            self,
            self._lanes,
            asked,
            caller=caller,
            endpoint=endpoint,
            prompt_tokens=prompt_tokens,
            batch=priority == "batch",
        )
        if lane is None:
            raise UnknownModel(asked, near_words(asked, self.names(), most=3))
        return lane

    def candidates(self, lane: Lane) -> list[Lane]:
        """Gives the lane, its fallback and that one's fallback: where a job may wait, in this order."""
        return lanes.candidates(self._lanes, lane)

    def names(self) -> list[str]:
        """Gives every name that a client can ask for: models, aliases, routing names, lanes."""
        return lanes.known_names(self)

    def warnings(
        self,
        *,
        host_memory_mb: int | None = None,
        exists: Callable[[str], bool] = _exists,
        size_of: Callable[[str], int] = _size_of,
    ) -> list[str]:
        """Gives what works but will disappoint; memory is judged only where a host's memory is given.

        `size_of` gives the bytes of a file, 0 where there is none: what a model needs of which nothing else is known.
        """
        found = warnings_of(self, self._lanes, host_memory_mb=host_memory_mb, exists=exists, size_of=size_of)
        return self._document.in_order(found)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Gives the JSON Schema with which editors complete and check a policy file."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **Content.model_json_schema(by_alias=True, schema_generator=Schema),
            "title": "warmlane policy",
        }
