"""Checks messages as OpenAI's clients send them. No torch in here."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from minidsv.errors import RequestError

ROLES = ("system", "developer", "user", "assistant")
_NO_TOOLS = "tool calls are not supported"
_REFUSED = {
    "tools": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "response_format": "structured output is not supported",
    "audio": "only text is supported",
    "refusal": "no chat format here has a place for it",
    "prefix": "use continue_final_message",
}

Message = dict[str, str]  # role, content, and where given name, reasoning_content


def check_messages(messages: Any) -> list[Message]:
    """The conversation with its content as plain strings; raises RequestError.

    Content is a string or a list of `{"type": "text", "text": ...}` parts, joined by newlines as
    vLLM does; an assistant's may be null. `reasoning` is vLLM's other name for `reasoning_content`.
    Null fields count as absent; fields that nobody documents are dropped.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError("messages", f"{reprlib.repr(messages)} is not a list of messages")
    if not messages:
        raise RequestError("messages", "is empty; at least one message is needed")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(where, f"{reprlib.repr(message)} is not an object with role and content")
    role = message.get("role")
    if role in ("tool", "function"):
        raise RequestError(f"{where}.role", f"{role!r} is refused: {_NO_TOOLS}")
    if role not in ROLES:
        raise RequestError(f"{where}.role", f"{reprlib.repr(role)} is not one of {list(ROLES)}")
    for field, reason in _REFUSED.items():
        if message.get(field):
            raise RequestError(f"{where}.{field}", f"is refused: {reason}")
    checked = {"role": role, "content": _content(message.get("content"), role, f"{where}.content")}
    if (name := message.get("name")) is not None:
        checked["name"] = _text(name, f"{where}.name")
    for field in ("reasoning_content", "reasoning"):
        if (reasoning := message.get(field)) is None:
            continue
        if role != "assistant":
            raise RequestError(f"{where}.{field}", f"belongs to an assistant's message, not {role}")
        checked.setdefault("reasoning_content", _text(reasoning, f"{where}.{field}"))
    return checked


def _content(content: Any, role: str, where: str) -> str:
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list | tuple):
        return _text(content, where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind != "text":
            raise RequestError(
                f"{where}[{i}]", f"{reprlib.repr(kind)} parts are refused; accepted: type 'text'"
            )
        texts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "\n".join(texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(where, f"{reprlib.repr(value)} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(where, "not valid Unicode text (a lone surrogate?)") from None
    return value
