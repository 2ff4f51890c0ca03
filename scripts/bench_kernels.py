"""Operators of the decode chain against the memory roofline, with PDL off and on.

    python scripts/bench_kernels.py                        # all rows
    python scripts/bench_kernels.py --op moe --tokens 1 --plot roofline.png --json out.json

Each row is first held to its reference (relative L2 within the row's tolerance) in every mode, the
modes to each other bit by bit; exit status 1 and no times if a row is wrong. Then microseconds of
one launch in a CUDA graph of back-to-back launches over rotating buffers (cold weights). GB/s are
compulsory bytes over the time of the last mode; the peak is the read bandwidth measured first.
Where other libraries do the same (bench_peers.py) and import, each is held to our reference too;
its time is the median of five runs in turn with ours, and "x peer" is ours over the fastest one's.
The last line is JSON, with all of them. The rows are every operator that a decode step calls, and
the parts of the fused ones:

    bench_linears.py      projections, alone and with the norm before them
    bench_attention.py    W_UK, W_UV, attention_prep, sparse attention over the three caches
    bench_indexer.py      scores, top-k, all slots of a short context
    bench_experts.py      router, experts (FP8, BF16, with the shared one), the dense MLP
    bench_small.py        norms, rotations, quantisation, cache writes, a step's first and last
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench_cases import all_cases
from bench_inputs import FULL, TP8, Case, device, relative_error, tensors
from bench_peers import PeerTime, peer_time
from bench_timing import copies_for, graph_us
from minidsv.bench import check_file, provenance
from minidsv.bench_profile import check_picture
from minidsv.bench_timing import read_bandwidth
from minidsv.errors import ConfigError
from minidsv.kernels.pdl import PDL_MODES, PdlMode

DIMS = {d.name: d for d in (FULL, TP8)}


@dataclass(frozen=True)
class Row:
    """What was measured of one case."""

    dims: str
    op: str
    shape: str
    nbytes: int
    flops: int
    error: float  # relative L2 against the reference
    us: dict[str, float]  # by PDL mode
    peer: PeerTime | None = None

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.us["prefetch"] / 1e3


def checked(case: Case) -> float:
    """The error of `case`; raises AssertionError where it is wrong or the modes differ.

    Each mode has inputs of its own: what it fails to write, none before it has written.
    """
    first = tensors(case.build(0)("off"))
    for mode in PDL_MODES[1:]:
        for one, other in zip(first, tensors(case.build(0)(mode)), strict=True):
            same = torch.equal(*(t.contiguous().view(torch.uint8) for t in (one, other)))
            assert same, f"{case.op} {case.shape}: {mode} differs from off"
    error = relative_error(first, tensors(case.build(0)(None)))
    assert error <= case.tolerance, (
        f"{case.op} {case.shape}: relative L2 {error:.3g}, {case.tolerance} allowed"
    )
    return error


def measure(dims: str, case: Case, modes: tuple[PdlMode, ...], refusals: set[str] | None) -> Row:
    """Check, then time; `refusals` of peers go to standard error once. None: without peers."""
    error = checked(case)
    runs = [case.build(seed) for seed in range(copies_for(case.cost[0], most=16))]
    us = {mode: graph_us([lambda run=run, mode=mode: run(mode) for run in runs]) for mode in modes}
    peer = None
    if refusals is not None:
        peer, refused = peer_time(runs, modes[-1])
        for why in refused:
            reason = f"a peer of {case.op} is left out: {why}"
            if reason not in refusals:
                print(reason, file=sys.stderr, flush=True)
            refusals.add(reason)
    return Row(dims, case.op, case.shape, *case.cost, error, us, peer)


def report(row: Row, peak: float) -> str:
    times = "  ".join(f"{row.us[mode]:8.2f}" for mode in row.us)
    share = 100 * row.gb_per_s / peak
    return (
        f"{row.dims:5}{row.op:28}{row.shape:22}{times}  {row.gb_per_s:8.0f}{share:6.0f} %"
        f"{row.us['off'] / row.us['prefetch']:7.2f}x{beside(row.peer)}"
    )


def beside(peer: PeerTime | None) -> str:
    return "" if peer is None else f"{peer.us:9.2f}{peer.ours_us / peer.us:6.2f}x {peer.name}"


def plot(rows: list[Row], peak: float, path: str) -> None:
    """Achieved bandwidth over compulsory bytes, under the measured peak; grey: equal times."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 8), layout="constrained")
    for dims in sorted({row.dims for row in rows}):
        mine = [row for row in rows if row.dims == dims]
        axes.scatter([r.nbytes for r in mine], [r.gb_per_s for r in mine], s=14, label=dims)
    limits = min(r.nbytes for r in rows) / 2, max(r.nbytes for r in rows) * 8
    for us in (1, 10, 100, 1000):
        axes.plot(limits, [n / us / 1e3 for n in limits], color="lightgrey", linewidth=0.8)
        axes.text(peak * us * 1e3, peak * 1.1, f"{us} us", color="grey", fontsize=8, ha="center")
    for i, row in enumerate(sorted(rows, key=lambda row: row.nbytes)):
        place = {"xytext": (6, 9 * (i % 3) - 12), "textcoords": "offset points", "fontsize": 5}
        axes.annotate(f"{row.op} {row.shape}", (row.nbytes, row.gb_per_s), **place)
    axes.axhline(peak, color="black", linewidth=0.8)
    least = min(row.gb_per_s for row in rows) / 2
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=(least, peak * 1.6))
    axes.set(xlabel="compulsory bytes", ylabel="GB/s")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dims", choices=sorted(DIMS), action="append", help="default: both")
    parser.add_argument("--tokens", type=positive, action="append", help="default: 1, 8 and 64")
    parser.add_argument("--op", action="append", default=[], help="rows whose name has this")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries")
    parser.add_argument("--plot", metavar="FILE", help="write a roofline picture")
    parser.add_argument("--json", metavar="FILE", help="also write the JSON there")
    return parser


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def selected(
    dims: Sequence[str], tokens: Sequence[int], parts: Sequence[str]
) -> list[tuple[str, Case]]:
    """(name of the sizes, row) of all rows whose name has one of `parts`; none given: all.

    Raises ConfigError on a part that no name has.
    """
    cases = [(name, case) for name in dims for case in all_cases(DIMS[name], tokens)]
    names = list(dict.fromkeys(case.op for _, case in cases))
    for part in parts:
        if not part or not any(part in name for name in names):
            raise ConfigError(f"op: {part!r} is in none of {names}")
    return [c for c in cases if not parts or any(part in c[1].op for part in parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options()
    args = parser.parse_args(arguments)
    try:
        for name, file in (("json", args.json), ("plot", args.plot)):
            if file is not None:
                check_file(name, file)
        if args.plot is not None:
            check_picture(args.plot)
        cases = selected(args.dims or list(DIMS), args.tokens or [1, 8, 64], args.op)
    except ConfigError as error:
        parser.error(str(error))
    if device().type != "cuda":
        sys.exit("error: bench_kernels.py needs a CUDA device, and none is visible")
    about = provenance(device().type) | {"command": " ".join(["python", *sys.orig_argv[1:]])}
    peak = read_bandwidth(device()) / 1e9
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows, wrong = measured(cases, peak, None if args.no_peers else set[str]())
    result = {"kind": "kernels", **about, "read_gb_per_s": peak}
    text = json.dumps(result | {"rows": [asdict(row) for row in rows], "wrong": wrong})
    print(text)
    if args.json is not None:
        Path(args.json).write_text(text + "\n")
    if args.plot is not None and rows:
        plot(rows, peak, args.plot)
    return 1 if wrong else 0


def measured(
    cases: Sequence[tuple[str, Case]], peak: float, refusals: set[str] | None
) -> tuple[list[Row], list[str]]:
    """(the rows, what is wrong), printed as they come."""
    modes = "  ".join(f"{mode:>8}" for mode in PDL_MODES)
    modes += "      GB/s  peak  off/prefetch  peer us  x peer"
    print(f"memory read at {peak:.0f} GB/s\n{'dims':5}{'op':28}{'shape':22}{modes}", flush=True)
    rows, wrong = list[Row](), list[str]()
    for name, case in cases:
        try:
            rows.append(measure(name, case, PDL_MODES, refusals))
            print(report(rows[-1], peak), flush=True)
        except AssertionError as error:
            wrong.append(f"{name} {error}")
            print(f"WRONG {wrong[-1]}", flush=True)
    return rows, wrong


if __name__ == "__main__":
    sys.exit(main())
