"""Content blocks in the order of the answer, out of a chat stream's deltas.

Blocks follow each other and never overlap, but fragments of several tool calls may come mixed. So the first open block
is told as it grows, and what belongs to a later one waits until the first is complete.
"""

import json
from collections.abc import Callable
from typing import Any

Say = Callable[[dict[str, Any]], None]


class _Block:
    """One block: how it begins, and the pieces that have not been told yet."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pieces: list[str] = []
        self.index: object = None  # what follows is a call's only
        self.id = self.name = self.arguments = ""
        self.told = False

    @property
    def complete(self) -> bool:
        """Whether nothing can be added to it any more, now that another block follows."""
        if self.kind != "tool_use":
            return True
        if not (self.name and self.arguments.rstrip().endswith("}")):
            return False
        try:
            return isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            return False


class Blocks:
    """Takes text, thoughts and call fragments; tells start, delta and stop events."""

    def __init__(self, say: Say, message_id: str) -> None:
        self.called = False
        self._say = say
        self._message_id = message_id
        self._open: list[_Block] = []
        self._calls: list[_Block] = []
        self._count = 0  # blocks told to their end

    def say(self, text: str) -> None:
        """Adds text."""
        self._add("text", text)

    def think(self, thought: str) -> None:
        """Adds reasoning."""
        self._add("thinking", thought)

    def call(self, fragment: dict[str, Any]) -> None:
        """Adds a fragment of a tool call. A second id with a name at the same index is a call of its own: some Ollama
        versions number every call 0."""
        self.called = True
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name = _text(fragment.get("id")), _text(function.get("name"))
        latest = self._calls[-1].index if self._calls and not name else len(self._calls)
        index = fragment.get("index", latest)
        block = next((known for known in reversed(self._calls) if known.index == index), None)
        if block is None or (name and call_id not in ("", block.id)):
            block = _Block("tool_use")
            block.index = index
            self._calls.append(block)
            self._open.append(block)
        block.id = block.id or call_id
        block.name = block.name or name
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and arguments:
            block.arguments += arguments
            block.pieces.append(arguments)
        self._tell()

    def running(self, kind: str) -> int | None:
        """Gives the index of the block of this kind that is told as it grows, if that is the only one."""
        return self._count if len(self._open) == 1 and self._open[0].kind == kind else None

    def close(self) -> None:
        """Tells whatever is left: the answer is complete."""
        self._tell(over=True)

    def _add(self, kind: str, text: str) -> None:
        if not self._open or self._open[-1].kind != kind:
            self._open.append(_Block(kind))
        self._open[-1].pieces.append(text)
        self._tell()

    def _tell(self, *, over: bool = False) -> None:
        while self._open:
            first = self._open[0]
            if not first.told:
                if first.kind == "tool_use" and not first.name and not over:
                    return
                self._begin(first)
            for piece in first.pieces:
                self._delta(first.kind, piece)
            first.pieces.clear()
            if not over and (len(self._open) == 1 or not first.complete):
                return
            if first.kind == "thinking":
                self._say(self._of("content_block_delta", delta={"type": "signature_delta", "signature": ""}))
            self._say(self._of("content_block_stop"))
            self._open.pop(0)
            self._count += 1

    def _begin(self, block: _Block) -> None:
        block.told = True
        start: dict[str, Any] = {"type": block.kind}
        match block.kind:
            case "text":
                start |= {"text": ""}
            case "thinking":
                start |= {"thinking": "", "signature": ""}
            case _:
                start |= {"id": block.id or f"toolu_{self._message_id}_{self._count}", "name": block.name, "input": {}}
        self._say(self._of("content_block_start", content_block=start))

    def _delta(self, kind: str, piece: str) -> None:
        match kind:
            case "text":
                delta = {"type": "text_delta", "text": piece}
            case "thinking":
                delta = {"type": "thinking_delta", "thinking": piece}
            case _:
                delta = {"type": "input_json_delta", "partial_json": piece}
        self._say(self._of("content_block_delta", delta=delta))

    def _of(self, kind: str, **more: object) -> dict[str, Any]:
        return {"type": kind, "index": self._count, **more}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
