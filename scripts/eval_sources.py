"""CONF: what to ask, checked before anything is asked.

`key=value,...` are LLM's arguments (nothing: the bundled model as it is), `http://host:port` is an
OpenAI-compatible server, `transformers` or `transformers=FOLDER` Hugging Face's model in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from eval_backends import Backend, EngineBackend, HTTPOptions
from eval_parity import Tier
from minidsv.config import ModelConfig
from minidsv.engine_config import EngineConfig, bundled_model, model_path
from minidsv.errors import ConfigError
from minidsv.resolve import resolve

PRECISIONS: tuple[Tier, ...] = ("fp32", "fp8_index", "bf16", "fp8", "fp8_flat")  # from the finest
TIERS = "|".join(PRECISIONS)
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Source:
    """A checked CONF: how it computes (a server's precision is unknown), and how to open it."""

    conf: str
    precision: Tier | None
    resolved: dict[str, Any]  # for record files: two runs are the same if these are equal
    open: Callable[[], Backend]


def read_conf(conf: str, options: HTTPOptions) -> Source:
    """Raises ConfigError, by name, for what cannot run here, and BackendError if no server is."""
    if conf.startswith(("http://", "https://")):
        from eval_http import HTTPBackend

        server = HTTPBackend(conf, options)
        return Source(conf, None, server.describe(), lambda: server)
    if conf.partition("=")[0] == "transformers":
        return _reference(conf)
    return _engine(conf)


def _reference(conf: str) -> Source:
    folder = Path(conf.partition("=")[2] or bundled_model())
    if not (folder / "config.json").is_file():
        raise ConfigError(f"transformers: {str(folder)!r} is not a folder with a checkpoint")

    def open_model() -> Backend:
        from eval_reference import TransformersBackend

        return TransformersBackend(folder)

    resolved = {"transformers": str(folder), "version": metadata.version("transformers")}
    return Source(conf, "fp32", resolved, open_model)


def _engine(conf: str) -> Source:
    config = engine_config(conf)
    resolved = resolve(config, ModelConfig.from_path(model_path(config)))
    return Source(conf, _precision(resolved), asdict(resolved), lambda: EngineBackend(config))


def _precision(config: EngineConfig) -> Tier:
    """The coarsest of what a resolved configuration computes and stores in."""
    of_dtype: dict[str, Tier] = {"float32": "fp32", "bfloat16": "bf16"}
    found = [
        of_dtype[config.dtype],
        of_dtype.get(config.index_cache_dtype, "fp8_index"),
        of_dtype.get(
            config.kv_cache_dtype, "fp8_flat" if "flat" in config.kv_cache_dtype else "fp8"
        ),
        "fp8_flat" if "fp8" in (config.quantization, config.activations) else "fp32",
    ]
    return max(found, key=PRECISIONS.index)


def engine_config(conf: str) -> EngineConfig:
    """`key=value,...` as LLM's arguments; raises ConfigError naming the key."""
    types = {option.name: str(option.type) for option in fields(EngineConfig)}
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in conf.split(","))):
        key, equals, value = part.partition("=")
        if key not in types or not equals:
            raise ConfigError(
                f"{part!r} is not key=value with a key of {sorted(types)}, an http:// address or "
                "'transformers'"
            )
        if key in options:
            raise ConfigError(f"{key}: given twice in {conf!r}")
        options[key] = _value(key, value, types[key])
    return EngineConfig(**options)


def _value(key: str, value: str, kind: str) -> Any:
    if "int" in kind:
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"{key}: {value!r} is not an integer") from None
    if "bool" in kind:
        if value not in TRUTH:
            raise ConfigError(f"{key}: {value!r} is not one of {list(TRUTH)}")
        return TRUTH[value]
    return value


def common_tier(a: Source, b: Source) -> Tier:
    """How near two runs must be: the same bits for the same engine, else by the coarser dtypes."""
    if a.precision is None or b.precision is None:
        raise ConfigError(f"tier: a server does not tell its dtypes; give --tier {TIERS}")
    if a.resolved == b.resolved:
        return "same"
    return max(a.precision, b.precision, key=PRECISIONS.index)
