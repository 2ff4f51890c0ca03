"""`minidsv bench --profile`: what each kernel of a step takes, and how near it comes to the memory.

Without PDL by default: with it a kernel that waits for the one before runs already, so that times
overlap and their sum is more than the step. On the CPU the rows are PyTorch's operators.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minidsv.bench import Result, shown
from minidsv.bench_bytes import LaunchBytes
from minidsv.bench_decode import distinct_experts, start
from minidsv.bench_nodes import short_name
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import WARMUP, Rig
from minidsv.bench_timing import read_bandwidth
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError

SHOWN = 12  # kernels with a colour of their own
HEADING = f"{'calls':>7} {'us':>10} {'MB':>10} {'% of peak':>9} {'share':>7}  kernel"


@dataclass(frozen=True)
class KernelRow:
    """One kernel in one step."""

    kernel: str
    calls: float
    us: float
    nbytes: float | None  # compulsory; None: not known
    of_peak: float | None  # bytes/s over the measured bandwidth
    share: float  # of the step's kernel time


def aggregate(
    events: Iterable[tuple[str, float]], steps: int, nbytes: Mapping[str, float], bandwidth: float
) -> list[KernelRow]:
    """Rows, the longest first, of (kernel, microseconds) of `steps` steps; bytes are a step's."""
    times = defaultdict[str, list[float]](list)
    for name, us in events:
        times[short_name(name)].append(us)
    total = sum(map(sum, times.values()))
    rows = []
    for name, all_us in times.items():
        us, known = sum(all_us) / steps, nbytes.get(name)
        of_peak = None if known is None else known / (us * 1e-6) / bandwidth
        rows.append(KernelRow(name, len(all_us) / steps, us, known, of_peak, us * steps / total))
    return sorted(rows, key=lambda row: -row.us)


def line(row: KernelRow) -> str:
    megabytes = None if row.nbytes is None else row.nbytes / 1e6
    return (
        f"{row.calls:7.1f} {row.us:10,.1f} {shown(megabytes, ',.2f'):>10} "
        f"{shown(row.of_peak, '.1%'):>9} {row.share:7.1%}  "
        f"{row.kernel}"
    )


def run(config: EngineConfig, options: BenchOptions) -> Result:
    """Profile one variant at every batch and context."""
    if options.plot is not None:
        check_picture(options.plot)
    rig = Rig.build(config, options)
    (variant,) = rig.variants
    bandwidth = read_bandwidth(rig.device)
    print(f"{rig.describe()}; memory read at {bandwidth / 1e9:,.0f} GB/s", flush=True)
    profiles: dict[str, list[KernelRow]] = {}
    for batch in options.batches:
        for context in options.contexts:
            rows = profile_step(rig, variant, batch, context, bandwidth)
            profiles[f"batch {batch}, context {context}"] = rows
            total = sum(row.us for row in rows)
            print(f"batch {batch}, context {context}, {variant}: {total:,.1f} us of kernels")
            print("\n".join([HEADING, *map(line, rows)]), flush=True)
    if options.plot is not None:
        plot(profiles, options.plot)
    data = {name: [asdict(row) for row in rows] for name, rows in profiles.items()}
    setting = rig.setting() | {"variant": variant, "bandwidth": bandwidth}
    return Result(rig.config.device, setting | {"profiles": data}, True)


def check_picture(file: str) -> None:
    """Whether a plot can be drawn and saved so, before anything is measured: or ConfigError."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plot: needs the package matplotlib (pip install 'minidsv[bench]')")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(file).suffix[1:].lower() not in known:
        raise ConfigError(f"plot: {file!r} ends in none of {known}")


def profile_step(
    rig: Rig, variant: str, batch: int, context: int, bandwidth: float
) -> list[KernelRow]:
    """The same step again and again, so that nothing but it is profiled."""
    layers = rig.model.num_hidden_layers
    model = rig.build_model(variant, layers)
    experts = distinct_experts(
        rig.build_model(variant, layers), rig.first_step(batch, context), batch, steps=1
    )
    observer = LaunchBytes(
        rig.model, rig.weights, rig.cache, batch=batch, context=context, experts=experts
    )
    if model.pdl is not None:
        from minidsv.kernels.launch import observed_launches

        with observed_launches(observer):
            model.greedy(rig.first_step(batch, context))
    run_step = start(rig, variant, layers, batch, context).run
    events = profiled(run_step, rig.steps - WARMUP, rig.device)
    return aggregate(events, rig.steps - WARMUP, observer.by_kernel, bandwidth)


def profiled(
    run_step: Callable[[], object], steps: int, device: torch.device
) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel of `steps` steps, on the CPU of every operator."""
    on_cuda = device.type == "cuda"
    for _ in range(WARMUP):
        run_step()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            run_step()
        if on_cuda:
            torch.cuda.synchronize(device)
    if on_cuda:
        return [
            (event.name, event.time_range.elapsed_us())
            for event in found.events()
            if event.device_type == DeviceType.CUDA
        ]
    return [
        (event.name, event.self_cpu_time_total)
        for event in found.events()
        if event.name.startswith("aten::")
    ]


def plot(profiles: Mapping[str, Sequence[KernelRow]], path: str) -> None:
    """A stacked bar a profile, each to its own scale: the microseconds of the longest kernels, and
    of all others."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import colormaps, pyplot

    total: dict[str, float] = defaultdict(float)
    for rows in profiles.values():
        for row in rows:
            total[row.kernel] += row.us
    names = [*sorted(total, key=lambda name: -total[name])[:SHOWN], "others"]
    size = 2 + 2.2 * len(profiles), 6
    figure, axes = pyplot.subplots(
        1, len(profiles), squeeze=False, figsize=size, layout="constrained"
    )
    for (title, rows), bar in zip(profiles.items(), axes[0], strict=True):
        bottom = 0.0
        for index, name in enumerate(names):
            us = sum(r.us for r in rows if (r.kernel if r.kernel in names else "others") == name)
            label = name.strip("_").removesuffix("_kernel")  # matplotlib hides what starts with _
            bar.bar(0, us, bottom=bottom, color=colormaps["tab20"](index), label=label)
            bottom += us
        bar.set(title=title.replace(", ", "\n"), xticks=[])
    axes[0][0].set(ylabel="us of a decode step")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
