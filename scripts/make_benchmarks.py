"""docs/BENCHMARKS.md and the README's table, from the runs in docs/results/.

    python scripts/make_benchmarks.py            # write both
    python scripts/make_benchmarks.py --check    # exit status 1 if they are not what this writes

A result is a line of JSON in a file NAME.json, of `minidsv bench`, scripts/bench_kernels.py or
scripts/bench_serving.py; NAME.png beside it is shown with it. Files come in the order of their
names.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin: make_benchmarks.py -->", "<!-- end: make_benchmarks.py -->"
INTRO = """\
# Benchmarks

Made by `scripts/make_benchmarks.py` from the runs in `docs/results/`; do not edit. `minidsv bench`,
`scripts/bench_kernels.py` and `scripts/bench_serving.py` say how they measure in the files'
docstrings (`minidsv/bench_table.py`, `minidsv/bench_rig.py`). Times are medians; *floor* is
compulsory bytes over the bandwidth that was measured in the same run, MBU its share of the step's
time, and a layer's numbers are the difference between models of two layer counts over the layers
between (noise for `eager`, whose pace the host sets). *Saved a launch* is what a variant takes less
than `graph`, over the launches of a step, in us; *x graph*: how many times as fast as that it is.
*x peer* is our time over that of another library's kernel, of several the fastest, the two
replayed in turn on the same inputs (`scripts/bench_peers.py`); `-` where none does the same, or
ran.
"""
NOTHING = "Nothing was measured on a GPU yet: `docs/results/` holds no run."
Result = dict[str, Any]


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def steps_table(result: Result) -> str:
    """A row a variant, batch and context."""
    headings = "batch, context, variant, tokens/s, us a step, floor, MBU, us a layer, floor"
    headings += ", saved a launch, x graph, experts"
    rows = [
        [
            row["batch"], row["context"], row["variant"], number(row["tokens_per_s"]),
            number(row["us"]), number(row["floor_us"]), percent(row["mbu"]),
            number(row["us_layer"]), number(row["floor_us_layer"]),
            number(row["saved_us_launch"], 2), number(row["over_graph"], 3),
            number(row["distinct_experts"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    text = f"Memory read at {number(result['bandwidth'] / 1e9, 0)} GB/s; "
    text += f"{' and '.join(map(str, result['layers']))} layers; {result['replays']} replays; "
    differ = result["difference"]
    text += "all variants decode the same, bit by bit." if differ is None else f"**{differ}**."
    return f"{text}\n\n{table(headings.split(', '), rows)}"


def wall_table(result: Result) -> str:
    """The whole engine."""
    rows = [
        [row["batch"], row["context"], number(row["prefill_ms"]), number(row["us"]),
         number(row["tokens_per_s"]), number(row["graph_us"]), percent(row["beside_graph"])]
        for row in result["rows"]
    ]  # fmt: skip
    headings = "batch, prompt, prefill ms, us a decode step, tokens/s, us its graph, beside it"
    return table(headings.split(", "), rows)


def serving_table(result: Result) -> str:
    """A row a number of streams, then what the server counted."""
    rows = [
        [row["concurrency"], number(row["replay_us"]), percent(row["idle_share"]),
         number(row["generate_us"]), number(row["itl_us"]),
         number(row["replay_us"] and row["itl_us"] / row["replay_us"], 3),
         number(row["tokens_per_s"]), row["different"]]
        for row in result["results"]
    ]  # fmt: skip
    headings = "streams, us a replay, device idle between, us a step of generate, us between tokens"
    headings += ", over replay, tokens/s, answers that differ from generate's"
    steps, replays = (
        number(result["metrics"][f"{name}_steps_total"], 0) for name in ("decode", "cuda_graph")
    )
    return f"{table(headings.split(', '), rows)}\n\n{replays} of {steps} decode steps by a graph."


def graph_table(result: Result) -> str:
    """A row a graph, then what stands out of the chains."""
    headings = "batch, contexts up to, nodes, kernels, external, edges, programmatic"
    rows, notes = [], []
    for graph in result["graphs"]:
        external, others = sum(graph["external"].values()), sum(graph["others"].values())
        rows.append(
            [graph["batch"], graph["bound"], graph["nodes"], graph["nodes"] - others, external,
             graph["edges"], graph["programmatic"],
             ", ".join(f"{n} {kind}" for kind, n in graph["launches_of_a_layer"].items())]
        )  # fmt: skip
        where = f"batch {graph['batch']}, contexts up to {graph['bound']}"
        notes += [f"- {where}: {n} x full, {why}" for why, n in graph["full_edges"].items()]
        notes += [f"- {where}: {n} x {name}, unproved" for name, n in graph["external"].items()]
    proofs = f"{result['binaries']} binaries ran, of which {len(result['findings'])} failed the "
    text = [table([*headings.split(", "), "launches of a layer"], rows), proofs + "check."]
    return "\n\n".join([*text, "\n".join(notes)] if notes else text)


def profile_table(result: Result) -> str:
    """A table a batch and context."""
    headings = ["kernel", "calls", "us", "MB", "of peak", "share"]
    parts = []
    for name, rows in result["profiles"].items():
        cells = [
            [row["kernel"], number(row["calls"]), number(row["us"]),
             number(None if row["nbytes"] is None else row["nbytes"] / 1e6, 2),
             percent(row["of_peak"]), percent(row["share"])]
            for row in rows
        ]  # fmt: skip
        parts.append(f"### {name}, {result['variant']}\n\n{table(headings, cells)}")
    return "\n\n".join(parts)


def kernels_table(result: Result) -> str:
    """scripts/bench_kernels.py's rows, with their peers if one ran; wrong ones by name."""
    peak = result["read_gb_per_s"]
    modes = list(result["rows"][0]["us"]) if result["rows"] else []
    headings = ["dims", "op", "shape", *modes, "GB/s", "of peak"]
    with_peers = any(row.get("peer") for row in result["rows"])
    rows = []
    for row in result["rows"]:
        speed = row["nbytes"] / row["us"][modes[-1]] / 1e3
        cells = [row["dims"], row["op"], row["shape"], *(number(row["us"][m], 2) for m in modes),
                 number(speed, 0), percent(speed / peak)]  # fmt: skip
        rows.append(cells + (peer_cells(row.get("peer")) if with_peers else []))
    text = f"Memory read at {number(peak, 0)} GB/s.\n\n"
    text += table(headings + (["peer", "its us", "x peer"] if with_peers else []), rows)
    return "\n\n".join([text, *(f"**wrong:** {wrong}" for wrong in result["wrong"])])


