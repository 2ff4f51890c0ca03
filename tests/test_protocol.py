"""Bodies by themselves: what the kinds of fields refuse, before any engine is asked."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from minidsv.server.chat_completions import ChatRequest
from minidsv.server.completions import CompletionRequest
from minidsv.server.sglang import GenerateRequest
from minidsv.server.tokenize import DetokenizeRequest

BAD: Any = [None] * 1000
LISTS = [
    *((CompletionRequest, {"prompt": "a", name: BAD}, name)
      for name in ("prompt", "stop", "stop_token_ids", "logprob_token_ids")),
    *((ChatRequest, {"messages": [], name: BAD}, name) for name in ("stop", "stop_token_ids")),
    (GenerateRequest, {"input_ids": BAD}, "input_ids"),
    *((GenerateRequest, {"text": "a", "sampling_params": {name: BAD}}, name)
      for name in ("stop", "stop_token_ids")),
    (DetokenizeRequest, {"tokens": BAD}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "name"), LISTS)
def test_a_list_of_bad_items_is_one_error(
    model: type[BaseModel], body: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() == 1
    assert name in refused.value.errors()[0]["loc"]
