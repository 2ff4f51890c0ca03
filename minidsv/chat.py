"""ChatTemplate: a conversation to the tokens that a checkpoint was trained on."""

import inspect
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minidsv import chat_dsv32
from minidsv.chat_messages import Message, check_messages
from minidsv.chat_reasoning import END_THINK, THINK, ReasoningSplitter, Split, split_reasoning
from minidsv.config import ModelConfig
from minidsv.errors import RequestError
from minidsv.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. The text holds its BOS: tokenise it without adding another."""

    text: str
    token_ids: list[int]
    in_reasoning: bool  # the text ends in `<think>`: the output begins with reasoning

    def splitter(self) -> ReasoningSplitter:
        """A new one for each output that is streamed."""
        return ReasoningSplitter(self.in_reasoning)

    def split(self, text: str) -> Split:
        """The reasoning and the answer of a whole output."""
        return split_reasoning(text, self.in_reasoning)


class ChatTemplate:
    """How a checkpoint writes conversations: its Jinja template (`chat_template.jinja`, or
    `chat_template` in tokenizer_config.json), else DeepSeek-V3.2's own format where the model and
    the tokenizer's special tokens are V3.2's. With neither, `render` refuses with the reason.

    As in vLLM and SGLang, special tokens spelt out in a message are read as special tokens: the
    sender decides the whole prompt, so do not build messages from text that you do not trust.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig):
        self._tokenizer = tokenizer
        missing = [t for t in chat_dsv32.SPECIAL_TOKENS if tokenizer.token_id(t) is None]
        self._refusal: str | None = None
        self._encode: Callable[..., str]
        if tokenizer.chat_template is not None:
            self._encode = self._jinja
        elif model.model_type == "deepseek_v32" and not missing:
            self._encode = chat_dsv32.encode_messages
        else:
            lacks = f", whose tokenizer would need {missing}" if missing else ""
            self._refusal = (
                f"this checkpoint has no chat template and is not DeepSeek-V3.2{lacks}; "
                "send a plain prompt"
            )

    def render(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        most: int | None = None,
    ) -> ChatPrompt:
        """Check a conversation and encode it; raises RequestError.

        messages: see `check_messages`. add_generation_prompt: open the assistant's turn (None: yes,
        unless a message is continued). continue_final_message: leave the last message, an
        assistant's, open. template_kwargs: variables for the template; for DeepSeek-V3.2
        `{"thinking": true}`. There is no `reasoning_effort` but where a Jinja template reads it.
        most: refuse what cannot be so few tokens (`Tokenizer.encode`).
        """
        if self._refusal is not None:
            raise RequestError("messages", self._refusal)
        checked = check_messages(messages)
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message", "and add_generation_prompt cannot both be true"
            )
        if continue_final_message and checked[-1]["role"] != "assistant":
            raise RequestError(
                "continue_final_message",
                f"the last message is the {checked[-1]['role']}'s; only the assistant's can be",
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        text = self._encode(
            checked,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=_checked_kwargs(template_kwargs),
        )
        return self._prompt(text, most)

    def _prompt(self, text: str, most: int | None) -> ChatPrompt:
        try:
            token_ids = self._tokenizer.encode(text, add_special_tokens=False, most=most)
        except RequestError as error:
            reason = str(error).removeprefix("prompt: ")
            raise RequestError("messages", f"as the template wrote them: {reason}") from None
        in_reasoning = text.rstrip().endswith(THINK)
        end = self._tokenizer.token_id(END_THINK)
        if in_reasoning and end is not None and not self._tokenizer.decode([end]):
            raise RequestError(
                "messages", f"this tokenizer leaves {END_THINK} out of texts: turn thinking off"
            )
        return ChatPrompt(text, token_ids, in_reasoning)

    def _jinja(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        """transformers' sandboxed Jinja. A developer is the system to templates without the role
        (OpenAI's newer name for it); a name or a variable that the template never reads is refused.
        """
        apply = self._tokenizer.apply_chat_template
        reserved = {"messages", *inspect.signature(apply).parameters}
        for name in kwargs:
            if name in reserved or not self._mentions(name):
                raise RequestError(
                    "chat_template_kwargs",
                    f"this checkpoint's template takes no {reprlib.repr(name)}",
                )
        for i, message in enumerate(messages):
            if "name" in message and not self._mentions("name"):
                raise RequestError(f"messages[{i}].name", "this checkpoint's template reads none")
            if message["role"] == "developer" and not self._mentions("developer"):
                message["role"] = "system"
        try:
            return apply(
                messages,
                chat_template=self._tokenizer.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
        except Exception as error:  # whatever the template raises, on purpose or not
            raise RequestError("messages", f"the chat template refused them: {error}") from None

    def _mentions(self, name: str) -> bool:
        assert self._tokenizer.chat_template is not None
        return re.search(rf"\b{re.escape(name)}\b", self._tokenizer.chat_template) is not None


def _checked_kwargs(kwargs: Any) -> Mapping[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise RequestError("chat_template_kwargs", f"{reprlib.repr(kwargs)} is not an object")
    return kwargs
