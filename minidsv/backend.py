"""Whose operators run a resolved configuration, and how: `backend`, `pdl`, `cuda_graph`."""

from importlib.util import find_spec

from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.pdl import PdlMode, is_arch_support_pdl
from minidsv.kernels.quant import Activations
from minidsv.kernels.tiles_indexer import CHUNK, MAX_LONG_TOPK, MAX_SCORES

Capability = tuple[int, int]  # CUDA compute capability
MAX_GRID = 65535  # tokens of a step, on a grid's third axis
TRITON_CAPABILITIES = ((8, 0), (9, 0), (10, 0))  # what the kernels are proved for
MAX_VOCABULARY = 1 << 19  # ids that argmax merges


def settle_backend(config: EngineConfig, model: ModelConfig, capability: Capability | None) -> str:
    """ "torch", "triton" or "flashinfer" for a config whose device and dtypes are settled.

    `capability` is the device's, None without CUDA. Raises ConfigError where the one asked for
    cannot run.
    """
    missing = _missing_for_triton(config, capability) or _unfit_size(config, model)
    if config.backend == "auto":
        return "triton" if missing is None else "torch"
    if config.backend == "flashinfer":
        missing = missing or _missing_for_flashinfer(config)
    if config.backend == "torch" or missing is None:
        return config.backend
    raise ConfigError(
        f"backend: {config.backend!r} needs {missing}; accepted here: 'auto', 'torch'"
    )


def _missing_for_triton(config: EngineConfig, capability: Capability | None) -> str | None:
    if capability not in TRITON_CAPABILITIES:
        found = device_name(config.device, capability)
        return f"a CUDA device of capability 8.0, 9.0 or 10.0, and {found}"
    if config.max_num_batched_tokens > MAX_GRID:
        return f"max_num_batched_tokens up to {MAX_GRID}, and it is {config.max_num_batched_tokens}"
    if config.dtype != "bfloat16":
        return f"dtype 'bfloat16', and it is {config.dtype!r}"
    for name in ("kv_cache_dtype", "index_cache_dtype"):
        if getattr(config, name) == "float32":
            return f"another {name} than 'float32'"
    return _missing_package("triton", "triton")


def _unfit_size(config: EngineConfig, model: ModelConfig) -> str | None:
    """The first of the model's sizes that the kernels do not take."""
    assert config.max_model_len is not None
    one_of: dict[str, tuple[int, ...]] = {
        "qk_rope_head_dim": (32, 64),
        "index_head_dim": (2 * model.qk_rope_head_dim,),
        "index_n_heads": (8, 16, 32, 64),
        "kv_lora_rank": (128, 256, 512),
    }
    for name, accepted in one_of.items():
        if (found := getattr(model, name)) not in accepted:
            return f"{name} of {' or '.join(map(str, accepted))}, and it is {found}"
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if (found := getattr(model, name)) % 8:
            return f"{name} that 8 divides, and it is {found}"
    length, topk = config.max_model_len, model.index_topk
    limits = [("vocab_size", model.vocab_size, MAX_VOCABULARY)]
    if length > max(topk, CHUNK):
        limits += [("index_topk", topk, MAX_LONG_TOPK), ("max_model_len", length, MAX_SCORES)]
    for name, found, most in limits:
        if found > most:
            return f"{name} up to {most}, and it is {found}"
    return None


def _missing_for_flashinfer(config: EngineConfig) -> str | None:
    """It has one operator that we use: `mla_rope_quantize_fp8`, which makes flat FP8 rows."""
    if config.kv_cache_dtype != "fp8_flat":
        return f"kv_cache_dtype 'fp8_flat', and it is {config.kv_cache_dtype!r}"
    return _missing_package("flashinfer", "minidsv[gpu]")


def _missing_package(name: str, installed_by: str) -> str | None:
    return None if find_spec(name) else f"the package {name} (pip install '{installed_by}')"


def device_name(device: str, capability: Capability | None) -> str:
    """ "cuda:0 has 8.9", for messages."""
    return f"{device} has {'none' if capability is None else '{}.{}'.format(*capability)}"


def settle_pdl(config: EngineConfig, capability: Capability | None) -> str:
    """ "on" or "off" for a config whose backend is settled; raises ConfigError."""
    missing = None
    if config.backend == "torch":
        missing = "our kernels, and backend is 'torch'"
    elif not is_arch_support_pdl(capability):
        missing = f"capability 9.0, and {device_name(config.device, capability)}"
    if missing is None:
        return "off" if config.pdl == "off" else "on"
    if config.pdl == "on":
        raise ConfigError(f"pdl: 'on' needs {missing}; accepted here: 'auto', 'off'")
    return "off"


def settle_cuda_graph(config: EngineConfig) -> str:
    """ "on" or "off" for a config whose backend is settled; raises ConfigError.

    The references read numbers back to the host, which no graph can hold.
    """
    if config.backend != "torch":
        return "off" if config.cuda_graph == "off" else "on"
    if config.cuda_graph == "on":
        raise ConfigError(
            "cuda_graph: 'on' needs our kernels, and backend is 'torch'; accepted here: "
            "'auto', 'off'"
        )
    return "off"


def pdl_mode(config: EngineConfig) -> PdlMode | None:
    """What a resolved config passes to every operator as `pdl`: None runs the references."""
    if config.backend == "torch":
        return None
    return "prefetch" if config.pdl == "on" else "off"


def activations_of(config: EngineConfig, model: ModelConfig) -> Activations:
    """What a resolved config passes to its operators as `activations`, in long steps."""
    if config.activations == "none":
        return "none"
    return "fp8_ue8m0" if model.ue8m0_activations else "fp8"
