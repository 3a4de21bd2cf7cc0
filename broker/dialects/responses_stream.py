"""A runtime's chat stream as events of the Responses dialect, and the response object out of those events.

An item of the answer is a thought, a message or a call. A thought or a message is done when something else begins;
calls stay open to the end, for their pieces may be mixed. The last event waits until the runtime's stream has ended
well: it carries the usage, which comes after the finish reason.
"""

import json
from typing import Any, Final

from broker.dialects import sse
from broker.dialects.openai_stream import ChatReader
from broker.dialects.responses_object import CREATED, IN_PROGRESS, ResponseObject, event
from broker.dialects.responses_run import THOUGHTS, Run, string_in
from broker.dialects.responses_tools import Tools
from broker.dialects.through_chat import ThroughChat

_CUT_SHORT: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_FINAL: Final = (b"event: response.completed\n", b"event: response.incomplete\n")


class ResponsesReader(ThroughChat):
    """Takes a runtime's bytes in, however they were split, and gives the client's events out.

    It numbers the events from 0, `response.created` first. As with chat, nothing comes out before the first content.
    """

    def __init__(self, served_as: str, *, body: bytes, job_id: str, tools: Tools) -> None:
        super().__init__(ChatReader(served_as, include_usage=True))
        self._object = ResponseObject(body, job_id=job_id, model=served_as)
        self._tools = tools
        self._job_id = job_id
        self._number = 0
        self._ready: list[bytes] = []
        self._items: list[_Item] = []
        self._open: _Item | None = None  # a thought or a message
        self._run: Run | None = None  # of chunks that add to it
        self._calls: list[_Call] = []
        self._finish = ""
        self._reasoning_tokens = 0
        self._closed = False

    def feed(self, data: bytes) -> None:
        """Reads what came from the network."""
        self._chat.feed(data)
        self._read(self._chat.take())

    def end(self) -> None:
        """Tells that the runtime closed the stream."""
        self._chat.end()
        self._read(self._chat.take())
        if self.succeeded and not self._closed:
            self._closed = True
            self._close()

    def take(self) -> bytes:
        """Gives the events that are ready and not taken yet."""
        taken = b"".join(self._ready)
        self._ready.clear()
        return taken

    def count_from(self, number: int) -> None:
        """Counts the events to come from here on: those before them have been told."""
        self._number = number

    def _read(self, blob: bytes) -> None:
        for piece in blob.split(b"\n\n"):
            if not piece or (self._run is not None and self._goes_on(self._run, piece)):
                continue
            self._run = None
            data = sse.read_event(piece).data
            if data is None or self._broken is not None:
                continue
            try:
                chunk = json.loads(data.decode())
            except (ValueError, RecursionError):
                chunk = None
            if not isinstance(chunk, dict):
                self._breaks()
                continue
            self._read_chunk(chunk)
            self._learn(piece, chunk)

    def _goes_on(self, run: Run, chunk: bytes) -> bool:
        """Tells a chunk that is the last one but for its string."""
        found = run.string_of(chunk)
        if found is None or self._open is None:
            return False
        told, text = found
        if text:
            self._open.text.append(text)
            self._ready.append(run.event(self._number, told))
            self._number += 1
        return True

    def _learn(self, chunk: bytes, told: dict[str, Any]) -> None:
        """Remembers a chunk that adds to what is open and says nothing else."""
        found, item = string_in(chunk, told), self._open
        if found is not None and item is not None:
            _, start, end = found
            self._run = Run(chunk[:start], chunk[end:], event(item.delta, 0, **self._growth(item, "")))

    def _read_chunk(self, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage")
        details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
        if isinstance(details, dict) and isinstance(details.get("reasoning_tokens"), int):
            self._reasoning_tokens = details["reasoning_tokens"]
        for choice in chunk.get("choices") or ():
            if not isinstance(choice, dict) or choice.get("index", 0) != 0:
                continue
            if isinstance(choice.get("finish_reason"), str):
                self._finish = choice["finish_reason"]
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._read_delta(delta)

    def _read_delta(self, delta: dict[str, Any]) -> None:
        thought = next((delta[key] for key in THOUGHTS if isinstance(delta.get(key), str) and delta[key]), "")
        if thought:
            self._grow("summary" if self._object.wants_summary else "thought", thought)
        for key, kind in (("content", "text"), ("refusal", "refusal")):
            said = delta.get(key)
            if isinstance(said, str) and said:
                self._grow(kind, said)
        calls = delta.get("tool_calls")
        for fragment in calls if isinstance(calls, list) else ():
            if isinstance(fragment, dict):
                self._read_call(fragment)

    def _grow(self, kind: str, piece: str) -> None:
        item = self._open
        if item is None or item.kind != kind:
            self._shut("completed")
            item = self._open = _Item(kind, len(self._items), self._job_id)
            self._items.append(item)
            self._begin()
            self._say("response.output_item.added", output_index=item.index, item=item.json("in_progress", bare=True))
            self._say(item.added, **item.place(), part=item.part(""))
        item.text.append(piece)
        self._say(item.delta, **self._growth(item, piece))

    def _growth(self, item: "_Item", piece: str) -> dict[str, Any]:
        extra: dict[str, Any] = {"logprobs": []} if item.kind == "text" else {}
        return {**item.place(), "delta": piece, **extra}

    def _shut(self, status: str) -> None:
        """Says that the open thought or message is done."""
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        text = "".join(item.text)
        extra: dict[str, Any] = {"logprobs": []} if item.kind == "text" else {}
        self._say(item.done, **item.place(), **{item.text_key: text}, **extra)
        self._say(item.part_done, **item.place(), part=item.part(text))
        self._say("response.output_item.done", output_index=item.index, item=item.json(status))

    def _read_call(self, fragment: dict[str, Any]) -> None:
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        index, call_id = fragment.get("index", len(self._calls)), fragment.get("id")
        call = next((known for known in reversed(self._calls) if known.at == index), None)
        # Some Ollama versions number every call 0: a second id with a name is a call of its own.
        if call is None or (function.get("name") and call_id not in (None, "", call.call_id)):
            self._shut("completed")
            call = _Call(index, len(self._items), self._job_id)
            self._calls.append(call)
            self._items.append(call)
        if isinstance(call_id, str) and call_id and not call.added_yet:
            call.call_id = call_id
        if isinstance(function.get("name"), str) and function["name"] and not call.added_yet:
            call.name = self._tools.client_name(function["name"])
            self._add(call)
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        if isinstance(arguments, str) and arguments:
            call.text.append(arguments)
            if call.added_yet and not call.name.custom:
                self._say("response.function_call_arguments.delta", **call.where(), delta=arguments)

    def _add(self, call: "_Call") -> None:
        call.added_yet = True
        self._begin()
        self._say("response.output_item.added", output_index=call.index, item=call.json("in_progress", bare=True))
        early = "".join(call.text)  # arguments that came before their name
        if early and not call.name.custom:
            self._say("response.function_call_arguments.delta", **call.where(), delta=early)

    def _end_call(self, call: "_Call", status: str) -> None:
        call.status = status
        if not call.added_yet:
            self._add(call)
        if call.name.custom:
            said = call.free_input()
            if said:
                self._say("response.custom_tool_call_input.delta", **call.where(), delta=said)
            self._say("response.custom_tool_call_input.done", **call.where(), input=said)
        else:
            if status == "completed" and not "".join(call.text).strip():  # a runtime may say none as nothing
                call.text.append("{}")
                self._say("response.function_call_arguments.delta", **call.where(), delta="{}")
            arguments, name = "".join(call.text), call.name.name
            self._say("response.function_call_arguments.done", **call.where(), name=name, arguments=arguments)
        self._say("response.output_item.done", output_index=call.index, item=call.json(status))

    def _begin(self) -> None:
        if self._number == 0:
            self._say(CREATED, response=self._object.state("in_progress"))
            self._say(IN_PROGRESS, response=self._object.slim())

    def _close(self) -> None:
        self._begin()
        reason = _CUT_SHORT.get(self._finish)
        status = "incomplete" if reason else "completed"
        self._shut(status)
        for call in self._calls:
            self._end_call(call, status)
        response = self._object.state(
            status,
            output=[item.json(item.status) for item in self._items],
            usage=self._usage(),
            incomplete_details={"reason": reason} if reason else None,
        )
        self._say(f"response.{status}", response=response)

    def _usage(self) -> dict[str, Any] | None:
        figures = self._chat.usage
        if figures is None:
            return None
        read, made = figures.get("prompt_tokens", 0), figures.get("completion_tokens", 0)
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": figures.get("cached_tokens", 0)},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": read + made,
        }

    def _say(self, kind: str, **fields: Any) -> None:
        self._ready.append(event(kind, self._number, **fields))
        self._number += 1


