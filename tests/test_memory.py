"""The memory plan, in numbers worked out by hand, and its workspace against what operators take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_launch_rows import META, meta_step, meta_weights

from minidsv.batch import StepBatch
from minidsv.checkpoint import fill
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, bundled_model
from minidsv.errors import ConfigError
from minidsv.kernels import pdl
from minidsv.kernels.launch import KernelSpec
from minidsv.kv_cache import KVCache
from minidsv.layers import Operators
from minidsv.logprobs import _row_logprobs
from minidsv.memory import MARGIN, MemoryPlan, plan_memory
from minidsv.model import DeepseekV32
from minidsv.random_weights import random_tensors
from minidsv.request import Request, SamplingParams
from minidsv.sampler import Sampler
from minidsv.workspace import SAFETY, SAMPLER_BYTES, SMALL, forward_bytes, workspace_bytes
from peak_memory import PeakMemory

CONFIGS = bundled_model().parent
CPU = torch.device("cpu")
WORKSPACE = 4_416_497_254  # of 8192 tokens of DeepSeek-V3.2
GRAPHS = (1, 2, 4, 8, 16, 24, 32, 48, 64) * 2
GPU = EngineConfig(
    device="cuda:0",
    dtype="bfloat16",
    backend="triton",
    kv_cache_dtype="fp8",
    index_cache_dtype="fp8",
    max_model_len=65_792,
)
HOST = EngineConfig(
    device="cpu",
    dtype="float32",
    backend="torch",
    kv_cache_dtype="float32",
    index_cache_dtype="float32",
    max_model_len=20_480,
)


def model_config(name: str) -> ModelConfig:
    return ModelConfig.from_path(CONFIGS / name)


def plan_slice(free: float = 28.6e9, **options: Any) -> MemoryPlan:
    """The full-size slice on 80 GB: 50.5 GB of weights leave 28.6 of 79.1 GB that are free."""
    config = replace(GPU, **options)
    return plan_memory(
        model_config("v32_slice.json"),
        config,
        weight_bytes=50_500_000_000,
        free_bytes=int(free),
        total_bytes=85_000_000_000,
        graph_sizes=GRAPHS if config.cuda_graph == "on" else (),
    )


def test_the_slice_on_80_gb() -> None:
    """64 requests of 65,792 tokens. A step of 8192 is fullest where the latents of 128 heads, 512
    numbers each, have come out of the attention and not gone in: 2.1 of 4.1 GB."""
    plan = plan_slice(cuda_graph="on")
    assert plan.page_bytes == 64 * 5 * (656 + 132) == 252_160
    assert plan.num_pages == 64 * 1028
    assert plan.cache_bytes == 65_793 * 252_160
    hidden, slots, latents = 8192 * 7168 * 2, 8192 * 2048 * 8, 8192 * 128 * 512 * 2
    rows = 8192 * 2 * (1536 + 576 + 128 + 128 * 192 + 64 * 128 + 128 * (64 + 128)) + 8192 * 4 * 64
    most = 5 * hidden + 2 * slots + 2 * latents + rows
    assert plan.workspace_bytes == int(1.1 * (most + SMALL)) == WORKSPACE
    kept = 2 * 199 * 129_280 * 4  # each graph's logits
    nodes = 18 * 27 * 6 * 32_768
    assert (
        plan.graph_bytes
        == forward_bytes(model_config("v32_slice.json"), GPU, 64, 64) + kept + nodes
    )
    assert plan.describe() == (
        "weights 50.5 GB, caches 16.6 GB (65792 pages of 64 tokens), workspace 4.4 GB, "
        f"graphs {plan.graph_bytes / 1e6:.1f} MB of 79.1 GB free"
    )


def test_logits_are_fullest_with_prompt_logprobs_of_a_large_vocabulary() -> None:
    """Of 1024 prompt positions and the 64 that choose a token; or the sampler, behind them."""
    large = replace(model_config("v32_slice.json"), vocab_size=1_000_000)
    hidden, slots, vocab = 8192 * 7168 * 2, 8192 * 2048 * 8, 4 * 1_000_000
    logits = (1024 + 64) * (vocab + 4 * 7168 * 2)
    forward = int(SAFETY * (6 * hidden + slots + logits + SMALL))
    assert forward_bytes(large, GPU, 8192, 1088) == forward
    sampling = int(SAFETY * (1088 * vocab + SAMPLER_BYTES * 64 * 1_000_000))
    assert workspace_bytes(large, GPU) == sampling > forward


def test_less_memory_means_fewer_pages() -> None:
    """free - workspace - 3 % of the device, in whole pages, less the dummy one."""
    whole = plan_slice(max_model_len=163_840)
    left = 28_600_000_000 - WORKSPACE - int(MARGIN * 85_000_000_000)
    assert (whole.num_pages, whole.graph_bytes) == (left // 252_160 - 1, 0)
    graphs = plan_slice(max_model_len=163_840, cuda_graph="on")
    assert graphs.num_pages == (left - graphs.graph_bytes) // 252_160 - 1
    assert whole.num_pages * 64 > 65_792 * 8
    assert plan_slice(max_num_batched_tokens=2048).workspace_bytes < whole.workspace_bytes / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"free": 6e9},
            ["num_pages: 1 page of 252160 bytes", "in the 0.0 MB left", "weights 50.5"],
        ),
        ({"free": 3e9, "cuda_graph": "on"}, ["workspace 4.4 GB", "of 53.5 GB free"]),
        ({"num_pages": 100_000}, ["num_pages: 100000 pages", "max_num_batched_tokens", "24.2 GB"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_slice(**options)
    for word in words:
        assert word in str(error.value)


def test_the_bundled_model_on_a_host() -> None:
    """A quarter of what is available, and no more than every request can use."""
    model, sizes = model_config("tiny"), {"weight_bytes": 10, "total_bytes": 0}
    page = 64 * 5 * 4 * (128 + 64 + 128)
    few = plan_memory(model, HOST, free_bytes=10**9, **sizes)
    assert (few.page_bytes, few.num_pages) == (page, 250_000_000 // page - 1)
    most = plan_memory(model, HOST, free_bytes=10**12, **sizes)
    assert most.num_pages == 64 * 20_480 // 64
    given = plan_memory(model, replace(HOST, num_pages=7), free_bytes=10**7, **sizes)
    assert given.num_pages == 7
    with pytest.raises(ConfigError, match=r"num_pages: 1000000000000 pages of 409600 bytes"):
        plan_memory(model, replace(HOST, num_pages=10**12), free_bytes=10**12, **sizes)


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's wrappers allocate for tensors without data and start nothing."""
    monkeypatch.setattr(KernelSpec, "launch", lambda *args, **named: None)
    monkeypatch.setattr(pdl, "is_interpreted", lambda: True)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(
    "name", ["v32_slice", "glm52_slice", "v32_tp8_shard", "mini", "tiny/config"]
)
def test_the_triton_path_stays_within_the_workspace(name: str) -> None:
    model = model_config(f"{name}.json")
    layers = min(5, model.num_hidden_layers)
    model = replace(model, num_hidden_layers=layers, indexer_types=model.indexer_types[:layers])
    weights = meta_weights(model, fp8=True)
    for kv, activations in (("bfloat16", "none"), ("fp8", "fp8"), ("fp8_flat", "none")):
        cache = KVCache.allocate(model, 2, kv, "fp8", META)
        operators = Operators("off", activations=activations)
        forward = DeepseekV32(model, weights, cache, operators).forward
        for tokens, requests, length, rows in (
            (8192, 1, 65_792, 1088), (8192, 1, 65_792, 8192), (8192, 2, 2000, 2),
            (64, 64, 163_840, 64), (1, 1, 163_840, 1),
        ):  # fmt: skip
            options = {"kv_cache_dtype": kv, "activations": activations}
            config = replace(GPU, max_model_len=length, **options)
            with PeakMemory() as memory:
                forward(meta_step(tokens, requests, length, rows))
            bound = forward_bytes(model, config, tokens, rows)
            assert memory.peak <= bound / SAFETY
            assert bound <= 1.5 * memory.peak + 2 * SMALL


