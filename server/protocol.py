"""Kinds of JSON fields that all bodies share, and how fields that we lack are refused.

A field that OpenAI, vLLM or SGLang documents and we lack is refused unless it carries the value
that asks for nothing; a name that nobody documents is ignored and logged at debug.
"""

import logging
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from minidsv.errors import RequestError

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
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Texts = Annotated[
    list[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Flag = StrictBool | None
Biases = Annotated[dict[str, Number], AfterValidator(_by_token_id)]

MAX_LOGPROBS = 20  # most alternatives shown at a position


def refuse_unsupported(
    model: BaseModel, prefix: str, unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
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
