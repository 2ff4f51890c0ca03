"""Incremental detokenisation equals decoding at the end, whatever the tokens."""

import shutil
from pathlib import Path
from threading import Thread
from time import sleep

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minidsv.engine_config import bundled_model
from minidsv.errors import CheckpointError, RequestError
from minidsv.tokenizer import MOST_PENDING, Tokenizer, eos_token_ids

TOKENIZER = Tokenizer(bundled_model())
EOS = 1
LONE = [token for token in range(TOKENIZER.size) if TOKENIZER.decode([token]) == "\ufffd"]


def streamed(prompt: list[int], output: list[int]) -> tuple[list[str], str]:
    stream = TOKENIZER.stream(prompt)
    return [stream.push(token) for token in output], stream.flush()


def test_bos_is_added() -> None:
    assert TOKENIZER.encode("hi")[0] == 0
    assert TOKENIZER.decode(TOKENIZER.encode("hi there")) == "hi there"


def test_a_spelt_bos_is_the_only_one() -> None:
    assert TOKENIZER.encode("<bos>hi") == TOKENIZER.encode("hi")
    assert TOKENIZER.encode("<bos>hi", add_special_tokens=False) == TOKENIZER.encode("hi")
    assert TOKENIZER.encode("<bos>") == TOKENIZER.encode("") == [0]
    assert TOKENIZER.encode("hi<bos>")[-1] == 0


def test_a_text_that_cannot_fit_is_refused_unread() -> None:
    longest = max(TOKENIZER.backend.get_vocab(), key=len).replace("Ġ", " ")
    assert len(TOKENIZER.encode(longest * 3, add_special_tokens=False, most=3)) == 3
    with pytest.raises(RequestError, match=rf"{3 * len(longest) + 1} characters .* 3 tokens"):
        TOKENIZER.encode(longest * 3 + "x", most=3)


def test_encoding_leaves_other_threads_running() -> None:
    thread = Thread(target=TOKENIZER.encode, args=("some words " * 100_000,))
    thread.start()
    turns = 0
    while thread.is_alive():
        sleep(0.001)
        turns += 1
    assert turns > 20


@given(st.text(max_size=20))
@settings(deadline=None)
def test_bytes_of_tokens_join(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


@given(st.text(max_size=40))
@example("\ufffd" * 100)
@settings(deadline=None)
def test_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)[1:]
    pieces, rest = streamed([0], ids)
    assert "".join(pieces) + rest == text
    assert rest == "" or text.endswith("\ufffd")  # which looks like an unfinished character


@given(
    st.lists(st.integers(0, TOKENIZER.size + 20), max_size=6),
    st.lists(st.integers(0, TOKENIZER.size + 20), max_size=12),
)
@settings(deadline=None, max_examples=300)
def test_any_tokens(prompt: list[int], output: list[int]) -> None:
    """Half characters, special tokens, unknown ids: the pieces join to the whole decoding."""
    pieces, rest = streamed(prompt, output)
    assert "".join(pieces) + rest == TOKENIZER.decode(output)


RUNS = st.tuples(st.sampled_from([EOS, *LONE]), st.integers(1, 2 * MOST_PENDING))
BYTES = st.text(min_size=1, max_size=3).map(lambda text: TOKENIZER.encode(text)[1:])
PARTS = st.one_of(
    RUNS.map(lambda run: [run[0]] * run[1]),
    BYTES,
    BYTES.map(lambda ids: [token for i in ids for token in (i, EOS)]),
    BYTES.map(lambda ids: ids[:-1]),
)


@given(st.lists(PARTS, max_size=6).map(lambda parts: [token for part in parts for token in part]))
@settings(deadline=None, max_examples=300)
def test_long_silence(output: list[int]) -> None:
    """Many tokens without text, whole and cut characters behind them, EOS between their bytes."""
    pieces, rest = streamed([0], output)
    assert "".join(pieces) + rest == TOKENIZER.decode(output)


