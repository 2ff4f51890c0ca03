"""Compiling ahead of the first launch, with a driver that can tell its target and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from minidsv.kernels.launch import KernelSpec, compiling_only, observed_launches


@triton.jit
def _fill_kernel(out, BLOCK: tl.constexpr, PDL: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), 0.0)


def test_compiling_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = GPUTarget("cuda", 90, 32)
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    monkeypatch.setattr(driver, "_active", device)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec, out = KernelSpec(_fill_kernel, ()), torch.empty(64, device="meta")
    started: list[object] = []
    with observed_launches(lambda launch, _: started.append(launch)), compiling_only():
        for block in (32, 64, 64):
            spec.launch((1,), "off", {"out": out, "BLOCK": block})
        spec.launch((0,), "off", {"out": out, "BLOCK": 16})
    compiled = spec.kernel.device_caches[0][0].values()
    assert sorted(binary.metadata.name for binary in compiled) == ["_fill_kernel"] * 2
    assert all(binary.asm["cubin"] for binary in compiled)
    assert not started
