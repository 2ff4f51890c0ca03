"""Text to tokens by transformers' AutoTokenizer, and tokens to text one at a time by tokenizers'
DecodeStream.
"""

import json
from pathlib import Path

from tokenizers.decoders import DecodeStream

from minidsv.config import token_id_tuple
from minidsv.errors import CheckpointError, RequestError

_CONTEXT = (
    8  # prompt tokens that prime the stream, so that the first output token keeps its leading space
)
_BROKEN = "\ufffd"


class Tokenizer:
    """The tokenizer in a checkpoint folder."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: no tokenizer that transformers can load: {error}"
            ) from None
        if not hf.is_fast:
            raise CheckpointError(f"{folder}: no tokenizer.json; a fast tokenizer is needed")
        self.backend = hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = len(hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds (BOS)."""
        try:
            return self.backend.encode(text).ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("prompt", "not valid Unicode text (a lone surrogate?)") from None

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        known = [i for i in token_ids if i < self.size]
        return self.backend.decode(known, skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """One token on its own, special tokens shown."""
        return (
            self.backend.decode([token_id], skip_special_tokens=False)
            if token_id < self.size
            else ""
        )

    def stream(self, prompt_token_ids: list[int]) -> "DetokenizerStream":
        return DetokenizerStream(self, prompt_token_ids)


class DetokenizerStream:
    """Text of a growing sequence: each `push` returns what the new token completes, `flush` what
    never completed.

    The pieces join to the decoding of all tokens; bytes of an unfinished character appear, as
    U+FFFD, in `flush` only.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # tokens since the last piece of text
        context = prompt_token_ids[-_CONTEXT:]
        if not tokenizer.decode(context).endswith(
            _BROKEN
        ):  # else the prompt's half character would leak
            for token in context:
                self._step(token)
            self._pending.clear()

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._step(token_id)
        if text:
            self._pending.clear()
        return text

    def flush(self) -> str:
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text

    def _step(self, token_id: int) -> str:
        if token_id >= self._tokenizer.size:
            return ""
        try:
            return self._stream.step(self._tokenizer.backend, token_id) or ""
        except (
            Exception
        ):  # tokenizers raises a bare Exception ("Invalid prefix encountered"): start afresh
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._tokenizer.decode([token_id])


def eos_token_ids(folder: Path, fallback: tuple[int, ...]) -> tuple[int, ...]:
    """EOS ids of `generation_config.json`, or those of `config.json` where it names none."""
    file = folder / "generation_config.json"
    if not file.exists():
        return fallback
    try:
        ids = token_id_tuple(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    return ids or fallback
