"""The PDL checker: clean kernels pass, planted violations are named, registered kernels hold."""

import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import triton

import planted
from minidsv.kernels import ptx, sass
from minidsv.kernels.check import SPECS, Case, build, cases, check, main, prove
from minidsv.kernels.contract import check_ptx, check_sass
from minidsv.kernels.launch import KernelSpec
from minidsv.kernels.pdl import PDL_MODES, is_arch_support_pdl

KERNELS = Path(sys.modules["minidsv.kernels.check"].__file__).parent


def proof_of(kernel, mode="on"):
    spec = planted.spec(kernel)
    return check(Case(spec, spec.rows[0], 90, mode))


@pytest.mark.parametrize("mode", ["seed", "on", "prefetch"])
@pytest.mark.parametrize(
    ("kernel", "before"),
    [(planted.clean, 0), (planted.weight_first, 1), (planted.trigger_first, 0)],
)
def test_clean_kernels_are_proved(kernel, before: int, mode: str) -> None:
    proof = proof_of(kernel, mode)
    assert not proof.violations
    assert (proof.loads_before, proof.accesses) == (before, 3)


@pytest.mark.parametrize(
    ("kernel", "findings"),
    [
        (planted.store_first, ["PTX line", "before the wait: a write to 'out'"]),
        (planted.activation_first, ["PTX line", "ld.global", "reads 'x', not declared"]),
        (planted.atomic_first, ["PTX line", "atom", "before the wait: a write to 'w'"]),
        (planted.loaded_index_first, ["PTX line", ptx.LOADED]),
        (planted.wait_in_pipelined_loop, ["PTX line", "wait stands in a loop", "can end without"]),
        (planted.wait_in_one_role, ["PTX the kernel can end without the wait (line", "a write to"]),
        (planted.no_wait, ["PTX 0 waits, want one", "'x', not declared", "can end without"]),
        (planted.two_waits, ["PTX 2 waits (line"]),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_planted_violations_are_named(kernel, findings: list[str]) -> None:
    text = "\n".join(proof_of(kernel).violations)
    assert all(finding in text for finding in findings), text


def test_a_loop_that_is_pipelined_past_its_wait() -> None:
    """Triton 3.6 copies the first stages before the wait; 3.9 does not pipeline such a loop."""
    proof = proof_of(planted.wait_in_pipelined_loop)
    copies = [v for v in proof.violations if "cp.async" in v and "reads 'x', not declared" in v]
    assert len(copies) == (8 if triton.__version__ < "3.9" else 0)


def test_same_counts_do_not_fool_it() -> None:
    good, bad = proof_of(planted.weight_first), proof_of(planted.activation_first)
    assert (good.loads_before, good.accesses) == (bad.loads_before, bad.accesses)


def test_without_pdl_there_is_no_wait() -> None:
    assert not proof_of(planted.clean, "off").violations
    assert "griddepcontrol without PDL" in proof_of(planted.always_waits, "off").violations[0]


def test_counters_in_static_shared_memory_are_counted() -> None:
    """The top-k's, which its inline PTX declares."""
    (spec,) = (spec for spec in SPECS if spec.name == "select_kernel")
    assert build(Case(spec, spec.rows[-2])).shared > 4 * 2048


def test_an_access_that_ptxas_moved_up_is_found() -> None:
    """The first load after ACQBULK, put before it: what the PTX cannot show."""
    spec = planted.spec(planted.weight_first)
    binary = build(Case(spec, spec.rows[0], 90, "on"))
    kernel = ptx.parse(binary.ptx)
    lines = sass.disassemble(binary.cubin).splitlines()
    assert not list(check_sass(sass.parse("\n".join(lines)), kernel))
    wait = next(i for i, line in enumerate(lines) if "ACQBULK" in line)
    load = next(i for i, line in enumerate(lines) if "LDG" in line and i > wait)
    lines.insert(wait, lines.pop(load))
    (violation,) = check_sass(sass.parse("\n".join(lines)), kernel)
    assert "LDG" in violation
    assert "the PTX has no such access there (ld, 4 bytes)" in violation


PTX = """
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1,
    .param .u64 k_param_2
)
{{
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b64 %rd3, [k_param_2];
    {before}
    griddepcontrol.wait;
    st.global.b32 [%rd1], %r1;
    ret;
}}
"""


@pytest.mark.parametrize(
    ("before", "finding"),
    [
        ("add.s64 %rd4, %rd2, %rd3; ld.global.b32 %r1, [%rd4 + 4];", None),
        ("prefetch.global.L2 [%rd2];", None),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r2;", None),
        ("cp.async.bulk.prefetch.L2.global [%rd2], 64;", None),
        ("ld.shared.b32 %r1, [%r2]; cp.async.commit_group;", None),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;", "reads 'out'"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1], 16;", "a write"),
        ("red.global.add.f32 [%rd2], %f1;", "a write"),
        ("ld.b32 %r1, [%rd1];", "reads 'out'"),
        ("selp.b64 %rd4, %rd1, %rd2, %p1; ld.global.b32 %r1, [%rd4];", "reads 'out'"),
        ("@%p1 mov.b64 %rd4, %rd1; @!%p1 mov.b64 %rd4, %rd2; ld.volatile.global.b8 %r1, [%rd4];",
         "reads 'out'"),
        ("ld.global.b64 %rd4, [%rd2]; ld.global.b32 %r1, [%rd4];", f"reads '{ptx.LOADED}'"),
        ("ld.global.b32 %r1, [%rd3];", "from no pointer parameter"),
        ("call.uni (retval0), vprintf, (param0, param1);", "a write"),
        ("{ .reg .pred p; setp.eq.s32 p, %r1, 0; @p bra $L; } bar.sync 0; $L:", None),
        ("@%p1 bra $L; bra.uni $M; $L: ret; $M:", "can end without the wait (line"),
        ("$L: add.s32 %r1, %r1, 1; @%p1 bra $L;", None),
        ("@%p1 bra $L; griddepcontrol.wait; $L:", "2 waits"),
    ],
)  # fmt: skip
def test_forms_of_access(before: str, finding: str | None) -> None:
    spec = planted.spec(planted.clean)
    names = {"k_param_0": "out", "k_param_1": "w", "k_param_2": "stride"}
    row = planted.Row({"out": "*fp32", "w": "*fp32", "stride": "i64"})
    spec = planted.KernelSpec(spec.kernel, (row,), spec.replay_constant)
    violations = list(check_ptx(ptx.parse(PTX.format(before=before)), names, spec))
    assert any(finding in v for v in violations) if finding else not violations, violations


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"indirect branch .*brx\.idx"):
        ptx.parse(PTX.format(before="brx.idx %r1, $T;"))
    with pytest.raises(ValueError, match=r"one \.entry in the PTX, found 0"):
        ptx.parse(".func f() { ret; }")
    with pytest.raises(ValueError, match="SASS line 1 is no instruction"):
        sass.parse("        /*0000*/    ??? ;")
    with pytest.raises(ValueError, match=r"jumps to \['\.L_x_1'\], which it does not hold"):
        sass.parse("        /*0000*/    BRA `(.L_x_1) ;")


