"""Text to tokens (transformers' AutoTokenizer), and tokens to text one at a time."""

import codecs
import json
import re
from pathlib import Path

from tokenizers.decoders import DecodeStream

from minidsv.config_fields import Fields
from minidsv.errors import CheckpointError, RequestError

_CONTEXT = (
    8  # prompt tokens that prime the stream, so that the first output token keeps its leading space
)
_BROKEN = "\ufffd"
MOST_PENDING = 64  # tokens that a stream holds back: more are no character
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {  # GPT-2's alphabet of bytes
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


class Tokenizer:
    """The tokenizer in a checkpoint folder."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever its parsers raise on a damaged file
            raise CheckpointError(
                f"{folder}: no tokenizer that transformers can load: {error}"
            ) from None
        if not hf.is_fast:
            raise CheckpointError(f"{folder}: no tokenizer.json; a fast tokenizer is needed")
        self.backend = hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.apply_chat_template = hf.apply_chat_template
        template = hf.chat_template  # one, or several by name
        self.chat_template: str | None = (
            template.get("default") if isinstance(template, dict) else template
        )
        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocab.values())  # with gaps
        self.longest = max(map(len, vocab))  # characters
        self._added: list[int] = self.backend.encode("").ids
        self._token_texts: dict[int, str] = {}
        added = self.backend.get_added_tokens_decoder()
        self.silent = {*range(self.size)} - {*vocab.values()}  # without text: gaps, special tokens
        self.silent |= {token for token, one in added.items() if one.special}

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds (BOS). Special
        tokens that the text spells out are read as such either way; a BOS that it begins with is
        the only one.

        Raises RequestError; with `most`, also for a text that is longer than so many tokens can be,
        before it costs any time. Other threads go on meanwhile: unlike `encode`, the backend's
        batches leave the interpreter's lock.
        """
        if most is not None and len(text) > most * self.longest:
            raise RequestError(
                "prompt",
                f"{len(text)} characters are too many; {most} tokens, as many as max_model_len and "
                f"the cache admit, have at most {most * self.longest}",
            )
        try:
            (encoding,) = self.backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError):
            raise RequestError("prompt", "not valid Unicode text (a lone surrogate?)") from None
        ids: list[int] = encoding.ids
        added = len(self._added) if add_special_tokens else 0
        return ids[added:] if added and ids[: 2 * added] == self._added * 2 else ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        known = [i for i in token_ids if i < self.size]
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token on its own, special tokens shown; remembered, for log-probabilities."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token's UTF-8, which may be a part of a character (`token_text` shows U+FFFD)."""
        text = self.token_text(token_id)
        if _BROKEN not in text:
            return text.encode()
        piece = self.backend.id_to_token(token_id)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(found[1])
        return bytes(_BYTE_LEVEL.get(character, 0) for character in piece)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling."""
        return self.backend.token_to_id(token)

    def stream(self, prompt_token_ids: list[int]) -> "DetokenizerStream":
        return DetokenizerStream(self, prompt_token_ids)


class DetokenizerStream:
    """Text of a growing sequence: `push` returns what a token completes, `flush` what is left.

    The pieces join to the decoding of all tokens (but for how many U+FFFD stand for bytes that are
    no UTF-8); an unfinished character appears, as U+FFFD, in `flush` only.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._given = ""  # what the stream's next piece begins with and is out already
        self._last: list[int] = []  # the token that completed the last piece, or a few
        self._out: str | None = None  # how much of their text is out; None: all
        self._pending: list[int] = []  # the tokens behind them
        context = prompt_token_ids[-_CONTEXT:]
        while context and tokenizer.decode(context).endswith(_BROKEN):
            context.pop()  # the prompt's half character is not the output's
        for token in context:
            self.push(token)
        self._pending.clear()

    def push(self, token_id: int) -> str:
        if token_id >= self._tokenizer.size or token_id in self._tokenizer.silent:
            return ""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id) or ""
        except Exception:  # tokenizers' own, bare: the bytes so far changed their meaning
            return self._restart()
        if text:
            text = text.removeprefix(self._given)
            self._given, self._last, self._out = "", [token_id], None
            self._pending.clear()
        elif len(self._pending) >= MOST_PENDING:
            return self._restart()
        return text

    def flush(self) -> str:
        text = self._rest()
        self._last, self._out = self._last + self._pending, None
        self._pending.clear()
        return text

    def _rest(self) -> str:
        """The text that is not out yet."""
        decode = self._tokenizer.decode
        out = decode(self._last) if self._out is None else self._out
        whole = decode([*self._last, *self._pending])
        return whole.removeprefix(out) if whole.startswith(out) else decode(self._pending)

    def _restart(self) -> str:
        """The text that is not out yet but for an unfinished character, and a new stream."""
        text, tokens = self._rest(), [*self._last, *self._pending]
        if text:
            held, num_hidden = self._unfinished(tokens) if text.endswith(_BROKEN) else (0, 0)
            text = text[: len(text) - num_hidden]
            self._last = tokens[-1 - held :]
            shown = self._tokenizer.decode(self._last)
            self._out = shown[: len(shown) - num_hidden]
        self._pending.clear()
        self._stream = DecodeStream(skip_special_tokens=True)
        pieces = [self._stream.step(self._tokenizer.backend, token) for token in self._last]
        out = self._tokenizer.decode(self._last) if self._out is None else self._out
        self._given = out.removeprefix("".join(piece or "" for piece in pieces))
        return text

    def _unfinished(self, tokens: list[int]) -> tuple[int, int]:
        """How many tokens at the end hold the bytes of an unfinished character, and how many U+FFFD
        stand for these bytes: one, or with a byte a token one each.
        """
        data = list(map(self._tokenizer.token_bytes, tokens[-3:]))
        _, used = codecs.utf_8_decode(b"".join(data), "replace", False)
        left, held = len(b"".join(data)) - used, 0
        while sum(map(len, data[len(data) - held :])) < left:
            held += 1
        finished, _ = codecs.utf_8_decode(b"".join(data[len(data) - held :]), "replace", False)
        return held, len(self._tokenizer.decode(tokens[len(tokens) - held :])) - len(finished)


def eos_token_ids(folder: Path, fallback: tuple[int, ...]) -> tuple[int, ...]:
    """EOS ids of `generation_config.json`, or those of `config.json` where it names none."""
    file = folder / "generation_config.json"
    if not file.exists():
        return fallback
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    return Fields(raw, file.name).token_ids("eos_token_id") or fallback
