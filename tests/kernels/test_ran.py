"""What a device ran is what was proved: the recorder, the rows of binaries, and both on a GPU."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import planted
from minidsv import LLM, SamplingParams
from minidsv.kernels.check import ahead_of_time
from minidsv.kernels.launch import KernelSpec, Launch, Row, recorded_launches
from minidsv.kernels.pdl import PDL_MODES
from minidsv.kernels.ran import check_ran, report_ran, row_of
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    set_mla_kv_buffer,
    set_mla_kv_buffer_fp8_quant,
)
from minidsv.kernels.specs import SPECS


def compiled(spec: KernelSpec, row: Row, mode: str = "on"):
    """As a launch on an H100 gives it back."""
    return triton.compile(
        ahead_of_time(spec.kernel, row, mode),
        target=GPUTarget("cuda", 90, 32),
        options=spec.compile_options(row.num_warps, row.num_stages, mode),
    )


def test_launches_are_recorded_only_when_asked() -> None:
    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda **arguments: SimpleNamespace(hash=str(sorted(arguments.items())))

    spec = KernelSpec(Kernel(), ())
    spec.launch((1,), "on", {"x": 1})
    with recorded_launches() as outer:
        for x, mode, programs in (
            (1, "on", 2),
            (1, "on", 2),
            (2, "on", 2),
            (2, "off", 2),
            (3, "on", 0),
        ):
            spec.launch((programs,), mode, {"x": x})
        with recorded_launches() as inner:
            spec.launch((1,), "seed", {"x": 4})
    spec.launch((1,), "on", {"x": 5})
    assert [launch.mode for launch in outer.values()] == ["on", "on", "off"]
    assert [launch.mode for launch in inner.values()] == ["seed"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_row_of_a_binary(spec: KernelSpec) -> None:
    for row in spec.rows[:: max(1, len(spec.rows) - 1)]:
        assert row_of(ahead_of_time(spec.kernel, row, "on"), row.num_warps, row.num_stages) == row


def test_what_ran_is_compared_with_its_row() -> None:
    clean, bad = planted.spec(planted.weight_first), planted.spec(planted.no_wait)
    row = clean.rows[0]
    other = Row(row.arguments | {"x": "*fp32"}, num_warps=8)
    binaries = [compiled(clean, row), compiled(clean, other), compiled(bad, row)]
    swapped = SimpleNamespace(
        src=binaries[0].src, metadata=binaries[0].metadata, asm=binaries[1].asm
    )
    launches = [Launch(s, "on", b) for s, b in zip((clean, clean, bad), binaries, strict=True)]
    proved, unlisted, broken, foreign = check_ran([*launches, Launch(clean, "on", swapped)])
    assert not proved.findings
    (finding,) = unlisted.findings
    assert "no row: weight_first[0] is nearest" in finding
    assert "differs in x '*fp32' (row: '*fp32:16'), num_warps 8 (row: 4)" in finding
    assert "PTX 0 waits, want one" in broken.findings
    assert foreign.findings == [f"its row gives cubin {proved.proof.digest}"]
    report = report_ran([proved, unlisted, broken, foreign])
    assert report.endswith("4 binaries of 2 kernels ran: 1 proved rows, 3 others")
    assert "weight_first[-] (fp32 fp32 fp32) sm_90 on:\n    no row" in report


def assert_proved(launches: dict[str, Launch], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a registered kernel's row, kept the contract, and is the binary of the proof."""
    known = {spec.name for spec in SPECS}
    assert {launch.spec.name for launch in launches.values()} <= known
    ran = check_ran(launches.values(), jobs=os.cpu_count() or 1)
    report = report_ran(ran)
    assert not any(r.findings for r in ran), report
    with capsys.disabled():
        print(f" [{report}]", end="")


@pytest.mark.gpu
def test_cache_writes_ran_as_proved(capsys: pytest.CaptureFixture[str]) -> None:
    with recorded_launches() as launches:
        for mode, (c, r) in itertools.product(PDL_MODES, ((512, 64), (128, 64))):
            loc = torch.arange(5, device="cuda")
            for dtype in (torch.bfloat16, torch.float32):
                keys = torch.randn(5, (c + r) * 2, dtype=dtype, device="cuda")
                nope, rope, _ = keys.split((c, r, c + r), -1)
                buffer = torch.empty(64, c + r, dtype=torch.bfloat16, device="cuda")
                set_mla_kv_buffer(buffer, loc, nope, rope, pdl=mode)
                flat = buffer.to(torch.float8_e4m3fn)
                set_mla_kv_buffer_fp8_quant(flat, loc, nope, rope, pdl=mode)
                rows = torch.empty(64, fp8_row_bytes(c, r), dtype=torch.uint8, device="cuda")
                set_mla_kv_buffer_fp8_quant(rows, loc, nope, rope, pdl=mode)
    assert len({launch.spec.name for launch in launches.values()}) == 3
    assert {launch.mode for launch in launches.values()} == set(PDL_MODES)
    assert_proved(launches, capsys)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", ["on", "off"])
@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8", "fp8_flat"])
def test_a_generation_ran_as_proved(
    kv_cache_dtype: str, pdl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model past its index_topk, one request and several, prefill and decode; once with
    all that warm-up and capture launch."""
    if pdl == "on" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs SM 9.0")
    options = {"backend": "triton", "kv_cache_dtype": kv_cache_dtype, "pdl": pdl}
    options["cuda_graph"] = "on" if (kv_cache_dtype, pdl) == ("fp8", "on") else "off"
    with recorded_launches() as launches:
        llm = LLM(device="cuda", num_pages=64, max_model_len=2000, **options)
        for prompts in ([[5]], [[5, 7] * 200, [9] * 3, [8] * 65]):
            llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert launches
    modes = {launch.mode for launch in launches.values()}
    assert modes == {"prefetch" if pdl == "on" else "off"}
    assert_proved(launches, capsys)