@pytest.mark.parametrize(
    ("body", "finding"),
    [("BPT.TRAP 0x1", None), ("LDG.E R1, [R2]", "`LDG.E R1"), ("NOP", "`RET.REL.NODEC")],
)
def test_a_call_before_the_wait_is_followed(body: str, finding: str | None) -> None:
    """Triton 3.6 checks tensor memory on sm_100 so: the function traps."""
    code = f"CALL.REL.NOINC `($__f) ; ACQBULK ; EXIT ; $__f: {body} ; RET.REL.NODEC R2 `(k) ;"
    lines = code.replace("$__f: ", "\n$__f:\n").replace(" ; ", " ;\n").splitlines()
    listing = sass.parse(
        "\n".join(x if x.endswith(":") else f"  /*0000*/  {x}" for x in lines if x)
    )
    kernel = ptx.parse(PTX.format(before=""))
    violations = list(check_sass(listing, kernel))
    assert any(finding in v for v in violations) if finding else not violations, violations


def test_registered_kernels_are_proved() -> None:
    """One row in full and its other modes and targets; `minidsv.kernels.check` does them all."""
    assert prove(SPECS, one_row=True, jobs=os.cpu_count() or 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_is_compiled(spec) -> None:
    """Every row with PDL for sm_90; a row in every mode, for sm_100 and, without e4m3, sm_80."""
    todo = list(cases(spec))
    assert {c.row_name for c in todo if c[2:] == (90, "prefetch")} == {
        f"{spec.name}[{i}]" for i in range(len(spec.rows))
    }
    hopper_and_later = {(100, "prefetch"), *((90, mode) for mode in PDL_MODES)}
    for chosen, rows in ((todo, spec.rows), (cases(spec, one_row=True), spec.rows[:1])):
        ampere = {(80, "off")} if any(row.min_capability <= 80 for row in rows) else set()
        assert {c[2:] for c in chosen} == hopper_and_later | ampere


SASS = """
        /*0000*/                   MOV R2, 0x20 ;
        /*0010*/              @!P0 CALL.REL.NOINC `($__internal_0_$__trap) ;
        /*0020*/                   ACQBULK ;
        /*0030*/                   EXIT ;
$__internal_0_$__trap:
        /*0040*/                   {0} ;
        /*0050*/                   {1} ;
"""


@pytest.mark.parametrize(
    ("function", "findings"),
    [
        (("NOP", "BPT.TRAP 0x1"), []),
        (("BPT.TRAP 0x1", "RET.REL.NODEC R2 `($__internal_0_$__trap)"), []),
        (("NOP", "RET.REL.NODEC R2 `($__internal_0_$__trap)"), ["RET.REL", "be followed"]),
        (("STG.E [R2], R4", "BPT.TRAP 0x1"), ["STG.E [R2], R4", "no such access"]),
        (("CALL.REL R4", "BPT.TRAP 0x1"), ["CALL.REL R4", "be followed"]),
    ],
)
def test_calls_are_followed(function: tuple[str, str], findings: list[str]) -> None:
    violations = list(
        check_sass(sass.parse(SASS.format(*function)), ptx.parse(PTX.format(before="")))
    )
    assert len(violations) == bool(findings)
    assert all(finding in violations[0] for finding in findings)


@pytest.mark.parametrize("jobs", [1, 2])
def test_report_and_verdict(capsys: pytest.CaptureFixture[str], jobs: int) -> None:
    """A kernel without a wait fails in each mode with PDL, and holds without."""
    assert not prove([planted.spec(planted.no_wait)], jobs=jobs)
    out = capsys.readouterr().out
    order = ["prefetch", "off", "seed", "on", "prefetch", "off"]
    assert re.findall(r"sm_\d+ (\w+):", out) == order
    assert "FAILED no_wait[0] (fp32 fp32 fp32) sm_90 prefetch: 3 global accesses" in out
    assert "\n    PTX 0 waits, want one\n" in out
    assert "1 kernels, 0 rows proved (2 binaries), 4 binaries failed" in out


def test_nothing_starts_unproved() -> None:
    """Whatever waits and whatever is launched is registered."""
    found = set()
    for path in KERNELS.glob("*_triton.py"):
        for value in vars(import_module(f"minidsv.kernels.{path.stem}")).values():
            if isinstance(value, KernelSpec):
                found.add(value.kernel.__name__)
            elif isinstance(value, triton.JITFunction) and "  pdl_begin(" in value.src:
                found.add(value.__name__)
    assert found == {spec.kernel.__name__ for spec in SPECS}


def test_the_attribute_is_set_in_one_place() -> None:
    """Only `launch_kwargs` names it for Triton, and kernels start only through a spec."""
    naming = {p.name for p in KERNELS.glob("*.py") if "launch_pdl" in p.read_text()}
    assert naming == {"pdl.py", "check.py"}
    starting = {p.name for p in KERNELS.glob("*.py") if "[grid](" in p.read_text()}
    assert starting == {"launch.py"}


@pytest.mark.parametrize(
    ("capability", "supported"),
    [(None, False), ((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)],
)
def test_is_arch_support_pdl(capability: tuple[int, int] | None, supported: bool) -> None:
    assert is_arch_support_pdl(capability) is supported


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1"),
        (["--jobs", "0"], {}, "--jobs: 0 is less than 1"),
        (["--kernel", "gemv"], {}, f"--kernel: gemv not known; accepted: {SPECS[0].name}, "),
    ],
)
def test_the_command_refuses(arguments, environment, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    monkeypatch.setattr(os, "environ", os.environ | environment)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
