"""The page at `/`: its files and headers, and what a person sees of it in headless Chromium."""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from minidsv.server import page
from minidsv.server.options import ServerOptions
from served import Served, serving, wait_until

FILES = sorted(page.STATIC.iterdir())
FACT = "Question: What is the capital of France?\nAnswer:"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page.routes())
    return TestClient(app)


@pytest.mark.parametrize("path", sorted(page.PATHS))
def test_file(path: str, client: TestClient) -> None:
    """Served with its type, headers that keep it alone, and an ETag that saves a second copy."""
    response = client.get(path)
    file = page.STATIC / (path.removeprefix("/static/").strip("/") or "index.html")
    assert (response.status_code, response.content) == (200, file.read_bytes())
    kind = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg"}
    assert response.headers["content-type"].startswith(kind[file.suffix])
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"http|\*|unsafe", response.headers["content-security-policy"])
    assert response.headers["cache-control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).headers["content-length"] == str(file.stat().st_size)


@pytest.mark.parametrize("path", ["/static/", "/static/none.js", "/static/..%2fapp.py", "/page.js"])
def test_no_other_file(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_files_name_nothing_outside(file: Path) -> None:
    """No address but SVG's namespace, no inline script or style; every file named is there."""
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[\w-]+\.\w", text)
    assert not re.search(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", text)
    named = re.findall(r"static/([\w.]+)|from \"\./([\w.]+)\"", text)
    assert {a or b for a, b in named} <= {f.name for f in FILES}


@pytest.fixture(scope="module")
def bundled() -> Iterator[Served]:
    with serving(load_format="auto") as served:
        yield served


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    reason = "needs playwright: the extra `browser`"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(CHROMIUM)} on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, served: Served, *expected: str) -> Iterator[Any]:
    """The page in a new browser context; at the end the console has no errors but the `expected`,
    and no request went elsewhere.
    """
    url = str(served.client.base_url).rstrip("/")
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(15_000)
    view, problems = context.new_page(), list[str]()
    view.on("console", lambda m: m.type == "error" and problems.append(m.text))
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.on("request", lambda r: r.url.startswith(url + "/") or problems.append(r.url))
    view.goto(url)
    try:
        yield view
        assert len(problems) == len(expected), problems
        assert all(words in text for words, text in zip(expected, problems, strict=True))
    finally:
        context.close()


@pytest.fixture
def view(chromium: Any, bundled: Served) -> Iterator[Any]:
    with opened(chromium, bundled) as opened_page:
        yield opened_page


def generate(view: Any, **fields: Any) -> None:
    """Fill in the form, press the button and wait for the end."""
    for name, value in fields.items():
        view.fill(f"[name={name}], #{name}", str(value))
    view.click("#run")
    view.locator("#run:enabled").wait_for()


def answer(served: Served, text: str, **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 64}
    return served.generate(text=text, sampling_params=sampling, **fields).json()


@pytest.mark.browser
def test_an_answer_appears(view: Any, bundled: Served) -> None:
    want = answer(bundled, FACT)
    generate(view, prompt=FACT)
    assert view.text_content("#output") == want["text"] == " Paris"
    assert view.locator("#output .token").count() == want["meta_info"]["completion_tokens"]
    assert re.fullmatch(r"\d+ ms", view.text_content("#ttft"))
    assert float(view.text_content("#rate")) > 0
    assert view.text_content("#status") == "ended: stop"
    last = want["meta_info"]["prompt_tokens"] + want["meta_info"]["completion_tokens"] - 1
    assert f"all {last} positions" in view.text_content("#summary")


@pytest.mark.browser
def test_it_streams_until_it_is_stopped(view: Any, bundled: Served) -> None:
    """Text grows while the engine works; the button ends both."""
    view.fill("#prompt", FACT)
    view.fill("[name=max_new_tokens]", "4000")
    view.check("[name=ignore_eos]")
    view.click("#run")
    for count in (5, 20):
        view.locator("#output .token").nth(count).wait_for(state="attached")
        assert bundled.engine.scheduler.running
        assert view.is_disabled("#run")
    view.click("#abort")
    wait_until(lambda: bundled.idle)
    assert view.text_content("#status") == "stopped"
    assert view.is_enabled("#run")
    assert 20 < int(view.text_content("#count")) < 4000


@pytest.mark.browser
def test_a_refusal_is_shown_in_its_words(chromium: Any, bundled: Served) -> None:
    with opened(chromium, bundled, "status of 400") as view:
        generate(view, max_new_tokens=10**6)
        assert "max_new_tokens" in view.text_content("#status")
        assert "error" in view.get_attribute("#status", "class")


@pytest.mark.browser
def test_hover_shows_probabilities(view: Any, bundled: Served) -> None:
    asked = {"return_logprob": True, "top_logprobs_num": 5}
    info = answer(bundled, FACT, **asked)["meta_info"]
    generate(view, prompt=FACT)
    for index, tops in enumerate(info["output_top_logprobs"]):
        view.locator("#output .token").nth(index).hover()
        assert f"id {info['output_token_logprobs'][index][1]}" in view.text_content("#token-title")
        shown = view.locator("#alternatives .share").all_text_contents()
        assert len(shown) == len(tops) == 5
        for text, (logprob, *_) in zip(shown, tops, strict=True):
            share = 100 * math.exp(logprob)
            assert float(text.strip("< %")) == pytest.approx(share, abs=0.051)
    assert view.locator("#alternatives [aria-current]").count() == 1


LIT = """(columns) => {
  const canvas = document.getElementById("strip"), box = canvas.getBoundingClientRect();
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const color = (x, y) => {
    const scale = canvas.width / box.width;
    const at = 4 * (Math.floor(y * scale) * canvas.width + Math.floor(x * scale));
    return pixels.slice(at, at + 4).join();
  };
  return [...document.getElementById("layers").children].map((label) => {
    const row = label.getBoundingClientRect(), y = row.y - box.y + row.height / 2;
    return [...Array(columns).keys()].map((i) => color((i + 0.5) * box.width / columns, y));
  });
}"""


def lit(view: Any, columns: int) -> list[list[int]]:
    """Per row of the strip, the columns whose middle has not the colour of the last column's: the
    newest token, whose key no query has seen yet.
    """
    rows = view.evaluate(LIT, columns)
    return [[i for i, color in enumerate(row) if color != row[-1]] for row in rows]


@pytest.mark.browser
def test_the_strip_shows_what_the_api_says(view: Any, bundled: Served) -> None:
    """The ready example: every cell of every layer, and the record that holds the answer."""
    prompt = view.input_value("#prompt")
    view.click("[data-example=fact]")
    view.click("[data-example=retrieval]")
    assert view.input_value("#prompt") == prompt
    want = answer(bundled, prompt, return_indexer_topk=True)
    generate(view)
    assert view.text_content("#output") == want["text"] == " lamp"
    columns = want["meta_info"]["prompt_tokens"] + want["meta_info"]["completion_tokens"]
    for index, selection in enumerate(want["meta_info"]["indexer_topk"]):
        view.locator("#output .token").nth(index).hover()
        assert f"64 of {selection['num_keys']}" in view.text_content("#summary")
        assert lit(view, columns) == selection["layers"]
    encode = bundled.engine.tokenizer.encode
    record = range(len(encode(prompt.split("Cara")[0])), len(encode(prompt.split("\n* Dan")[0])))
    view.locator("#output .token").nth(0).hover()
    chosen = [layer for layer in lit(view, columns) if set(layer) & set(record)]
    assert len(chosen) >= 2, "two layers at least select in the record ` Cara = lamp`"


@pytest.mark.browser
def test_the_prompt_is_shaded_and_marked(view: Any, bundled: Served) -> None:
    """Its tokens in the colour of how many layers selected them; text to mark is found in it."""
    prompt = view.input_value("#prompt")
    selection = answer(bundled, prompt, return_indexer_topk=True)["meta_info"]["indexer_topk"][0]
    generate(view)
    view.locator("#output .token").nth(0).hover()
    tokenizer = bundled.engine.tokenizer
    ids = tokenizer.encode(prompt)
    texts = [tokenizer.token_text(token) for token in ids]
    assert view.locator("#context span").all_text_contents() == texts
    heats = "spans => spans.map((span) => Number(span.style.getPropertyValue('--heat')))"
    layers = selection["layers"]
    want = [sum(i in layer for layer in layers) / len(layers) for i in range(len(ids))]
    assert view.locator("#context span").evaluate_all(heats) == pytest.approx(want)
    first = texts.index(" Cara")
    touching = sum(any(first <= i <= first + 2 for i in layer) for layer in layers)
    assert view.locator("#context .marked").all_text_contents() == [" Cara", " =", " lamp"]
    said = f"positions {first} to {first + 2}: {touching} of 5 layers selected there"
    assert view.text_content("#marked") == said
    box = view.locator("#strip").bounding_box()
    view.mouse.move(box["x"] + box["width"] * (first + 2.5) / (len(ids) + 2), box["y"] + 20)
    assert view.text_content("#cell").startswith(f'position {first + 2} " lamp" · layer 0')
    assert view.locator("#context .here").text_content() == " lamp"


@pytest.mark.browser
def test_load_is_shown(view: Any, bundled: Served) -> None:
    view.fill("#prompt", FACT)
    view.fill("[name=max_new_tokens]", "4000")
    view.check("[name=ignore_eos]")
    view.click("#run")
    view.locator("#running:text-is('1')").wait_for()
    assert float(view.text_content("#kv").removesuffix(" %")) > 0
    view.click("#abort")
    view.locator("#running:text-is('0')").wait_for()
    view.locator("#kv:text-is('0.0 %')").wait_for()


@pytest.mark.browser
def test_cells_tell_where_they_are(view: Any) -> None:
    """By mouse and by keyboard."""
    generate(view)
    box = view.locator("#strip").bounding_box()
    view.mouse.move(box["x"] + 1, box["y"] + box["height"] - 3)
    assert re.match(r"position 0\b.* layer 4: (not )?selected", view.text_content("#cell"))
    view.focus("#strip")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        view.keyboard.press(key)
    assert re.match(r"position 2\b.* layer 3: (not )?selected", view.text_content("#cell"))


@pytest.mark.browser
def test_arrow_keys_move_between_tokens(view: Any) -> None:
    generate(view)
    view.focus("#output .token[tabindex='0']")
    for key, number in (("Home", 1), ("ArrowRight", 2), ("ArrowRight", 2), ("ArrowLeft", 1)):
        view.keyboard.press(key)
        assert view.text_content("#token-title").startswith(f"Token {number}:")
        assert view.text_content("#summary").startswith(f"Token {number}:")


@pytest.mark.browser
def test_shared_layers_are_marked(chromium: Any, checkpoints: dict[str, Path]) -> None:
    glm = {"model": str(checkpoints["glm"]), "load_format": "auto"}
    with serving(**glm) as served, opened(chromium, served) as view:
        generate(view, prompt="@#$%^&" * 12, max_new_tokens=2)
        types = served.engine.model_config.indexer_types
        full = max(i for i, kind in enumerate(types) if kind == "full")
        assert view.locator("#layers .shared").count() == types.count("shared") > 0
        shared = view.locator("#layers .shared").all_text_contents()
        assert f"layer {full + 1} = {full}" in shared
        assert f"{len(shared)} of them share" in view.text_content("#summary")


@pytest.mark.browser
def test_a_key_is_asked_for_and_kept_nowhere(chromium: Any) -> None:
    keys = ServerOptions(api_key=("secret",))
    with (
        serving(keys, load_format="auto") as served,
        opened(chromium, served, "status of 401") as view,
    ):
        view.locator("#status.error:has-text('a key is needed')").wait_for()
        view.fill("#key", "secret")
        view.press("#key", "Tab")
        generate(view, prompt=FACT)
        assert view.text_content("#output") == " Paris"
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert view.evaluate(kept) == '[{},{},""]'
        assert "secret" not in view.content()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_field_has_a_label_and_nothing_sticks_out(scheme: str, width: int, view: Any) -> None:
    view.emulate_media(color_scheme=scheme)
    view.set_viewport_size({"width": width, "height": 800})
    generate(view)
    nameless = "[...document.querySelectorAll('input, textarea, meter')].filter(e => !e.labels[0])"
    assert view.evaluate(f"{nameless}.map((e) => e.id)") == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    background = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]
