"""Kinds of JSON fields that all bodies share, and how fields that we lack are refused.

A field that OpenAI, vLLM or SGLang documents and we lack, or have elsewhere, is refused unless it
carries the value that asks for nothing; a name that nobody documents is ignored and logged at
debug.
"""

import logging
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from minidsv.errors import RequestError
from minidsv.request import SamplingParams

logger = logging.getLogger(__name__)


def check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "unicode", "Input should be valid Unicode (it has a lone surrogate)"
        ) from None
    return text


def _by_token_id(biases: dict[str, float]) -> dict[int, float]:
    """JSON's keys are strings."""
    for token in biases:
        if not re.fullmatch("[0-9]{1,18}", token):
            raise PydanticCustomError("token_id", "Input should have token ids as keys")
    return {int(token): bias for token, bias in biases.items()}


Text = Annotated[StrictStr, AfterValidator(check_unicode)]
Integer = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Integers = Annotated[list[Integer], Field(fail_fast=True)]  # of a million errors one is told
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Texts = Annotated[
    list[Text],
    Field(fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Flag = StrictBool | None
Biases = Annotated[dict[str, Number], AfterValidator(_by_token_id)]

MAX_LOGPROBS = 20  # most alternatives shown at a position
SAMPLING_NAMES = frozenset(parameter.name for parameter in fields(SamplingParams))
Unsupported = Mapping[str, tuple[Any, ...]]
"""Documented fields -> values that ask for nothing (None and what is empty always do)."""


class Body(BaseModel):
    """What a generating route accepts, or an object inside it."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Unsupported] = {}

    def refuse_unsupported(self, prefix: str = "") -> None:
        """Raise RequestError for what is lacking here: `unsupported`, and what SamplingParams or
        any other body has or refuses; false asks for nothing."""
        bodies = [type(self), *_subclasses(Body)]
        lacking: dict[str, tuple[Any, ...]] = {}
        for name in self.model_extra or {}:
            if name in SAMPLING_NAMES or any(name in body.model_fields for body in bodies):
                lacking[name] = (False,)
            for body in bodies:
                if name in body.unsupported:
                    lacking.setdefault(name, body.unsupported[name])
        refuse_unsupported(self, prefix, lacking | {**type(self).unsupported})


def _subclasses(parent: type[Body]) -> Iterator[type[Body]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def refuse_unsupported(model: BaseModel, prefix: str, unsupported: Unsupported) -> None:
    """Raise RequestError for a documented field that we lack and that asks for something.

    `unsupported` maps names to the values that ask for nothing, beside null and what is empty. A
    name that nobody documents is ignored and logged at debug.
    """
    for name, value in (model.model_extra or {}).items():
        if name not in unsupported:
            logger.debug("ignoring unknown field %s%s", prefix, name)
        elif not _asks_for_nothing(value, unsupported[name]):
            shown = reprlib.repr(value)
            raise RequestError(prefix + name, f"{shown} is not supported by this server")


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or value in ("", [], {}):
        return True
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def validation_reason(error: ErrorDetails) -> tuple[str | None, str]:
    """What pydantic found: the field (None: the body itself), and what is wrong with it."""
    field = ".".join(str(part) for part in error["loc"] if part != "body") or None
    if error["type"] == "json_invalid":
        return None, f"{error['msg']} at character {error['loc'][-1]}"
    if field is None and error["type"] in ("missing", "model_type", "model_attributes_type"):
        return None, "a JSON object with Content-Type: application/json is needed"
    shown = "" if error["type"] == "missing" else f"; got {reprlib.repr(error['input'])}"
    return field, error["msg"] + shown


def given(model: BaseModel, exclude: Collection[str] = ()) -> dict[str, Any]:
    """The declared fields of `model` that are not null."""
    names = type(model).model_fields.keys() - set(exclude)
    return {name: value for name in names if (value := getattr(model, name)) is not None}


def finite(logprob: float) -> float:
    """JSON has no infinity; the lowest number is vLLM's."""
    return max(logprob, -9999.0)
