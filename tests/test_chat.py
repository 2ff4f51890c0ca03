"""Chat: which format a checkpoint gets, what is refused, and LLM.chat to the end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minidsv import LLM, SamplingParams
from minidsv.chat import ChatTemplate
from minidsv.chat_reasoning import Split
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.errors import RequestError
from minidsv.tokenizer import Tokenizer

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
HELLO = [{"role": "user", "content": "hello"}]
PREFILL = [*HELLO, {"role": "assistant", "content": "Hi, I"}]
JINJA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if think %}<think>\n{% endif %}{% endif %}"
)


def checkpoint(folder: Path, *plain: str, special: tuple[str, ...] = (BOS, EOS)) -> Path:
    """The bundled config at two layers, and a byte tokenizer that adds BOS as V3.2's does."""
    folder.mkdir()
    config = json.loads((bundled_model() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(t, special=True) for t in special])
    raw.add_tokens([AddedToken(t, special=False) for t in plain])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dsv32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as DeepSeek-V3.2's: its special tokens and no template."""
    folder = tmp_path_factory.mktemp("chat") / "dsv32"
    return checkpoint(folder, USER, ASSISTANT, "<think>", "</think>")


def template(folder: Path) -> ChatTemplate:
    return ChatTemplate(Tokenizer(folder), ModelConfig.from_path(folder))


@pytest.fixture(scope="module")
def jinja(dsv32: Path) -> ChatTemplate:
    folder = shutil.copytree(dsv32, dsv32.parent / "jinja")
    (folder / "chat_template.jinja").write_text(JINJA)
    return template(folder)


def test_dsv32(dsv32: Path) -> None:
    """One BOS, special tokens as single ids, and reasoning where the prompt opens it."""
    tokenizer, chat = Tokenizer(dsv32), template(dsv32)
    prompt = chat.render(HELLO)
    assert prompt.text == f"{BOS}{USER}hello{ASSISTANT}</think>"
    assert [tokenizer.token_text(i) for i in prompt.token_ids] == [
        *[BOS, USER, *"hello", ASSISTANT, "</think>"]
    ]
    assert prompt.split("a</think>b") == Split("", "a</think>b")
    prompt = chat.render(HELLO, template_kwargs={"thinking": True})
    assert prompt.text == f"{BOS}{USER}hello{ASSISTANT}<think>"
    assert prompt.split("a</think>b") == Split("a", "b")
    assert prompt.splitter().push("a") == Split("a", "")


def test_jinja_comes_first(jinja: ChatTemplate) -> None:
    """Though the tokenizer has V3.2's tokens; `<think>` at the end counts here too."""
    assert jinja.render(HELLO).text == f"{BOS}[user]hello[assistant]"
    assert jinja.render(HELLO, add_generation_prompt=False).text == f"{BOS}[user]hello"
    assert not jinja.render(HELLO).in_reasoning
    assert jinja.render(HELLO, template_kwargs={"think": True}).in_reasoning
    for role, shown in (("system", "system"), ("developer", "system")):
        messages = [{"role": role, "content": "Be brief."}, *HELLO]
        assert jinja.render(messages).text == f"{BOS}[{shown}]Be brief.[user]hello[assistant]"


@pytest.mark.parametrize("named", [False, True])
def test_jinja_in_the_tokenizer_config(dsv32: Path, tmp_path: Path, named: bool) -> None:
    """As one template or as several by name, of which `default` counts."""
    source: Any = "developer"
    if named:
        source = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    folder = shutil.copytree(dsv32, tmp_path / "config")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": source}))
    chat = template(folder)
    assert chat.render([{"role": "developer", "content": "x"}]).text == "developer"
    assert chat.render(HELLO).token_ids == Tokenizer(folder).encode("developer")[1:]


@pytest.mark.parametrize("kind", ["dsv32", "jinja"])
def test_continue_final_message(dsv32: Path, jinja: ChatTemplate, kind: str) -> None:
    chat = jinja if kind == "jinja" else template(dsv32)
    text = chat.render(PREFILL, continue_final_message=True).text
    assert text.endswith("Hi, I")
    whole = chat.render(PREFILL, add_generation_prompt=False).text
    assert whole == text + ("" if kind == "jinja" else EOS)
    with pytest.raises(RequestError, match="continue_final_message: the last message is the user"):
        chat.render(HELLO, continue_final_message=True)
    with pytest.raises(RequestError, match="continue_final_message: and add_generation_prompt"):
        chat.render(PREFILL, continue_final_message=True, add_generation_prompt=True)


def test_content_parts(jinja: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "x": 1}]
    messages = [{"role": "user", "content": parts, "tool_calls": None, "unheard_of": 1}]
    assert jinja.render(messages).text == f"{BOS}[user]a\nb[assistant]"
    assistant = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": []}
    assert jinja.render([assistant, *HELLO]).text == f"{BOS}[assistant][user]hello[assistant]"