class _Item:
    """A thought or a message: an item with one part of text."""

    def __init__(self, kind: str, index: int, job_id: str) -> None:
        self.kind = kind
        self.index = index
        self.status = "in_progress"
        self.text: list[str] = []
        self._message = kind in ("text", "refusal")
        self.id = f"{'msg' if self._message else 'rs'}_{job_id}_{index}"
        word = {"text": "output_text", "refusal": "refusal", "thought": "reasoning_text"}.get(kind)
        self._part_type = word or "summary_text"
        self.text_key = "refusal" if kind == "refusal" else "text"
        part = "response.reasoning_summary_part" if kind == "summary" else "response.content_part"
        self.added, self.part_done = f"{part}.added", f"{part}.done"
        said = f"response.{word or 'reasoning_summary_text'}"
        self.delta, self.done = f"{said}.delta", f"{said}.done"

    def place(self) -> dict[str, Any]:
        number = "summary_index" if self.kind == "summary" else "content_index"
        return {"item_id": self.id, "output_index": self.index, number: 0}

    def part(self, text: str) -> dict[str, Any]:
        extra: dict[str, Any] = {"annotations": [], "logprobs": []} if self.kind == "text" else {}
        return {"type": self._part_type, self.text_key: text, **extra}

    def json(self, status: str, *, bare: bool = False) -> dict[str, Any]:
        parts = [] if bare else [self.part("".join(self.text))]
        if self._message:
            return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": parts}
        thought: dict[str, Any] = {"id": self.id, "type": "reasoning", "status": status, "summary": []}
        return thought | {"summary" if self.kind == "summary" else "content": parts}


