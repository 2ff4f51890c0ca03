"""Operators of the decode chain against the memory roofline, with PDL off and on.

    python scripts/bench_kernels.py                        # all rows
    python scripts/bench_kernels.py --op moe --tokens 1 --plot roofline.png --json out.json

Each row is first held to its reference (relative L2 within the row's tolerance) in every mode, the
modes to each other bit by bit; exit status 1 and no times if a row is wrong. Then microseconds of
one launch in a CUDA graph of back-to-back launches over rotating buffers (cold weights). GB/s are
compulsory bytes over the time of the last mode; the peak is the read bandwidth measured first.
Where other libraries do the same (bench_peers.py) and import, each is held to our reference too;
its time is the median of five runs in turn with ours, and "x peer" is ours over the fastest one's.
The last line is JSON, with all of them. Not here: `attention_prep`, norms inside projections, flat
caches and dense MLPs; `minidsv bench --profile` times what a step launches.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench_cases import all_cases
from bench_inputs import FULL, TP8, Case, relative_error, tensors
from bench_peers import PeerTime, peer_time
from bench_timing import copies_for, graph_us
from minidsv.bench_timing import read_bandwidth
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
    """The error of `case`; raises AssertionError where it is wrong or the modes differ."""
    run = case.build(0)
    first = [t.clone() for t in tensors(run("off"))]
    for mode in PDL_MODES[1:]:
        for one, other in zip(first, tensors(run(mode)), strict=True):
            same = torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))
            assert same, f"{case.op} {case.shape}: {mode} differs from off"
    error = relative_error(first, tensors(run(None)))
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
        f"{row.dims:5}{row.op:26}{row.shape:22}{times}  {row.gb_per_s:8.0f}{share:6.0f} %"
        f"{row.us['off'] / row.us['prefetch']:7.2f}x{beside(row.peer)}"
    )


def beside(peer: PeerTime | None) -> str:
    return "" if peer is None else f"{peer.us:9.2f}{peer.ours_us / peer.us:6.2f}x {peer.name}"


def header() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    import triton

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"commit {commit.stdout.strip() or 'unknown'}, L2 cold"
    )


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


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dims", choices=sorted(DIMS), action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1, 8 and 64")
    parser.add_argument("--op", action="append", default=[], help="rows whose name has this")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries")
    parser.add_argument("--plot", metavar="FILE", help="write a roofline picture")
    parser.add_argument("--json", metavar="FILE", help="also write the JSON there")
    return parser.parse_args()


def main() -> int:
    args = options()
    if not torch.cuda.is_available():
        sys.exit("error: bench_kernels.py needs a CUDA device, and none is visible")
    peak = read_bandwidth(torch.device("cuda")) / 1e9
    rows, wrong = list[Row](), list[str]()
    print(f"{header()}, memory read at {peak:.0f} GB/s")
    modes = "  ".join(f"{mode:>8}" for mode in PDL_MODES)
    modes += "      GB/s  peak  off/prefetch  peer us  x peer"
    print(f"{'dims':5}{'op':26}{'shape':22}{modes}", flush=True)
    refusals = None if args.no_peers else set[str]()
    for name in args.dims or DIMS:
        for case in all_cases(DIMS[name], args.tokens or [1, 8, 64]):
            if args.op and not any(part in case.op for part in args.op):
                continue
            try:
                rows.append(measure(name, case, PDL_MODES, refusals))
                print(report(rows[-1], peak), flush=True)
            except AssertionError as error:
                wrong.append(f"{name} {error}")
                print(f"WRONG {wrong[-1]}", flush=True)
    result = {"header": header(), "read_gb_per_s": peak, "rows": [asdict(r) for r in rows]}
    if args.plot:
        plot(rows, peak, args.plot)
    text = json.dumps(result | {"wrong": wrong})
    if args.json:
        Path(args.json).write_text(text)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