def user(**fields: Any) -> list[dict[str, Any]]:
    return [*HELLO, {"role": "user", "content": "x", **fields}]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hello", "messages: 'hello' is not a list"),
        ([], "messages: is empty"),
        (["hello"], r"messages\[0\]: 'hello' is not an object"),
        (user(role="robot"), r"messages\[1\].role: 'robot' is not one of"),
        (user(role=["user"]), r"messages\[1\].role"),
        (user(role="tool"), r"messages\[1\].role: 'tool' is refused: tool calls"),
        (user(role="assistant", tool_calls=[{}]), r"messages\[1\].tool_calls: is refused"),
        (user(tools=[{}]), r"messages\[1\].tools"),
        (user(prefix=True), r"messages\[1\].prefix: is refused: use continue_final_message"),
        (user(content=None), r"messages\[1\].content: None is not a string"),
        (user(content=3), r"messages\[1\].content: 3"),
        (user(content=["x"]), r"messages\[1\].content\[0\]: 'x' parts"),
        (user(content=[{"type": "image_url"}]), r"content\[0\]: 'image_url' parts are refused"),
        (user(content=[{"type": "text"}]), r"content\[0\].text: None"),
        (user(content="\ud800"), r"messages\[1\].content: not valid Unicode"),
        (user(name=3), r"messages\[1\].name: 3"),
        (user(name="bob"), r"messages\[1\].name: this checkpoint's template reads none"),
        (user(reasoning_content="hm"), r"messages\[1\].reasoning_content: belongs to"),
    ],
)
def test_refused_messages(jinja: ChatTemplate, messages: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        jinja.render(messages)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        (["think"], "is not an object"),
        ({"thinkin": True}, "no 'thinkin'"),
        ({"reasoning_effort": "high"}, "no 'reasoning_effort'"),
        ({"messages": []}, "no 'messages'"),
        ({"add_generation_prompt": False}, "no 'add_generation_prompt'"),
    ],
)
def test_refused_kwargs(jinja: ChatTemplate, kwargs: Any, error: str) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs: .*{error}"):
        jinja.render(HELLO, template_kwargs=kwargs)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "the chat template refused"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refused"),
        ("{{ '\\ud800' }}", "messages"),
    ],
)
def test_templates_that_fail(dsv32: Path, tmp_path: Path, source: str, error: str) -> None:
    folder = shutil.copytree(dsv32, tmp_path / "broken")
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(RequestError, match=error):
        template(folder).render(HELLO)


def test_neither(dsv32: Path, tmp_path: Path) -> None:
    """No template, and a token or the model type missing: the reason names it."""
    with pytest.raises(
        RequestError, match=r"messages: this checkpoint has no chat template .*User"
    ):
        template(checkpoint(tmp_path / "plain")).render(HELLO)
    glm = ModelConfig.from_path(Path(__file__).parent.parent / "configs" / "glm5.json")
    with pytest.raises(RequestError, match="messages: this checkpoint has no chat template"):
        ChatTemplate(Tokenizer(dsv32), glm).render(HELLO)


def test_hidden_think_token(tmp_path: Path) -> None:
    """A tokenizer that leaves `</think>` out of texts cannot have its reasoning split."""
    folder = checkpoint(tmp_path / "x", USER, ASSISTANT, special=(BOS, EOS, "<think>", "</think>"))
    assert template(folder).render(HELLO).text.endswith("</think>")
    with pytest.raises(RequestError, match="turn thinking off"):
        template(folder).render(HELLO, template_kwargs={"thinking": True})


def test_llm_chat(dsv32: Path) -> None:
    """A list of conversations; each answer is the one to its tokens."""
    llm = LLM(model=str(dsv32), load_format="random")
    params = SamplingParams(max_tokens=6)
    conversations = [HELLO, [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]]
    thinking = {"thinking": True}
    outputs = llm.chat(conversations, params, chat_template_kwargs=thinking)
    prompts = [template(dsv32).render(c, template_kwargs=thinking) for c in conversations]
    assert [o.prompt for o in outputs] == [p.text for p in prompts]
    assert [o.prompt_token_ids for o in outputs] == [p.token_ids for p in prompts]
    for output, prompt in zip(outputs, prompts, strict=True):
        alone = llm.generate(prompt.token_ids, params)[0].outputs[0]
        assert output.outputs[0].token_ids == alone.token_ids
    [output] = llm.chat(PREFILL, params, continue_final_message=True)
    assert output.prompt is not None
    assert output.prompt.endswith("Hi, I")
    long = [{"role": "user", "content": "hello " * 30}]
    cached = [llm.chat(long, params, cache_salt=salt)[0].num_cached_tokens for salt in "aab"]
    assert cached == [0, 128, 0]
    with pytest.raises(RequestError, match=r"messages\[0\].role"):
        llm.chat([{"content": "x"}])
    llm.close()


def test_the_bundled_model_chats() -> None:
    """By its Jinja template, streamed."""
    llm, seen = LLM(), []
    question = {"role": "user", "content": "What is the chemical symbol of iron?"}
    [output] = llm.chat([question], SamplingParams(stop=["\n"]), on_output=seen.append)
    assert output.outputs[0].text == " Fe"
    assert "".join(step.text for step in seen) == " Fe"
    llm.close()
