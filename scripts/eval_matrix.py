"""The accuracy matrix: the bundled model's eval over weights, caches, PDL and CUDA graphs.

    python scripts/eval_matrix.py --device cuda --records DIR --write docs/ACCURACY.md
    python scripts/eval_matrix.py --device cpu --backend torch --kv float32 --kv fp8 \
        --index float32 --pdl off --graph off

Every row is held to float32 on the CPU, item by item, by the gate of its dtypes (`eval_gpqa.py
parity`), and rows that differ in PDL and graphs only must give the same tokens: the column `tokens`
has - for the first of them. The first --index is every row's; each other one is tried in two: with
the first and the last weights and caches. With --records the same command goes on where it stopped,
on the same machine.

Exit status: 0 fine, 1 red, 2 a combination that cannot run here (nothing is run then), 3 failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from eval_backends import BackendError, HTTPOptions
from eval_gpqa import ask, load_items
from eval_items import Item, ItemError
from eval_parity import LIMITS, Tier, Verdict, compare, judge
from eval_records import Record
from eval_run import Settings, TooManyErrors
from eval_sources import Source, common_tier, read_conf
from minidsv import __version__
from minidsv.errors import MinidsvError

REFERENCE = "device=cpu,dtype=float32,kv_cache_dtype=float32,index_cache_dtype=float32,num_pages={}"
PAGES = 1024  # for 64 requests of at most 650 tokens
BEGIN, END = "<!-- begin: eval_matrix.py -->", "<!-- end: eval_matrix.py -->"
SETTINGS = Settings("loglikelihood", 8, ignore_eos=True)
HEADINGS = (
    "weights", "latent cache", "indexer cache", "PDL", "graph", "right", "lost, won", "p",
    "letters", "KL", "shift", "token shift", "tokens", "verdict",
)  # fmt: skip
WEIGHTS, KV, INDEX = ["none", "auto"], ["bfloat16", "fp8"], ["fp8", "bfloat16"]
SWITCHES = ["off", "on"]
Records = dict[tuple[str, int], Record]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Axes:
    """What a row is made of."""

    quantization: str  # of the bundled model, which is stored in FP8: auto keeps that
    kv: str
    index: str
    pdl: str
    graph: str

    def conf(self, device: str, dtype: str, backend: str) -> str:
        return (
            f"device={device},dtype={dtype},backend={backend},quantization={self.quantization},"
            f"kv_cache_dtype={self.kv},index_cache_dtype={self.index},pdl={self.pdl},"
            f"cuda_graph={self.graph},num_pages={PAGES}"
        )

    @property
    def file(self) -> str:
        """For its records."""
        return f"{self.quantization}-{self.kv}-{self.index}-pdl_{self.pdl}-graph_{self.graph}.jsonl"

    @property
    def numbers(self) -> tuple[str, str, str]:
        """What may change a token."""
        return self.quantization, self.kv, self.index


@dataclass(frozen=True)
class Row:
    """A combination, how near it is to the reference, and to the first one of its numbers."""

    axes: Axes
    weights: str
    tier: Tier
    verdict: Verdict
    differing: int | None  # items with other tokens than the first row of its numbers; None: it is

    @property
    def green(self) -> bool:
        return self.verdict.green and not self.differing

    def cells(self) -> tuple[str, ...]:
        a, v = self.axes, self.verdict
        same = {None: "-", 0: "same"}.get(self.differing, f"{self.differing} items differ")
        return (
            *(self.weights, a.kv, a.index, a.pdl, a.graph),
            f"{v.accuracy_b:.1%}",
            f"{v.lost}, {v.won}",
            f"{v.p_value:.2g}",
            f"{v.flips}",
            *(f"{x:.1e}" for x in (v.mean_kl, v.mean_shift, v.token_shift)),
            same,
            f"green ({self.tier})" if v.green else f"RED ({self.tier}): {'; '.join(v.reasons)}",
        )


def combinations(
    weights: Sequence[str],
    kv: Sequence[str],
    index: Sequence[str],
    pdl: Sequence[str],
    graph: Sequence[str],
) -> Iterator[Axes]:
    """All of the first index dtype, and the first and last weights and caches with each other."""
    for quantization, rows in product(weights, kv):
        for switches in product(pdl, graph):
            yield Axes(quantization, rows, index[0], *switches)
    for other in index[1:]:
        for end in (0, -1):
            yield Axes(weights[end], kv[end], other, pdl[-1], graph[-1])


def measure(
    axes: Sequence[Axes],
    sources: Sequence[Source],
    items: list[Item],
    truth: Source,
    folder: Path | None = None,
) -> Iterator[Row]:
    """Run the reference and each combination over the items; records are kept in `folder`."""

    def records(source: Source, file: str) -> Records:
        return ask(source, items, SETTINGS, None if folder is None else folder / file, None)[0]

    want = records(truth, "reference.jsonl")
    first: dict[tuple[str, str, str], Records] = {}
    for one, source in zip(axes, sources, strict=True):
        got = records(source, one.file)
        tier = common_tier(truth, source)
        verdict = judge([compare(want[item.key], got[item.key]) for item in items], LIMITS[tier])
        differing = None
        if (alike := first.setdefault(one.numbers, got)) is not got:
            differing = sum(alike[key].tokens != got[key].tokens for key in got)
        weights = "fp8" if one.quantization == "auto" else source.resolved["dtype"]
        yield Row(one, weights, tier, verdict, differing)


def markdown(rows: Sequence[Row], caption: str) -> str:
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *(row.cells() for row in rows)]
    return caption + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def replace_between(text: str, table: str) -> str:
    """The document with `table` between its markers; raises ItemError if it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ItemError(f"no pair of lines {BEGIN!r} and {END!r} to write between")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