@pytest.mark.parametrize("token", [EOS, LONE[-1]])
def test_tokens_without_text_are_not_kept(token: int) -> None:
    stream = TOKENIZER.stream([0])
    held = []
    for _ in range(1000):
        stream.push(token)
        held.append(len(stream._pending))
    assert max(held) < MOST_PENDING


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_tokens_that_end_inside_characters(cut: int, tmp_path: Path) -> None:
    """Every token finishes a character and begins the next, so that no text ends with one."""
    emoji = "".join(name for name, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🎉"))
    head, tail = emoji[:cut], emoji[cut:]
    raw = tokenizers.Tokenizer(models.BPE({head: 0, tail + head: 1, tail: 2}, []))
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    shutil.copy(bundled_model() / "config.json", tmp_path)
    stream = Tokenizer(tmp_path).stream([])
    assert "".join(map(stream.push, [0, *[1] * 99, 2])) == "🎉" * 100


def test_an_emoji_appears_whole() -> None:
    ids = TOKENIZER.encode("a🎉b")[1:]
    pieces, _ = streamed([0], ids)
    assert [p for p in pieces if p] == ["a", "🎉", "b"]


def test_a_character_cut_short_appears_in_flush() -> None:
    ids = TOKENIZER.encode("🎉")[1:3]
    pieces, rest = streamed([0], ids)
    assert "".join(pieces) == ""
    assert rest == TOKENIZER.decode(ids)
    assert set(rest) == {"\ufffd"}


def test_a_prompt_that_ends_inside_a_character_does_not_leak() -> None:
    prompt = TOKENIZER.encode("secret words 🎉")[:-1]
    pieces, rest = streamed(prompt, TOKENIZER.encode("ok")[1:])
    assert "".join(pieces) + rest == "ok"


def byte_fallback_tokenizer(folder: Path) -> Tokenizer:
    """A SentencePiece-style tokenizer as Llama's: metaspace words and one token a byte."""
    words = ["\u2581hello", "\u2581world", "\u2581", "a", "b"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {word: 300 + i for i, word in enumerate(words)}  # ids with a gap
    raw = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    shutil.copy(bundled_model() / "config.json", folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("prompt", "output", "want"),
    [
        ([300], [301, 300], " world hello"),
        ([], [301, 300], "world hello"),
        ([300], [11, 229, 301, 300], "\n\ufffd world hello"),
        ([300, 229], [301, 303], " worlda"),
        ([300], [304, 241, 160, 143, 138, 301], "b\U0001f389 world"),
        ([300], [500, 301], " world"),
        ([300], [304, 241, 270, 160, 270, 143, 138, 301], "b\U0001f389 world"),
        ([300], [270] * 200 + [301], " world"),
        ([300], [229] * 70 + [301, 300], "\ufffd" * 70 + " world hello"),
        ([300], [229] * 62 + [241, 160, 143, 138, 302, 301], "\ufffd" * 66 + "  world"),
    ],
    ids=[
        *("words", "no prompt", "broken bytes", "prompt ends in a byte", "emoji", "gap"),
        *("gaps between bytes", "many gaps", "many bytes", "cut in an emoji"),
    ],
)
def test_byte_fallback(prompt: list[int], output: list[int], want: str, tmp_path: Path) -> None:
    stream = byte_fallback_tokenizer(tmp_path).stream(prompt)
    assert "".join(map(stream.push, output)) + stream.flush() == want


def test_bytes_of_byte_fallback_tokens(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer(tmp_path)
    assert b"".join(map(tokenizer.token_bytes, [241, 160, 143, 138, 303])) == "\U0001f389a".encode()


def test_lone_surrogate() -> None:
    with pytest.raises(RequestError, match="prompt"):
        TOKENIZER.encode("\ud800")


def test_no_tokenizer(tmp_path: Path) -> None:
    shutil.copy(bundled_model() / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer(tmp_path)


def test_eos_ids(tmp_path: Path) -> None:
    assert eos_token_ids(tmp_path, (7,)) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert eos_token_ids(tmp_path, (7,)) == (3, 4)
    (tmp_path / "generation_config.json").write_text("{}")
    assert eos_token_ids(tmp_path, (7,)) == (7,)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path, (7,))