class _Call(_Item):
    """A call of a function or a custom tool."""

    def __init__(self, at: object, index: int, job_id: str) -> None:
        super().__init__("call", index, job_id)
        self.at = at  # the runtime's number
        self.id = f"fc_{job_id}_{index}"
        self.call_id = f"call_{job_id}_{index}"
        self.name = Tools().client_name("")
        self.added_yet = False

    def where(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}

    def free_input(self) -> str:
        """Takes the input of a custom tool out of the function's arguments; what is no such object is the input."""
        arguments = "".join(self.text)
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        found = value.get("input") if isinstance(value, dict) else None
        return found if isinstance(found, str) else arguments

    def json(self, status: str, *, bare: bool = False) -> dict[str, Any]:
        item = {"id": self.id, "status": status, "call_id": self.call_id, "name": self.name.name}
        if self.name.namespace:
            item["namespace"] = self.name.namespace
        if self.name.custom:
            return {"type": "custom_tool_call", **item, "input": "" if bare else self.free_input()}
        return {"type": "function_call", **item, "arguments": "" if bare else "".join(self.text)}


def fold_responses(stream: bytes) -> dict[str, Any]:
    """Gives the response object that the stream ends with; raises ValueError where it ends without one."""
    response = json.loads(final_response(stream))
    if not isinstance(response, dict):
        raise ValueError("the stream has no response")
    return response


def final_response(stream: bytes) -> bytes:
    """Gives that object in the bytes in which it was written."""
    last = stream[stream.rfind(b"\nevent: response.") + 1 :]
    if not last.startswith(_FINAL):
        raise ValueError("the stream has no end")
    _, _, response = last.rstrip().partition(b'"response":')
    return response.removesuffix(b"}")
