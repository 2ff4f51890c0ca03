"""`resolve`: what every "auto" becomes on a device, and what is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
from test_config import V32, changed

from minidsv import backend
from minidsv.backend import activations_of, pdl_mode
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.resolve import resolve, settle

NO_FP8 = {"quantization": "none"}
FP8 = {"activations": "fp8"}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that a backend finds; a test may remove some."""
    found = {"triton", "flashinfer"}
    monkeypatch.setattr(backend, "find_spec", lambda name: name in found or None)
    return found


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "float16"),
        ("kv_cache_dtype", "int8"),
        ("max_num_seqs", 0),
        ("max_num_seqs", 2.5),
        ("num_pages", 0),
        ("max_model_len", True),
        ("seed", -1),
        ("device", "tpu"),
        ("device", "cuda:99"),
        ("device", None),
        ("model", 5),
        ("seed", 2**64),
        ("pdl", "on"),
        ("cuda_graph", "on"),
        ("backend", "flashinfer"),
        ("max_model_len", 10**7),
    ],
)
def test_engine_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        resolve(EngineConfig(**{option: value}), ModelConfig.from_hf(V32))


def test_auto_on_cpu_is_float32() -> None:
    config = resolve(EngineConfig(device="cpu"), ModelConfig.from_hf(V32))
    assert (config.dtype, config.kv_cache_dtype, config.index_cache_dtype) == ("float32",) * 3
    assert config.max_model_len == 163_840
    assert "auto" not in (config.pdl, config.cuda_graph, config.backend)


