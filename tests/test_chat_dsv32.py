"""DeepSeek-V3.2's format. The expected texts follow from the rules of the official
`encoding/encoding_dsv32.py` and of vLLM's and SGLang's ports; sources stand at the cases."""

from typing import Any

import pytest

from minidsv.chat_dsv32 import encode_messages
from minidsv.errors import RequestError

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"


def chat(*turns: str | tuple[str, str]) -> list[Any]:
    """Messages from "role: content" lines; an assistant's with reasoning is a pair."""
    messages = []
    for turn in turns:
        text, reasoning = turn if isinstance(turn, tuple) else (turn, None)
        role, content = text.split(": ", 1)
        extra = {} if reasoning is None else {"reasoning_content": reasoning}
        messages.append({"role": role, "content": content, **extra})
    return messages


def encode(messages: list[Any], **options: Any) -> str:
    options = {"add_generation_prompt": True, "continue_final_message": False, **options}
    return encode_messages(messages, kwargs=options.pop("kwargs", {}), **options)


TWO_TURNS = chat("user: hello", ("assistant: Hello! I am DeepSeek.", "thinking..."), "user: 1+1=?")
CLOSED = chat("user: Two plus two?", ("assistant: Four.", "2 + 2 = 4"))


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "chat"])
@pytest.mark.parametrize(
    ("messages", "want"),
    [
        # the example of the official model card (Chat Template), which prints this text
        (
            TWO_TURNS,
            f"{BOS}{USER}hello{ASSISTANT}</think>Hello! I am DeepSeek.{EOS}{USER}1+1=?{ASSISTANT}@",
        ),
        # a system message has no marks, wherever it stands (encoding_dsv32: system_msg_template)
        (
            chat("system: Be brief.", "user: Hi", "system: In French.", "user: Hi"),
            f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>In French.{USER}Hi{ASSISTANT}@",
        ),
        # a developer's turn is a user's (find_last_user_index; vLLM's tests of such turns)
        (
            chat("developer: Be terse.", "user: Hi"),
            f"{BOS}{USER}\n\n# The user's message is: Be terse.{ASSISTANT}</think>"
            f"{USER}Hi{ASSISTANT}@",
        ),
        (
            chat(("assistant: Visible.", "hidden"), "developer: Follow the rubric."),
            f"{BOS}Visible.{EOS}{USER}\n\n# The user's message is: Follow the rubric.{ASSISTANT}@",
        ),
    ],
    ids=["model card", "system", "developer", "developer last"],
)
def test_golden(messages: list[Any], want: str, thinking: bool) -> None:
    got = encode(messages, kwargs={"thinking": thinking})
    assert got == want.replace("@", "<think>" if thinking else "</think>")


def test_reasoning_after_the_last_user() -> None:
    """Kept with thinking on, dropped without (render_message: index > last_user_idx)."""
    options = {"add_generation_prompt": False}
    head, tail = f"{BOS}{USER}Two plus two?{ASSISTANT}", f"</think>Four.{EOS}"
    thinking = encode(CLOSED, **options, kwargs={"enable_thinking": True})
    assert thinking == f"{head}<think>2 + 2 = 4{tail}"
    assert encode(CLOSED, **options) == f"{head}{tail}"


def test_open_ends() -> None:
    """Our reading of the two flags, for which the official encoder has no parameter."""
    assert encode(CLOSED[:1], add_generation_prompt=False) == f"{BOS}{USER}Two plus two?"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert encode(CLOSED, **options) == f"{BOS}{USER}Two plus two?{ASSISTANT}</think>Four."


@pytest.mark.parametrize(
    ("messages", "kwargs", "error"),
    [
        (CLOSED, {}, "messages: the last one is the assistant's"),
        (chat("system: x"), {}, "messages: the last one is the system's"),
        (chat("developer: "), {}, r"messages\[0\].content: a developer's message"),
        ([{"role": "user", "content": "x", "name": "bob"}], {}, r"messages\[0\].name: DeepSeek"),
        (TWO_TURNS, {"thinking": "yes"}, "chat_template_kwargs: thinking: 'yes' is not true"),
        (TWO_TURNS, {"reasoning_effort": "high"}, "chat_template_kwargs: .*'reasoning_effort'"),
        (TWO_TURNS, {"thinking": True, "enable_thinking": False}, "contradict each other"),
    ],
)
def test_refused(messages: list[Any], kwargs: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        encode(messages, kwargs=kwargs)


def test_an_answer_without_reasoning_is_refused_when_thinking() -> None:
    """As the official encoder and vLLM's test of it do."""
    options = {"add_generation_prompt": False, "continue_final_message": True}
    messages = chat("user: Hello", "assistant: Hi there.")
    with pytest.raises(RequestError, match=r"messages\[1\].reasoning_content: is needed"):
        encode(messages, **options, kwargs={"thinking": True})
    assert encode(messages, **options).endswith("</think>Hi there.")
