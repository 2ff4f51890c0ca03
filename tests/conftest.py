"""Fixtures: one small checkpoint a family, written by transformers once a session."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

from builders import hf_model, save, use_rms_norm_eps_for_latents  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--load", type=int, default=1, help="times CI's load in test_server_ops_load")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices"))


@pytest.fixture(scope="session", autouse=True)
def cpu_by_default() -> Iterator[None]:
    """`device="auto"` means the CPU on every machine; `gpu` tests name their device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def visible_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo `cpu_by_default` for `gpu` tests: Triton picks its driver by `is_available`. Their
    references sum in fp32 throughout."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        matmul = torch.backends.cuda.matmul
        monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", False)


@pytest.fixture(scope="session")
def hf_models() -> dict[str, Any]:
    """transformers' models by family; GLM's latent norms use rms_norm_eps, as ours do."""
    models = {family: hf_model(family) for family in ("dsv32", "glm")}
    use_rms_norm_eps_for_latents(models["glm"])
    return models


@pytest.fixture(scope="session")
def checkpoints(
    hf_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoint folders of `hf_models`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save(model, root / family) for family, model in hf_models.items()}


@pytest.fixture(scope="session", params=["dsv32", "glm"])
def rig(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Any:
    """A bench's weights, cache and requests: batch 3, context 60."""
    from rigs import build

    return build(checkpoints[request.param])