TRITON = {"backend": "triton"}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("qk_rope_head_dim", 16, "qk_rope_head_dim of 32 or 64, and it is 16"),
        ("index_head_dim", 64, "index_head_dim of 128, and it is 64"),
        ("index_n_heads", 48, "index_n_heads of 8 or 16 or 32 or 64, and it is 48"),
        ("kv_lora_rank", 384, "kv_lora_rank of 128 or 256 or 512, and it is 384"),
        ("hidden_size", 7172, "hidden_size that 8 divides, and it is 7172"),
        ("moe_intermediate_size", 100, "moe_intermediate_size that 8 divides, and it is 100"),
        ("vocab_size", 600_000, "vocab_size up to 524288, and it is 600000"),
        ("index_topk", 6000, "index_topk up to 4096, and it is 6000"),
        ("max_position_embeddings", 2_000_000, "max_model_len up to 1048576, and it is 2000000"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(
    name: str, value: int, wanted: str, packages: set[str]
) -> None:
    model = changed(V32, **{name: value})
    config = EngineConfig(device="cuda:0", quantization="none", kv_cache_dtype="bfloat16")
    assert settle(config, model, (9, 0)).backend == "torch"
    with pytest.raises(ConfigError, match=f"^backend: 'triton' needs {wanted}; accepted here: "):
        settle(replace(config, backend="triton"), model, (9, 0))


def test_a_long_selection_matters_where_something_is_scored() -> None:
    model = changed(V32, index_topk=6000)
    for length, expected in ((8192, "triton"), (8193, "torch")):
        config = EngineConfig(device="cuda:0", max_model_len=length)
        assert settle(config, model, (9, 0)).backend == expected
    model = changed(V32, index_topk=10_000)
    assert settle(replace(config, max_model_len=10_000), model, (9, 0)).backend == "triton"


@pytest.mark.parametrize(
    ("capability", "options", "expected"),
    [
        (None, {"device": "cpu"}, ("float32", "float32", "float32", "torch", "off")),
        (None, {"device": "cpu", "index_cache_dtype": "fp8", "kv_cache_dtype": "fp8"},
         ("float32", "fp8", "fp8", "torch", "off")),
        (None, {}, ("bfloat16", "bfloat16", "bfloat16", "torch", "off")),  # ROCm
        ((7, 5), NO_FP8, ("bfloat16", "bfloat16", "bfloat16", "torch", "off")),
        ((9, 0), {}, ("bfloat16", "bfloat16", "fp8", "triton", "on")),
        ((9, 0), {"max_num_batched_tokens": 65536},
         ("bfloat16", "bfloat16", "fp8", "torch", "off")),
        ((8, 0), NO_FP8, ("bfloat16", "bfloat16", "bfloat16", "triton", "off")),
        ((8, 0), {**NO_FP8, **TRITON}, ("bfloat16", "bfloat16", "bfloat16", "triton", "off")),
        ((9, 0), TRITON, ("bfloat16", "bfloat16", "fp8", "triton", "on")),
        ((9, 0), {**TRITON, "pdl": "on"}, ("bfloat16", "bfloat16", "fp8", "triton", "on")),
        ((9, 0), {**TRITON, "pdl": "off"}, ("bfloat16", "bfloat16", "fp8", "triton", "off")),
        ((9, 0), {"backend": "torch"}, ("bfloat16", "bfloat16", "fp8", "torch", "off")),
        ((9, 0), {"dtype": "float32"}, ("float32", "bfloat16", "fp8", "torch", "off")),
        ((9, 0), {"backend": "flashinfer", "kv_cache_dtype": "fp8_flat"},
         ("bfloat16", "fp8_flat", "fp8", "flashinfer", "on")),
    ],
)  # fmt: skip
def test_what_auto_becomes(
    capability: tuple[int, int] | None,
    options: dict[str, str],
    expected: tuple[str, ...],
    packages: set[str],
) -> None:
    config = EngineConfig(**{"device": "cuda:0", **options})
    got = settle(config, ModelConfig.from_hf(V32), capability)
    assert (
        got.dtype, got.kv_cache_dtype, got.index_cache_dtype, got.backend, got.pdl
    ) == expected  # fmt: skip
    mode = {"on": "prefetch", "off": "off"}[got.pdl]
    assert pdl_mode(got) == (None if got.backend == "torch" else mode)
    assert got.cuda_graph == ("off" if got.backend == "torch" else "on")
    off = settle(replace(config, cuda_graph="off"), ModelConfig.from_hf(V32), capability)
    assert off == replace(got, cuda_graph="off")


@pytest.mark.parametrize(
    ("capability", "options", "message"),
    [
        ((8, 0), {}, "quantization: 'auto' keeps FP8 .* 8.9, and cuda:0 has 8.0; .* 'none'"),
        ((8, 6), {"quantization": "fp8"}, "quantization: 'fp8' keeps FP8 .* cuda:0 has 8.6"),
        ((8, 0), {**NO_FP8, "kv_cache_dtype": "fp8"}, "kv_cache_dtype: 'fp8' needs .* has 8.0"),
        ((8, 0), {**NO_FP8, "kv_cache_dtype": "fp8_flat"}, "kv_cache_dtype: 'fp8_flat' .*'bfloat"),
        ((8, 0), {**NO_FP8, "index_cache_dtype": "fp8"}, "index_cache_dtype: 'fp8' .*'bfloat16'"),
        ((8, 0), {**NO_FP8, **TRITON, "pdl": "on"}, "pdl: 'on' needs capability 9.0, .* has 8.0"),
        ((8, 9), TRITON, "backend: 'triton' needs .* 8.0, 9.0 or 10.0, and cuda:0 has 8.9"),
        ((9, 0), {**TRITON, "max_num_batched_tokens": 65536}, "backend: .* up to 65535"),
        ((9, 0), {"pdl": "on", "backend": "torch"}, "pdl: 'on' needs .* backend is 'torch'"),
        ((9, 0), {"pdl": "on", "dtype": "float32"}, "pdl: 'on' needs .* backend is 'torch'"),
        (None, {"device": "cpu", "pdl": "on"}, "pdl: 'on' needs .* backend is 'torch'"),
        (None, {"device": "cpu", "backend": "triton"}, "backend: 'triton' .* cpu has none"),
        ((7, 5), {**NO_FP8, "backend": "triton"}, "backend: 'triton' needs .* 8.0, .* has 7.5"),
        ((9, 0), {"backend": "triton", "dtype": "float32"}, "backend: .* it is 'float32'"),
        ((9, 0), {"backend": "triton", "kv_cache_dtype": "float32"}, "backend: .* kv_cache_dtype"),
        ((9, 0), {"backend": "flashinfer"}, "backend: 'flashinfer' .* 'fp8_flat', .* 'bfloat16'"),
        ((9, 0), {"cuda_graph": "on", "backend": "torch"}, "cuda_graph: 'on' .* is 'torch'"),
        (None, {"device": "cpu", "cuda_graph": "on"}, "cuda_graph: 'on' .* is 'torch'"),
        ((9, 0), {**FP8, **NO_FP8}, "activations: 'fp8' needs FP8 weights, .* 'none'"),
        ((8, 0), {**FP8, **NO_FP8}, "activations: 'fp8' needs FP8 weights"),
        ((9, 0), {**FP8, "max_num_batched_tokens": 255}, "activations: .* at least 256, .* 255"),
        ((9, 0), {**FP8, "max_num_seqs": 256}, "activations: .* max_num_seqs below 256, .* is 256"),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    capability: tuple[int, int] | None, options: dict[str, str], message: str, packages: set[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(
            EngineConfig(**{"device": "cuda:0", **options}), ModelConfig.from_hf(V32), capability
        )


@pytest.mark.parametrize(
    ("changes", "options", "activations"),
    [
        ({}, {}, "none"),
        ({}, FP8, "fp8_ue8m0"),
        ({"quantization_config": "absent"}, {**FP8, "quantization": "fp8"}, "fp8"),
    ],
)
def test_activations(changes: dict[str, str], options: dict[str, str], activations: str) -> None:
    """Scales are powers of two where the checkpoint's are."""
    model = changed(V32, **changes)
    assert (
        activations_of(resolve(EngineConfig(device="cpu", **options), model), model) == activations
    )


def test_fp8_activations_need_fp8_weights_in_the_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"activations: 'fp8' needs FP8 weights, .* 'auto'"):
        resolve(EngineConfig(device="cpu", **FP8), changed(V32, quantization_config="absent"))


def test_missing_packages_are_named(packages: set[str]) -> None:
    options = {"backend": "flashinfer", "kv_cache_dtype": "fp8_flat", "device": "cuda:0"}
    for package in ("flashinfer", "triton"):
        packages.remove(package)
        with pytest.raises(ConfigError, match=rf"the package {package} \(pip install"):
            settle(EngineConfig(**options), ModelConfig.from_hf(V32), (9, 0))


def test_fp8_tensors_without_fp8_in_the_config_are_dequantised_below_8_9() -> None:
    """A BF16 checkpoint may hold a few; its headers are read after this."""
    bf16 = changed(V32, quantization_config="absent")
    config = EngineConfig(device="cuda:0")
    assert settle(config, bf16, (8, 0)).quantization == "none"
    assert settle(config, bf16, (8, 9)).quantization == "auto"


def test_fp8_index_keys_are_chosen_where_they_fit() -> None:
    small = changed(V32, index_head_dim=64)
    assert settle(EngineConfig(device="cuda:0"), small, (9, 0)).index_cache_dtype == "bfloat16"


def test_fp8_rows_need_whole_groups() -> None:
    small = changed(V32, kv_lora_rank=64)
    with pytest.raises(ConfigError, match=r"kv_lora_rank.*64"):
        resolve(EngineConfig(device="cpu", kv_cache_dtype="fp8"), small)
    resolve(EngineConfig(device="cpu", kv_cache_dtype="fp8_flat"), small)
    with pytest.raises(ConfigError, match="index_head_dim"):
        resolve(
            EngineConfig(device="cpu", index_cache_dtype="fp8"), changed(V32, index_head_dim=64)
        )
