"""What Triton needs: its compiler, which only Linux has, and PyTorch's word that there is a GPU."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore = [] if find_spec("triton") else ["test_check.py"]


@pytest.fixture(autouse=True)
def visible_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo `cpu_by_default` for `gpu` tests: Triton picks its driver by `is_available`."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
