"""Tools of the Responses dialect as chat functions, and the way back.

Chat knows functions only. A custom tool (Codex's `apply_patch`) becomes a function with one string, `input`; the tools
of a namespace become functions whose names begin with it. What only OpenAI's servers or an agreement with its models
can run (`web_search`, `local_shell`, …) is left out, for Codex sends such tools unasked and works without them; a
`tool_choice` that insists on one is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from broker.errors import BadRequest

_FREE_INPUT: Final = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The tool's whole input, as plain text."}},
    "required": ["input"],
    "additionalProperties": False,
}


class ToolName(NamedTuple):
    """What a chat function is in the client's words."""

    custom: bool
    name: str
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that a runtime is told of, the choice among them, and the client's name of each."""

    chat: list[dict[str, Any]] = field(default_factory=list)
    choice: str | dict[str, Any] | None = None
    names: dict[str, ToolName] = field(default_factory=dict)

    @classmethod
    def read(cls, tools: object, choice: object) -> "Tools":
        """Translates a request's tools and its tool_choice; raises BadRequest."""
        if tools is not None and not isinstance(tools, list):
            raise BadRequest("tools must be a list", "tools")
        found = list(_functions(tools or [], ""))
        names = {function["name"]: name for function, name in found}
        chosen, allowed = _choice(choice, names)
        chat = [
            {"type": "function", "function": function}
            for function, _ in found
            if allowed is None or function["name"] in allowed
        ]
        return cls(chat, chosen, names)

    def client_name(self, chat_name: str) -> ToolName:
        """Gives the client's name of a function that the model called; one that it made up keeps its own."""
        return self.names.get(chat_name) or ToolName(False, chat_name)


def chat_name(name: str, namespace: object = "") -> str:
    """Names the function that stands for a tool."""
    return f"{namespace}{name}" if isinstance(namespace, str) else name


def _functions(tools: list[Any], namespace: str) -> Iterator[tuple[dict[str, Any], ToolName]]:
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise BadRequest(f"{where} must be an object with a type", where)
        kind = tool["type"]
        if kind not in ("function", "custom", "namespace"):
            continue
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"{where} must have a name", f"{where}.name")
        if kind == "namespace":
            inner = tool.get("tools")
            if not isinstance(inner, list):
                raise BadRequest(f"{where}.tools must be a list", f"{where}.tools")
            yield from _functions(inner, name)
            continue
        function: dict[str, Any] = {"name": chat_name(name, namespace)}
        if isinstance(tool.get("description"), str):
            function["description"] = tool["description"]
        if kind == "custom":
            function["description"] = _with_grammar(function.get("description", ""), tool.get("format"))
            function["parameters"] = _FREE_INPUT
        else:
            parameters = tool.get("parameters")
            if not isinstance(parameters, dict | None):
                raise BadRequest(f"{where}.parameters must be an object", f"{where}.parameters")
            function["parameters"] = parameters or {"type": "object", "properties": {}}
            if isinstance(tool.get("strict"), bool):
                function["strict"] = tool["strict"]
        yield function, ToolName(kind == "custom", name, namespace)


def _with_grammar(description: str, form: object) -> str:
    """Tells the model in words what the input's grammar is: a chat function has no other place for it."""
    if isinstance(form, dict) and form.get("type") == "grammar" and isinstance(form.get("definition"), str):
        return f"{description}\n\nThe input follows this grammar ({form.get('syntax')}):\n{form['definition']}".strip()
    return description


def _choice(choice: object, names: dict[str, ToolName]) -> tuple[str | dict[str, Any] | None, frozenset[str] | None]:
    """Gives chat's tool_choice, and the tools that it allows if not all."""
    if choice is None or choice in ("auto", "none", "required"):
        if choice == "required" and not names:
            raise BadRequest("tool_choice is required, but no tool is a function or a custom tool", "tool_choice")
        return choice if isinstance(choice, str) else None, None
    if not isinstance(choice, dict):
        raise BadRequest("tool_choice must be auto, none, required, or an object", "tool_choice")
    if choice.get("type") == "allowed_tools":
        mode, allowed = choice.get("mode", "auto"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(allowed, list):
            raise BadRequest("tool_choice.allowed_tools needs a mode, auto or required, and tools", "tool_choice")
        some = frozenset(_named(one, names) for one in allowed if isinstance(one, dict) and one.get("name"))
        if mode == "required" and not some:
            raise BadRequest("tool_choice requires a tool, but allows none of the functions", "tool_choice")
        return mode, some
    return {"type": "function", "function": {"name": _named(choice, names)}}, None


def _named(one: dict[str, Any], names: dict[str, ToolName]) -> str:
    name = one.get("name")
    found = chat_name(name, one.get("namespace", "")) if isinstance(name, str) else ""
    if one.get("type") not in ("function", "custom") or found not in names:
        raise BadRequest(
            f"tool_choice names {str(name or one.get('type'))[:40]}, which is no tool of this request", "tool_choice"
        )
    return found