def cpu_step(tokens: int, length: int) -> StepBatch:
    """The last tokens of one request, whose ten pages come again and again."""
    offsets = torch.arange(tokens)
    positions = offsets + length - tokens
    return StepBatch(
        input_ids=offsets % 50,
        positions=positions,
        slot_mapping=positions % 640,
        seq_lens=positions + 1,
        request_index=torch.zeros(tokens, dtype=torch.int64),
        block_table=(torch.arange(-(-length // 64)) % 10).unsqueeze(0),
        logits_index=offsets,
        max_seq_len=length,
    )


def small_model(heads: int) -> ModelConfig:
    changes = {
        "vocab_size": 4000, "hidden_size": 512, "num_hidden_layers": 2, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 256, "intermediate_size": 1024,
        "q_lora_rank": 256, "index_topk": 64, "indexer_types": ("full", "full"),
    }  # fmt: skip
    return replace(model_config("mini.json"), num_attention_heads=heads, **changes)


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize(("dtype", "kv"), [("float32", "float32"), ("bfloat16", "fp8_flat")])
def test_the_reference_path_stays_within_the_workspace(heads: int, dtype: str, kv: str) -> None:
    model = small_model(heads)
    pieces = random_tensors(model, seed=0, fp8=True, device=CPU)
    weights = fill(pieces, device=CPU, dtype=getattr(torch, dtype), quantization="auto")
    cache = KVCache.allocate(model, 10, kv, "fp8", CPU)
    forward = DeepseekV32(model, weights, cache, Operators(activations="fp8")).forward
    for tokens, length in ((256, 300), (255, 300), (8, 4000), (64, 64)):
        config = replace(
            HOST, dtype=dtype, kv_cache_dtype=kv, max_model_len=length, activations="fp8"
        )
        with PeakMemory() as memory:
            forward(cpu_step(tokens, length))
        bound = forward_bytes(model, config, tokens, tokens)
        assert memory.peak <= bound
        assert bound <= 2 * memory.peak + 4 * SMALL


def test_choosing_tokens_stays_within_its_bytes() -> None:
    """Every kind of edit, penalty and filter at once, and the log-probabilities of all tokens."""
    rows, vocab = 16, 5000
    params = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=50, min_p=0.1, presence_penalty=1.0,
        repetition_penalty=1.2, logit_bias={3: 1.0}, min_tokens=4,
    )  # fmt: skip
    requests = [Request("r", [4, 9], params, 1, 16) for _ in range(rows)]
    logits = torch.randn(rows, vocab)
    with PeakMemory() as memory:
        Sampler(vocab, [1], CPU)(logits, requests)
        wanted = [(row, -1) for row in range(rows)]
        _row_logprobs(logits, wanted, torch.zeros(rows, dtype=torch.int64), [()] * rows)
    assert SAMPLER_BYTES / 2 < memory.peak / (rows * vocab) < SAMPLER_BYTES
    model = replace(model_config("tiny"), vocab_size=10**6)
    config = replace(HOST, max_num_batched_tokens=64)
    assert workspace_bytes(model, config) == int(SAFETY * (4 + SAMPLER_BYTES) * 64 * 10**6)