def describe_machine(device: str) -> str:
    name = "the CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}, minidsv {__version__}"


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cuda",
    dtype: Annotated[str, typer.Option(help="compute dtype")] = "auto",
    backend: Annotated[str, typer.Option(help="operators")] = "triton",
    weights: Annotated[list[str], typer.Option(help="quantization: none, auto (FP8)")] = WEIGHTS,
    kv: Annotated[list[str], typer.Option(help="latent cache dtypes")] = KV,
    index: Annotated[list[str], typer.Option(help="indexer cache dtypes")] = INDEX,
    pdl: Annotated[list[str], typer.Option(help="off, on")] = SWITCHES,
    graph: Annotated[list[str], typer.Option(help="cuda_graph: off, on")] = SWITCHES,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N questions")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the questions")] = 0,
    records: Annotated[Path | None, typer.Option(help="folder to keep each run's items in")] = None,
    write: Annotated[Path | None, typer.Option(help="document whose marked table to write")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file to write")] = None,
) -> None:
    """Print the matrix as Markdown, and as JSON last."""
    try:
        axes = list(combinations(weights, kv, index, pdl, graph))
        truth = read_conf(REFERENCE.format(PAGES), HTTPOptions())
        sources = [read_conf(one.conf(device, dtype, backend), HTTPOptions()) for one in axes]
        document = "" if write is None else replace_between(write.read_text(), "")
        items = load_items(None, SETTINGS.protocol, 1, limit, seed)
        if records is not None:
            records.mkdir(parents=True, exist_ok=True)
        rows = list(measure(axes, sources, items, truth, records))
    except (MinidsvError, ItemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (BackendError, TooManyErrors) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None
    machine = describe_machine(sources[0].resolved["device"])
    table = markdown(rows, f"{machine}; {len(items)} items against float32 on the CPU.")
    result: dict[str, Any] = {
        "machine": machine,
        "items": len(items),
        "green": all(row.green for row in rows),
        "rows": [asdict(row) | {"green": row.green} for row in rows],
    }
    print(table)
    print(json.dumps(result))
    if write is not None:
        write.write_text(replace_between(document, table))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    raise typer.Exit(not result["green"])


if __name__ == "__main__":
    app()
