"""EngineConfig: every option of `LLM` and the command line. No torch in here."""

from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from minidsv.errors import ConfigError
from minidsv.request import MAX_INT


def _option(default: Any, help: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine; the names and defaults are those of `LLM(...)`."""

    model: str | None = _option(None, "checkpoint folder (default: the bundled tiny model)")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _option("auto", "compute dtype", "auto", "float32", "bfloat16")
    kv_cache_dtype: str = _option(
        "auto", "latent cache", "auto", "float32", "bfloat16", "fp8", "fp8_flat"
    )
    index_cache_dtype: str = _option("auto", "indexer cache", "auto", "float32", "bfloat16", "fp8")
    pdl: str = _option("auto", "programmatic dependent launch", "auto", "on", "off")
    cuda_graph: str = _option("auto", "decode as one CUDA graph", "auto", "on", "off")
    quantization: str = _option(
        "auto", "weights: as stored, dequantised, FP8 on load", "auto", "none", "fp8"
    )
    activations: str = _option(
        "none",
        "beside FP8 weights, in steps of 256 tokens or more; needs max_num_seqs < 256",
        "none",
        "fp8",
    )
    load_format: str = _option("auto", "read the checkpoint, or random weights", "auto", "random")
    backend: str = _option(
        "auto", "operators (auto: triton where it can run)", "auto", "torch", "triton", "flashinfer"
    )
    max_model_len: int | None = _option(None, "longest prompt + output, in tokens")
    max_num_seqs: int = _option(64, "most requests that run at once")
    max_num_batched_tokens: int = _option(8192, "most tokens in one step")
    num_pages: int | None = _option(None, "pages of 64 tokens in the cache pool")
    enable_prefix_caching: bool = _option(True, "reuse the cached pages of equal prefixes")
    seed: int = _option(0, "seed of requests that bring none, and of random weights")

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{option.name}: {value!r} is not one of {list(choices)}")
            if value is None and option.default is None:
                continue
            if isinstance(option.default, str) or option.name == "model":
                if not isinstance(value, str):
                    raise ConfigError(f"{option.name}: {value!r} is not a string")
                continue
            if isinstance(option.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{option.name}: {value!r} is not True or False")
                continue
            least = 0 if option.name == "seed" else 1
            number = isinstance(value, int) and not isinstance(value, bool)
            if not number or not least <= value <= MAX_INT:
                raise ConfigError(f"{option.name}: {value!r} is not an integer of at least {least}")


def bundled_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(files("minidsv.configs") / "tiny"))


def model_path(config: EngineConfig) -> Path:
    """`model` or the bundled one: a folder, or with random weights also a config.json."""
    return bundled_model() if config.model is None else Path(config.model)


def tokenizer_folder(config: EngineConfig) -> Path:
    """The folder of the tokenizer: the bundled model's for random weights without one."""
    path = model_path(config)
    if config.load_format == "random" and not (path / "tokenizer.json").exists():
        return bundled_model()
    return path
