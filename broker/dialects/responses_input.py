"""The input of a Responses request as chat messages.

Reasoning, text and calls of one turn become one assistant message. What stands before the first turn (instructions,
system and developer messages) becomes one system message: many chat templates take no second one.
"""

import json
from typing import Any, Final

from broker.dialects.responses_tools import Tools, chat_name
from broker.errors import BadRequest

ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXTS: Final = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
NOT_FOR_CHAT: Final = frozenset(
    "web_search_call file_search_call computer_call computer_call_output code_interpreter_call image_generation_call "
    "local_shell_call local_shell_call_output mcp_list_tools mcp_approval_request mcp_approval_response mcp_call "
    "tool_search_call tool_search_output compaction".split()
)
"""Items of tools that are left out; a local model would not understand them."""

Message = dict[str, Any]


def chat_messages(given: object, instructions: object, tools: Tools) -> list[Message]:
    """Translates input and instructions; raises BadRequest with a sentence."""
    if not isinstance(instructions, str | None):
        raise BadRequest("instructions must be a string", "instructions")
    builder = _Builder(tools)
    if instructions:
        builder.say("system", instructions)
    if isinstance(given, str):
        builder.say("user", given)
    elif isinstance(given, list):
        for index, item in enumerate(given):
            builder.add(item, f"input[{index}]")
    else:
        raise BadRequest("input must be a string or a list of items", "input")
    builder.end_turn()
    if not any(message["role"] != "system" for message in builder.messages) and not given:
        raise BadRequest("input must hold at least one item", "input")
    return builder.messages


class _Builder:
    """The messages so far, and the assistant's turn that is still growing."""

    def __init__(self, tools: Tools) -> None:
        self.messages: list[Message] = []
        self._tools = tools
        self._turn: Message = {}

    def add(self, item: object, where: str) -> None:
        if not isinstance(item, dict):
            raise BadRequest(f"{where} must be an object", where)
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        if kind == "message":
            role = ROLES.get(str(item.get("role")))
            if role is None:
                raise BadRequest(f"{where}.role must be user, assistant, system or developer", f"{where}.role")
            self.say(role, _content(item.get("content"), f"{where}.content", whole=role != "user"))
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, where, custom=kind == "custom_tool_call")
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self.end_turn()
            output = _content(item.get("output"), f"{where}.output", whole=True)
            self.messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": output})
        elif kind == "reasoning":
            self._reason(item, where)
        elif kind == "item_reference":
            raise BadRequest("item references are not supported: the gateway keeps no items; send the item", where)
        elif not isinstance(kind, str) or kind not in NOT_FOR_CHAT:
            raise BadRequest(f"{where} is of type {str(kind)[:40]}, which is not supported", where)

    def say(self, role: str, content: str | list[Message]) -> None:
        if role == "assistant":
            if "content" in self._turn or "tool_calls" in self._turn:
                self.end_turn()
            self._turn["content"] = content
            return
        self.end_turn()
        before = self.messages[-1] if len(self.messages) == 1 else None
        both_text = before is not None and isinstance(before["content"], str) and isinstance(content, str)
        if before is not None and before["role"] == role == "system" and both_text:
            before["content"] = f"{before['content']}\n\n{content}"
        else:
            self.messages.append({"role": role, "content": content})

    def end_turn(self) -> None:
        turn, self._turn = self._turn, {}
        if "content" in turn or "tool_calls" in turn:  # reasoning that led to nothing is not repeated
            self.messages.append({"role": "assistant", "content": None} | turn)

    def _call(self, item: Message, where: str, *, custom: bool) -> None:
        name = chat_name(_text(item, "name", where), item.get("namespace", ""))
        key = "input" if custom else "arguments"
        said = item.get(key)
        if not isinstance(said, str):
            raise BadRequest(f"{where}.{key} must be a string", f"{where}.{key}")
        arguments = json.dumps({"input": said}) if custom else said
        call = {"id": _text(item, "call_id", where), "type": "function"}
        self._turn.setdefault("tool_calls", []).append(call | {"function": {"name": name, "arguments": arguments}})

    def _reason(self, item: Message, where: str) -> None:
        """Gives the model its own thoughts back, where they were told in plain text."""
        if "content" in self._turn or "tool_calls" in self._turn:
            self.end_turn()
        key = "content" if item.get("content") else "summary"
        text = _content(item.get(key) or "", f"{where}.{key}", whole=True)
        if text and isinstance(text, str):
            self._turn["reasoning_content"] = self._turn.get("reasoning_content", "") + text


def _content(content: object, where: str, *, whole: bool) -> str | list[Message]:
    """Translates content; text alone is one string, and with `whole` so is text in several parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts", where)
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts) and (whole or len(parts) <= 1):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: object, where: str) -> Message:
    if not isinstance(part, dict):
        raise BadRequest(f"{where} must be an object", where)
    kind = part.get("type")
    if isinstance(kind, str) and kind in TEXTS:
        return {"type": "text", "text": _text(part, "text", where)}
    if kind == "refusal":
        return {"type": "text", "text": _text(part, "refusal", where)}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise BadRequest(f"{where} must have an image_url: the gateway keeps no files", f"{where}.image_url")
        detail = {"detail": part["detail"]} if isinstance(part.get("detail"), str) else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    raise BadRequest(f"{where} is of type {str(kind)[:40]}, which is not supported", where)


def _text(item: Message, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{key} must be a string", f"{where}.{key}")
    return value
