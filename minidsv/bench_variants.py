"""The variants of a decode step: whose operators, in which PDL mode, and which of them run here."""

import torch

from minidsv.backend import device_name
from minidsv.bench_options import VARIANTS, BenchOptions
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.kernels.pdl import PdlMode, is_arch_support_pdl
from minidsv.layers import Operators

MODES: dict[str, PdlMode] = {
    "eager": "off",
    "graph": "off",
    "graph+seed": "seed",
    "graph+pdl": "on",
    "graph+prefetch": "prefetch",
}


def operators(config: EngineConfig, variant: str) -> Operators:
    """A variant's, under a resolved config."""
    if config.backend == "torch":
        return Operators()
    return Operators(MODES[variant], "flashinfer" if config.backend == "flashinfer" else "triton")


def settle_variants(config: EngineConfig, options: BenchOptions) -> tuple[str, ...]:
    """Those asked for, or the subject's default, for a resolved config; raises ConfigError.

    The table takes all that run here, a graph's report the engine's own mode, a profile none with
    PDL, under which the times of kernels overlap.
    """
    missing = {name: _missing(config, name) for name in VARIANTS}
    if options.subject == "graph":
        missing["eager"] = "another subject than graph"
    here = tuple(name for name, reason in missing.items() if reason is None)
    for name in options.variant_names or ():
        if missing[name] is not None:
            raise ConfigError(f"variants: {name!r} needs {missing[name]}; accepted here: {here}")
    if not here:
        raise ConfigError(f"graph: needs {missing['graph']}")
    without_pdl = ("graph",) if "graph" in here else ("eager",)
    default = {"graph": here[-1:], "profile": without_pdl}
    return options.variant_names or default.get(options.subject, here)


def _missing(config: EngineConfig, variant: str) -> str | None:
    """What a variant lacks here."""
    if variant == "eager":
        return None
    if config.backend == "torch":
        return f"our kernels on CUDA, and backend is 'torch' on {config.device}"
    capability = torch.cuda.get_device_capability(config.device)
    if MODES[variant] == "off" or is_arch_support_pdl(capability):
        return None
    return f"capability 9.0, and {device_name(config.device, capability)}"
