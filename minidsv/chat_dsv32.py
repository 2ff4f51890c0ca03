"""DeepSeek-V3.2's message format, for checkpoints that ship no Jinja template.

The official checkpoint has `encoding/encoding_dsv32.py` in its place; its rules, as that file and
its ports in vLLM (`deepseek_v32_encoding.py`) and SGLang (`encoding_dsv32.py`) agree on them:

    BOS, then each message in turn:
    system      content
    user        User content Assistant, then `<think>` if it is the last of the users' turns and
                thinking is on, else `</think>`
    developer   as user, behind "\\n\\n# The user's message is: " (an earlier one stays; with the
                official file's `drop_thinking` such a conversation fails)
    assistant   content EOS; behind the last user's turn and with thinking on, its reasoning and
                `</think>` come first, so earlier reasoning is always left out

Tool calls and response formats, which that file also defines, are refused in `chat_messages`.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from minidsv.chat_messages import Message
from minidsv.chat_reasoning import END_THINK, THINK
from minidsv.errors import RequestError

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

_DEVELOPER = "\n\n# The user's message is: "
_THINKING = ("thinking", "enable_thinking")  # SGLang's and vLLM's key, vLLM's other one


def encode_messages(
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Mapping[str, Any],
) -> str:
    """The prompt's text; raises RequestError for what the format cannot say.

    Without a generation prompt the last user's turn ends with its content; a final message to
    continue lacks its EOS. kwargs: `thinking` or `enable_thinking`, false by default.
    """
    thinking = _thinking(kwargs)
    if add_generation_prompt and messages[-1]["role"] not in ("user", "developer"):
        raise RequestError(
            "messages",
            f"the last one is the {messages[-1]['role']}'s, and only a user's or developer's is "
            "answered; an assistant's can be continued with continue_final_message",
        )
    users = [i for i, m in enumerate(messages) if m["role"] in ("user", "developer")]
    last_user, last = max(users, default=-1), len(messages) - 1
    parts = [BOS]
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if "name" in message:
            raise RequestError(f"{where}.name", "DeepSeek-V3.2's format has no place for names")
        if message["role"] == "system":
            parts.append(message["content"])
        elif message["role"] == "assistant":
            parts.append(_assistant(message, where, with_reasoning=thinking and i > last_user))
            parts.append("" if continue_final_message and i == last else EOS)
        else:
            parts.append(_user(message, where))
            if i < last or add_generation_prompt:
                parts.append(ASSISTANT + (THINK if thinking and i == last_user else END_THINK))
    return "".join(parts)


def _user(message: Message, where: str) -> str:
    if message["role"] == "user":
        return USER + message["content"]
    if not message["content"]:
        raise RequestError(f"{where}.content", "a developer's message may not be empty")
    return USER + _DEVELOPER + message["content"]


def _assistant(message: Message, where: str, with_reasoning: bool) -> str:
    if not with_reasoning:
        return message["content"]
    if not message.get("reasoning_content"):
        raise RequestError(
            f"{where}.reasoning_content", "is needed after the last user's turn, thinking being on"
        )
    return message["reasoning_content"] + END_THINK + message["content"]


def _thinking(kwargs: Mapping[str, Any]) -> bool:
    for name, value in kwargs.items():
        if name not in _THINKING:
            raise RequestError(
                "chat_template_kwargs",
                f"DeepSeek-V3.2's format has no {reprlib.repr(name)}; accepted: {list(_THINKING)}",
            )
        if not isinstance(value, bool):
            raise RequestError(
                "chat_template_kwargs", f"{name}: {reprlib.repr(value)} is not true or false"
            )
    if len(set(kwargs.values())) > 1:
        raise RequestError("chat_template_kwargs", f"{dict(kwargs)} contradict each other")
    return any(kwargs.values())
