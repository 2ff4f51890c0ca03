"""Kernels in Triton's interpreter, and the package on a machine without Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = [
    "test_gemm_triton.py",
    "test_model_triton.py",
    "test_router_triton.py",
    "test_moe_triton.py",
    "test_fp8_triton.py",
    "test_small_triton.py",
    "test_prep_triton.py",
    "test_attention_prep_triton.py",
    "test_set_mla_kv_buffer_triton.py",
    "test_sparse_mla_triton.py",
    "test_indexer_logits_triton.py",
    "test_topk_triton.py",
]


def test_kernels_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    """A process of its own: the flag is read when a kernel is decorated."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) >= 90, summary
    with capsys.disabled():
        print(f" [interpreter: {summary.strip()}]", end="")


def test_the_engine_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, minidsv.llm, minidsv.model\n"
        "from minidsv.kernels.set_mla_kv_buffer import set_mla_kv_buffer\n"
        "buffer = torch.zeros(4, 3)\n"
        "loc = torch.tensor([2])\n"
        "set_mla_kv_buffer(buffer, loc, torch.ones(1, 2), torch.ones(1, 1), pdl='on')\n"
        "assert buffer.sum(1).tolist() == [0, 0, 3, 0]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