def peer_cells(peer: dict[str, Any] | None) -> list[str]:
    if peer is None:
        return ["-"] * 3
    return [peer["name"], number(peer["us"], 2), f"{peer['ours_us'] / peer['us']:.2f}"]


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "table": ("decode steps", steps_table),
    "wall": ("the whole engine", wall_table),
    "serving": ("the server", serving_table),
    "graph": ("the captured graph", graph_table),
    "profile": ("kernels of a decode step", profile_table),
    "kernels": ("operators alone", kernels_table),
}


def read_results(folder: Path) -> list[tuple[Path, Result]]:
    """Every line of every file; a line that is no result is a ValueError that names it."""
    results = []
    for file in sorted(folder.glob("*.json"), key=in_order):
        for at, text in enumerate(file.read_text().splitlines(), 1):
            try:
                result = json.loads(text)
                TABLES[result["kind"]][1](result)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}:{at}: not a result ({error!r})") from None
            results.append((file, result))
    return results


def in_order(file: Path) -> list[str | int]:
    """The name with its numbers as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.stem)]


def benchmarks(results: Sequence[tuple[Path, Result]]) -> str:
    """docs/BENCHMARKS.md."""
    sections = [section(file, result) for file, result in results]
    return "\n".join([INTRO, *(sections or [NOTHING + "\n"])])


def section(file: Path, result: Result) -> str:
    """One run."""
    title, make = TABLES[result["kind"]]
    fp8 = result.get("engine", {}).get("activations") == "fp8"
    title += " with FP8 activations" if fp8 else ""
    subject = file.stem if result["kind"] == "kernels" else result["model"]
    picture = file.with_suffix(".png")
    shown = f"\n![{title}](results/{picture.name})\n" if picture.exists() else ""
    return f"## {subject}: {title}\n\n{provenance(result)}\n\n{make(result)}\n{shown}"


def provenance(result: Result) -> str:
    """Where and when a run was made, as far as it says, and its command."""
    driver = "" if result["driver"] is None else f", driver {result['driver']}"
    date = "" if result["date"] is None else f", {result['date']}"
    return (
        f"{result['device']}{driver}, torch {result['torch']}, triton {result['triton']}, commit "
        f"{result['commit']}{date}: `{result['command']}`"
    )


def readme_table(results: Sequence[tuple[Path, Result]]) -> str:
    """The last variant of every batch and context of the runs of decode steps."""
    headings = "model, batch, context, variant, tokens/s, us a step, us a layer, floor, MBU"
    rows = []
    for _, result in results:
        if result["kind"] != "table" or result["difference"] is not None:
            continue
        last = {(row["batch"], row["context"]): row for row in result["rows"]}
        rows += [
            [Path(result["model"]).stem, batch, context, row["variant"],
             number(row["tokens_per_s"]), number(row["us"]), number(row["us_layer"]),
             number(row["floor_us_layer"]), percent(row["mbu"])]
            for (batch, context), row in last.items()
        ]  # fmt: skip
    if not rows:
        return NOTHING
    return table(headings.split(", "), rows)


def with_table(readme: str, text: str) -> str:
    """The README with `text` between its two markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has not both of {BEGIN} and {END}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def generate(root: Path) -> dict[Path, str]:
    """The files, and what is to be in them."""
    results, readme = read_results(root / "docs" / "results"), root / "README.md"
    return {
        root / "docs" / "BENCHMARKS.md": benchmarks(results),
        readme: with_table(readme.read_text(), readme_table(results)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = {
        path: text
        for path, text in generate(ROOT).items()
        if not path.exists() or path.read_text() != text
    }
    for path, text in stale.items():
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)} {'is stale' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
