"""The full-size slice on one device: its random weights, and the first long prompt."""

import time

import pytest
import torch

from builders import prompt
from minidsv import LLM, SamplingParams
from minidsv.checkpoint import fill
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.random_weights import SLAB, random_tensors
from minidsv.roofline import spec_bytes
from minidsv.tensor_table import tensor_table
from minidsv.workspace import workspace_bytes

pytestmark = pytest.mark.gpu
SLICE = bundled_model().parent / "v32_slice.json"
CUDA = torch.device("cuda")
LENGTH = 65_792


@pytest.fixture(autouse=True)
def large_device() -> None:
    if torch.cuda.mem_get_info()[1] < 75e9:
        pytest.skip("needs a device of 80 GB")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def test_random_weights_take_seconds_and_their_own_memory() -> None:
    """Beside 50 GB only what rounding a slab takes, which is given back."""
    model = ModelConfig.from_path(SLICE)
    held = sum(spec_bytes(spec, spec.stays_fp8) for spec in tensor_table(model).values())
    begun, before = time.monotonic(), torch.cuda.memory_allocated()
    pieces = random_tensors(model, seed=0, fp8=True, device=CUDA)
    weights = fill(pieces, device=CUDA, dtype=torch.bfloat16, quantization="auto")
    torch.cuda.synchronize()
    assert time.monotonic() - begun < 60
    assert sum(weight.nbytes for weight in weights.values()) == held > 50e9
    assert torch.cuda.max_memory_allocated() - before < held + 4 * SLAB * 8
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 4 * SLAB * 8


def test_a_first_prompt_of_64k_stays_within_the_workspace() -> None:
    """In chunks of 8192 tokens, then decoded: nothing was run before."""
    llm = LLM(
        str(SLICE),
        device="cuda",
        load_format="random",
        backend="triton",
        kv_cache_dtype="fp8",
        max_model_len=LENGTH,
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    (output,) = llm.generate([prompt(65_536, vocab=129_280)], params)
    assert len(output.outputs[0].token_ids) == 4
    engine = llm.engine
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < workspace_bytes(engine.model_config, engine.config)
    llm.close()
