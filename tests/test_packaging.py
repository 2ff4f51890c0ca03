"""The wheel: what is in it, and that it runs, installed alone, outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"minidsv": "minidsv", "kernels": "minidsv/kernels", "server": "minidsv/server"}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run outside of every virtual environment's influence; fail with the command's own words."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no old build/ folder leaks into it and none is left behind."""
    work = tmp_path_factory.mktemp("wheel")
    unwanted = ("build", "dist", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*unwanted))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", work, work / "source", cwd=work)
    (found,) = work.glob("minidsv-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: the wheel is installed in it, its dependencies are those
    of this one (a path in a .pth file does not make that folder's own .pth files, such as those of
    an editable install, count).
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel]
    run(*install, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert len(want) > 30
    assert want <= names


def test_data_files_are_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {file.name for file in (ROOT / "configs").glob("*.json")}
    tiny = {file.name for file in (ROOT / "configs" / "tiny").iterdir() if file.suffix != ".pyc"}
    assert {"deepseek_v32.json", "glm5.json", "glm52.json"} <= configs
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= tiny
    assert {f"minidsv/configs/{name}" for name in configs} <= names
    assert {f"minidsv/configs/tiny/{name}" for name in tiny - {"__pycache__"}} <= names
    static = {file.name for file in (ROOT / "server" / "static").iterdir()}
    assert {"index.html", "page.js"} <= static
    assert {f"minidsv/server/static/{name}" for name in static} <= names
    assert "minidsv/py.typed" in names


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"minidsv"}
    assert not [name for name in names if "/test" in name or "/scripts" in name]


def test_the_installed_package_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import minidsv, minidsv.kernels.topk, minidsv.server.app; print(minidsv.__file__)"
    path = run(installed / "python", "-c", code, cwd=tmp_path).stdout
    assert Path(path).is_relative_to(installed.parent)


def test_help(installed: Path, tmp_path: Path) -> None:
    assert "generate" in run(installed / "minidsv", "--help", cwd=tmp_path).stdout


def test_inspect(installed: Path, tmp_path: Path) -> None:
    """A config.json that came with the package."""
    code = "from importlib.resources import files; print(files('minidsv.configs'))"
    configs = Path(run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip())
    assert configs.is_relative_to(installed.parent)
    card = run(installed / "minidsv", "inspect", configs / "deepseek_v32.json", cwd=tmp_path)
    assert "671" in card.stdout


def test_generate(installed: Path, tmp_path: Path) -> None:
    options = ["--max-tokens", "3", "--ignore-eos", "--load-format", "random", "--device", "cpu"]
    done = run(installed / "minidsv", "generate", "hello", *options, cwd=tmp_path)
    assert done.stdout.strip()
    assert "3 generated" in done.stderr
    assert not list(tmp_path.iterdir())
