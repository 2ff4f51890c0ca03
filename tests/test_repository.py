"""What the documents claim about the tree, and the size that files and functions may have."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("minidsv", "kernels", "server", "scripts")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"`((?:\.ci|minidsv|kernels|configs|server|tests|scripts|docs)/[\w./-]*)`")
COMMANDS_OF_OTHERS = re.compile(
    r"^(?:lm_eval|guidellm|env -u \w+ aiperf|\$?RUN)\b(?:.*\\\n)*.*", re.MULTILINE
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_paths_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    missing = {
        n
        for n in [*NAMED.findall(text), *links]
        if not (ROOT / n).exists() and not (document.parent / n).exists()
    }
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_options_exist(document: Path) -> None:
    """Every --option that a document shows is one of our commands', or stands in another's line."""
    known = "".join(p.read_text() for p in SOURCES).replace("_", "-")
    foreign = {"--version"}
    ours = COMMANDS_OF_OTHERS.sub("", document.read_text())
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) - foreign
    missing = {o for o in options if o.removeprefix("--") not in known}
    assert not missing


def test_sizes() -> None:
    """A file holds at most 350 lines, a function 60, a kernel file's function 90."""
    too_long = []
    static = [path for path in (ROOT / "server" / "static").iterdir() if path.suffix != ".svg"]
    for path in SOURCES + static:
        text = path.read_text()
        if text.count("\n") > 350:
            too_long.append(f"{path}: {text.count(chr(10))} lines")
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > (90 if path.parent.name == "kernels" else 60):
                    too_long.append(f"{path}:{node.name}: {length} lines")
    assert not too_long


def test_arrows_point_one_way() -> None:
    """Kernels know no engine, the engine no server, policy no torch."""
    for path in SOURCES:
        imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        ours = [name for name in imports if name.startswith("minidsv")]
        if path.parent.name == "kernels":
            assert all(name.startswith("minidsv.kernels") for name in ours), path
        elif path.parent.name == "minidsv" and path.name != "cli.py":
            assert not any(name.startswith("minidsv.server") for name in ours), path
        if path.name in ("scheduler.py", "block_manager.py", "request.py"):
            assert "torch" not in imports, path
        assert "kernels" not in imports, path
