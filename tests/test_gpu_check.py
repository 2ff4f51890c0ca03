"""scripts/gpu_check.sh, with commands that only say what they were given."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"
STUB = """#!/usr/bin/env bash
given="$*"
echo "$(basename "$0") ${given//$'\\n'/ }" >> "$CALLS"
case "$given" in *"$BROKEN"*) echo "FAILED it"; exit 1;; esac
echo done
"""


def check(tmp_path: Path, *sections: str, broken: str = "nothing") -> tuple[int, str, list[str]]:
    """(status, output, the commands that were started)."""
    for name in ("python3", "minidsv"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    env |= {"BROKEN": broken, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", SCRIPT, *sections], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def test_the_tests_run_side_by_side_and_a_failure_is_told(tmp_path: Path) -> None:
    status, output, calls = check(tmp_path, broken="test_moe_triton.py")
    assert status == 1
    assert "== test_moe_triton: status 1: FAILED it" in output
    assert output.count("status 0: done") == len(calls) - 2 - 1  # install, versions
    for file in ("test_ran.py", "test_gpu.py", "test_engine_triton.py::test_logits"):
        assert sum(call.endswith(file) for call in calls) == 1
    marker = "mark." + "gpu"
    marked = [
        p.name for p in SCRIPT.parents[1].glob("tests/**/test_*.py") if marker in p.read_text()
    ]
    assert {name for name in marked if not any(f"/{name}" in call for call in calls)} == set()
    assert (tmp_path / "out" / "test_ran.log").read_text() == "done\n"


@pytest.mark.parametrize("section", ["graph", "slice", "shard", "mini", "glm", "wall", "profile"])
def test_a_measurement(section: str, tmp_path: Path) -> None:
    status, _, calls = check(tmp_path, section)
    assert status == 0
    for call in calls[2:]:
        assert call.startswith("minidsv bench --model configs/")
        assert "--load-format random" in call
        assert f"--json {tmp_path}/out/{section}" in call
    assert calls[2:]


def test_an_unknown_section(tmp_path: Path) -> None:
    status, output, calls = check(tmp_path, "tests")
    assert (status, len(calls)) == (2, 2)
    assert "tests: no section; there are kernels engine" in output
