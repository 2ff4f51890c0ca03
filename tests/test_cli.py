"""The command line: start-up, generate, inspect, one line for each bad input, lazy imports."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minidsv import LLM, SamplingParams, __version__
from minidsv.cli import main
from minidsv.engine_config import bundled_model
from minidsv.errors import ConfigError

ROOT = Path(__file__).parents[1]
TINY = ["--load-format", "random", "--device", "cpu", "--num-pages", "16"]
HEAVY = ("torch", "transformers", "triton")
Done = subprocess.CompletedProcess[str]


def run_python(code: str, *arguments: str, cwd: Path | None = None, **env: str) -> Done:
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


def run(*arguments: str, **env: str) -> Done:
    """`minidsv ARGUMENTS` in a process of its own."""
    return run_python("from minidsv.cli import main; main()", *arguments, **env)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`minidsv ARGUMENTS` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["minidsv", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_help_is_quick_and_names_the_commands() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [Path(sys.executable).with_name("minidsv"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert all(name in done.stdout for name in ("generate", "serve", "inspect", "bench"))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["generate", "--help"], id="generate-help"),
        pytest.param(["bench", "--help"], id="bench-help"),
        pytest.param(["version"], id="version"),
        pytest.param(["generate", "a", "--max-tokens", "0"], id="refusal"),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = f"""
import minidsv, sys
from minidsv.cli import main
minidsv.SamplingParams()
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code, *arguments).stdout.endswith(
        "\n[]\n" if "a" not in arguments else "[]\n"
    )


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("source", ["argument", "stdin"])
def test_generate(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Größe:\nwhat is"
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    prompt = "-" if source == "stdin" else text
    assert run_main(monkeypatch, "generate", prompt, "--max-tokens", "9", *TINY) == 0
    params = SamplingParams(max_tokens=9)
    want = LLM(load_format="random", device="cpu", num_pages=16).generate(text, params)[0]
    out, err = capsys.readouterr()
    assert out == want.outputs[0].text + "\n"
    assert f"{len(want.prompt_token_ids)} prompt tokens, 9 generated (length)" in err
    assert "tokens/s" in err


def test_generate_streams() -> None:
    """The first token can be read long before the last is made."""
    command = [sys.executable, "-c", "from minidsv.cli import main; main()", "generate", "hello"]
    with subprocess.Popen(
        [*command, "--ignore-eos", "--max-tokens", "1000", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.stdout.close()  # the reader goes away: a quiet end
        assert process.stderr.read().count(b"\n") == 1  # what was loaded
    assert process.returncode == 1


def test_generate_to_a_terminal_without_unicode() -> None:
    done = run("generate", "a", "--max-tokens", "40", *TINY, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


@pytest.mark.parametrize("what", ["folder", "config.json"])
def test_inspect(
    what: str,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoints["dsv32"]
    path = folder if what == "folder" else folder / what
    monkeypatch.setenv("COLUMNS", "160")
    assert run_main(monkeypatch, "inspect", str(path), "--batch", "4", "--gpu", "H200") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("deepseek_v32", "parameters", "Cache bytes a token", "fp8_flat", "routed experts"):
        assert part in out
    assert "batch 4" in out
    assert "H200" in out
    assert ("tensors are there" in out) == (what == "folder")


@pytest.mark.parametrize(
    ("arguments", "enabled"),
    [([], True), (["--no-enable-prefix-caching"], False), (["--enable-prefix-caching"], True)],
)
def test_a_switch(arguments: list[str], enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def llm(**options: object) -> None:
        seen.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr("minidsv.llm.LLM", llm)
    assert run_main(monkeypatch, "generate", "a", *arguments) == 2
    assert seen[0]["enable_prefix_caching"] is enabled


# arguments, and what the line must name
BAD = [
    pytest.param(["generate", "a", "--model", "/nowhere"], "/nowhere", id="model"),
    pytest.param(["generate", "a", "--colour", "red"], "--colour", id="option"),
    pytest.param(["sing"], "sing", id="command"),
    pytest.param(["generate"], "prompt", id="no-prompt"),
    pytest.param(["generate", "a", "--dtype", "int3"], "int3", id="choice"),
    pytest.param(["generate", "a", "--max-tokens", "many"], "--max-tokens", id="not-a-number"),
    pytest.param(["generate", "a", "--max-tokens", "0"], "--max-tokens", id="out-of-range"),
    pytest.param(["generate", "a", "--temperature", "nan"], "temperature", id="nan"),
    pytest.param(["generate", "a", "--num-pages", "0"], "num_pages", id="no-pages"),
    pytest.param(["generate", "a", "--device", "abacus"], "abacus", id="device"),
    pytest.param(["generate", "a", "--stop", ""], "stop", id="empty-stop"),
    pytest.param(["generate", "word " * 20480, *TINY], "max_model_len", id="prompt-too-long"),
    pytest.param(["generate", "word " * 2000, *TINY], "16", id="prompt-too-long-for-the-cache"),
    pytest.param(
        ["generate", "a", "--max-tokens", "100000", *TINY], "100000", id="output-too-long"
    ),
    pytest.param(["generate", "a\udcff", *TINY], "Unicode", id="not-unicode"),
    pytest.param(["inspect", "/nowhere"], "/nowhere", id="inspect-path"),
    pytest.param(["inspect", __file__], "test_cli.py", id="inspect-no-json"),
    pytest.param(["inspect", str(bundled_model()), "--batch", "0"], "--batch", id="batch"),
    pytest.param(["inspect", str(bundled_model()), "--gpu", "abacus"], "abacus", id="gpu"),
    pytest.param(["serve", "--port", "70000"], "port: 70000", id="port"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_input_is_one_line(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    *loaded, error = err.splitlines()
    assert out == ""
    assert len(loaded) <= 1  # the line that says what was loaded
    assert error.startswith("error: ")
    assert named in error


def test_bad_standard_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert run_main(monkeypatch, "generate", "-", *TINY) == 2
    assert "\nerror: prompt: standard input is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        pytest.param("config.json", b"{", "config.json", id="config-cut"),
        pytest.param("config.json", b'{"model_type": "gpt2"}', "gpt2", id="other-model"),
        pytest.param("model.safetensors", b"\x99" * 9, "model.safetensors", id="weights-cut"),
        pytest.param("model.safetensors.index.json", b"[]", "index.json", id="index"),
        pytest.param("note.txt", b"", "model.safetensors", id="no-weights"),
    ],
)
def test_broken_checkpoint_is_one_line(
    name: str,
    content: bytes,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((bundled_model() / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    for command in (["generate", "a", "--model", str(tmp_path)], ["inspect", str(tmp_path)]):
        assert run_main(monkeypatch, *command) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert named in err


def test_a_process_ends_with_one_line() -> None:
    done = run("generate", "a", "--model", "/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


WITHOUT_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("no triton here", name=name)

sys.meta_path.insert(0, Blocker())
import minidsv
llm = minidsv.LLM(load_format="random", device="cpu", num_pages=4)
print(llm.generate("hello", minidsv.SamplingParams(max_tokens=3))[0].outputs[0].token_ids)
print([name for name in sys.modules if name.startswith("triton")])
"""


def test_generation_without_triton() -> None:
    done = run_python(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    ids, modules = done.stdout.splitlines()
    assert len(json.loads(ids)) == 3
    assert modules == "[]"


def test_the_folder_named_kernels_does_not_break_transformers() -> None:
    """transformers imports any module `kernels` that it finds: from the root, ours."""
    done = run_python("from transformers import DeepseekV3ForCausalLM as m; print(m)", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "deepseek_v3" in done.stdout
