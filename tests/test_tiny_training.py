"""The trainer's forward and checkpoint format against the engine, on the bundled model."""

from pathlib import Path

import pytest
import torch

from compare import relative_l2
from minidsv import LLM
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.parametrize("length", [40, 65, 200])
def test_training_forward_equals_the_engine(length: int) -> None:
    from tiny_checkpoint import load_checkpoint
    from tiny_sparse import Selected

    folder = bundled_model()
    model = load_checkpoint(ModelConfig.from_path(folder), folder / "model.safetensors").eval()
    ids = torch.randint(3, 1280, (length,), generator=torch.Generator().manual_seed(length))
    llm = LLM(quantization="none")
    want = llm.prompt_logits(ids.tolist())
    llm.close()
    with torch.no_grad():
        got = model.lm_head(model(ids[None], Selected("top")).hidden)
    assert relative_l2(got, want) < 5e-6


def test_a_saved_checkpoint_is_the_bundled_one(tmp_path: Path) -> None:
    from tiny_checkpoint import load_checkpoint, read_dequantized, save_checkpoint

    source = bundled_model() / "model.safetensors"
    model = load_checkpoint(ModelConfig.from_path(source.parent), source)
    save_checkpoint(model, tmp_path / "again")
    before, after = read_dequantized(source), read_dequantized(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
