"""Programmatic dependent launch (PDL): who may use it, and the one mode that drives it.

A kernel launched with the attribute may start while the kernels before it still run;
`griddepcontrol.wait` blocks until they have completed and their memory is visible (PTX ISA). Modes:

    off       no wait, no trigger, no attribute
    seed      wait first, trigger last (SGLang PR 23965; kept for the benchmarks)
    on        wait, then trigger at once
    prefetch  on, and replay-constant data (weights, gains) is touched before the wait; some kernels
              trigger last (`launch.pdl_end`) or before they wait (`launch.pdl_ahead`)

The mode reaches a kernel as its constexpr `PDL` and the launcher as `launch_kwargs`, both from
`KernelSpec.launch`, so no launch carries the attribute without the wait. No triton in here.
"""

import os
from typing import Literal

import torch
from torch import Tensor

PdlMode = Literal["off", "seed", "on", "prefetch"]
PDL_MODES: tuple[PdlMode, ...] = ("off", "seed", "on", "prefetch")


def is_arch_support_pdl(capability: tuple[int, int] | None) -> bool:
    """True from SM90 on; None stands for a device without CUDA capability (CPU, ROCm)."""
    return capability is not None and capability >= (9, 0)


def launch_kwargs(mode: PdlMode) -> dict[str, bool]:
    """The launch attribute; absent when off, because Triton for ROCm refuses the keyword."""
    assert mode in PDL_MODES, f"pdl {mode!r} is none of {PDL_MODES}"
    return {} if mode == "off" else {"launch_pdl": True}


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_mode(tensor: Tensor, mode: PdlMode | None) -> PdlMode | None:
    """What a wrapper does with its `pdl` for a tensor: None runs the reference, a mode the kernel.

    Triton runs where a mode asks for it, on CUDA tensors (or any in the interpreter), and without
    PDL where the device has none.
    """
    if mode is None or not (tensor.is_cuda or is_interpreted()):
        return None
    if not tensor.is_cuda or torch.version.hip or is_interpreted():
        return "off"
    return mode if is_arch_support_pdl(torch.cuda.get_device_capability(tensor.device)) else "off"
