"""GPQA-style accuracy, and a gate that compares two engines item by item.

    python scripts/eval_gpqa.py                                  # 512 items for the bundled model
    python scripts/eval_gpqa.py --csv gpqa_diamond.csv --base-url http://host:8000 --chat
    python scripts/eval_gpqa.py parity --a transformers --b device=cpu

Exit status: 0 fine, 1 red (accuracy below --min-accuracy, or a parity limit passed), 2 a wrong
option, file or configuration, 3 requests failed (what is recorded stays; run again to go on).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from eval_backends import BackendError, HTTPOptions
from eval_items import Item, ItemError, Protocol, bundled_problems, make_items, read_gpqa
from eval_parity import LIMITS, Tier, compare, judge
from eval_records import Record, RecordFile
from eval_report import print_accuracy, print_parity, progress
from eval_run import Failures, Settings, TooManyErrors, run
from eval_sources import Source, common_tier, read_conf
from minidsv import __version__
from minidsv.errors import MinidsvError

HTTP_ONLY = ("model", "api_key", "chat", "concurrency", "retries", "timeout")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Csv = Annotated[Path | None, typer.Option(help="gpqa_*.csv; without it, the bundled questions")]
Limit = Annotated[int | None, typer.Option(min=1, help="ask only the first N questions")]
Repeats = Annotated[int, typer.Option(min=1, help="ask each question so often, options reordered")]
Seed = Annotated[int, typer.Option(min=0, help="of the bundled questions, and of sampling")]
Model = Annotated[str | None, typer.Option(help="the server's model; default: its first")]
ApiKey = Annotated[str | None, typer.Option(help="bearer key for the server")]
Concurrency = Annotated[int, typer.Option(min=1, help="requests at once to a server")]
Retries = Annotated[int, typer.Option(min=0, help="more tries of a request that failed")]
Timeout = Annotated[float, typer.Option(min=0.1, help="seconds for a request to a server")]


@app.callback(invoke_without_command=True)
def accuracy(
    context: typer.Context,
    csv: Csv = None,
    engine: Annotated[str, typer.Option(help="LLM's arguments, key=value,...")] = "",
    base_url: Annotated[
        str | None, typer.Option(help="an OpenAI-compatible server instead")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="default: generative for a CSV, else loglikelihood")
    ] = None,
    repeats: Repeats = 1,
    limit: Limit = None,
    seed: Seed = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="most to generate (generative)")] = 4096,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy (generative)")] = 0.0,
    records: Annotated[Path | None, typer.Option(help="JSONL to write, and to resume from")] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="below it red; default 0.99 for the bundled pair, else 0")
    ] = None,
    max_errors: Annotated[int, typer.Option(min=0, help="items that may fail, uncounted")] = 0,
    model: Model = None,
    api_key: ApiKey = None,
    chat: Annotated[bool, typer.Option("--chat", help="use /v1/chat/completions")] = False,
    concurrency: Concurrency = 16,
    retries: Retries = 4,
    timeout: Timeout = 1800.0,
) -> None:
    """Accuracy on GPQA, or on the bundled questions."""
    if context.invoked_subcommand is not None:
        return
    chosen: Protocol = protocol or ("loglikelihood" if csv is None else "generative")
    with _errors():
        if base_url is None:
            _refuse(context, HTTP_ONLY, "without --base-url")
        else:
            _refuse(context, ("engine",), "beside --base-url")
        source = read_conf(
            base_url or engine,
            HTTPOptions(model, api_key, chat, concurrency, retries, timeout),
        )
        settings = Settings(chosen, max_tokens, temperature, seed, max_errors=max_errors)
        if chosen == "loglikelihood":
            _refuse(context, ("max_tokens", "temperature"), "with --protocol loglikelihood")
            settings = replace(settings, max_tokens=1)
        items = load_items(csv, settings.protocol, repeats, limit, seed)
        done, failed = ask(source, items, settings, records, csv)
    bundled = csv is None and source.resolved.get("model", "a server's") is None
    more = {"conf": source.conf, "version": __version__, "last_error": failed.last}
    share = print_accuracy(list(done.values()), failed, settings.protocol, more)
    if failed.topics:
        raise typer.Exit(3)
    raise typer.Exit(share < (0.99 * bundled if min_accuracy is None else min_accuracy))


@app.command()
def parity(
    context: typer.Context,
    a: Annotated[str, typer.Option(help="the reference: CONF as below")],
    b: Annotated[str, typer.Option(help="what is compared with it")],
    csv: Csv = None,
    repeats: Repeats = 1,
    limit: Limit = None,
    seed: Seed = 0,
    tier: Annotated[
        Tier | None, typer.Option(help="how near B must be; default: what both dtypes allow")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="compared after each prompt, greedy")] = 8,
    out: Annotated[Path | None, typer.Option(help="JSONL, a line an item")] = None,
    model: Model = None,
    api_key: ApiKey = None,
    concurrency: Concurrency = 16,
    retries: Retries = 4,
    timeout: Timeout = 1800.0,
) -> None:
    """Run A and B over the same items; exit 1 if B is not as good, or not as near as it must be.

    CONF is key=value,... of LLM's arguments (device=cpu,kv_cache_dtype=bfloat16), the URL of a
    server, or `transformers` or transformers=FOLDER (Hugging Face's own model in float32). The same
    engine twice must give the same bits.
    """
    options = HTTPOptions(model, api_key, False, concurrency, retries, timeout)
    with _errors():
        sources = [read_conf(conf, options) for conf in (a, b)]
        if out is not None:
            out.touch()
        if all(source.precision for source in sources):
            _refuse(context, HTTP_ONLY, "without the URL of a server")
        chosen: Tier = tier or common_tier(*sources)
        settings = Settings("loglikelihood", tokens, seed=seed, ignore_eos=tokens > 1)
        items = load_items(csv, settings.protocol, repeats, limit, seed)
        runs = [ask(source, items, settings, None, csv)[0] for source in sources]
        pairs = [compare(runs[0][item.key], runs[1][item.key]) for item in items]
    verdict = judge(pairs, LIMITS[chosen])
    print_parity(pairs, verdict, chosen, LIMITS[chosen], {"a": a, "b": b, "version": __version__})
    if out is not None:
        out.write_text("".join(json.dumps(pair.as_line()) + "\n" for pair in pairs))
    raise typer.Exit(not verdict.green)


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raise ItemError if an option was given that would do nothing."""
    for name in names:
        source = context.get_parameter_source(name) if name in context.params else None
        if source is not None and source.name == "COMMANDLINE":
            raise ItemError(f"--{name.replace('_', '-')}: has no meaning {why}")


@contextmanager
def _errors() -> Iterator[None]:
    """Whatever goes wrong is one line and an exit status."""
    try:
        yield
    except (MinidsvError, ItemError, OSError) as error:
        _fail(str(error), 2)
    except (BackendError, TooManyErrors) as error:
        _fail(str(error), 3)


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(status)


def load_items(
    csv: Path | None, protocol: Protocol, repeats: int, limit: int | None, seed: int
) -> list[Item]:
    problems = bundled_problems(seed) if csv is None else read_gpqa(csv, protocol)
    return list(make_items(problems[:limit], repeats))


def ask(
    source: Source, items: list[Item], settings: Settings, path: Path | None, csv: Path | None
) -> tuple[dict[tuple[str, int], Record], Failures]:
    """Records of all items, from the file where it has them, and what failed."""
    questions = "bundled" if csv is None else sha256(csv.read_bytes()).hexdigest()
    header: dict[str, Any] = {"version": __version__, "questions": questions, **asdict(settings)}
    header["backend"] = source.resolved
    del header["max_errors"]  # changes no record
    wanted, failures = {item.key for item in items}, Failures([])
    with (
        progress(source.conf, len(items)) as advance,
        closing(RecordFile(path, header, advance)) as file,
    ):
        if wanted - file.records.keys():
            with closing(source.open()) as backend:
                failures = run(items, backend, settings, file)
    return {key: record for key, record in file.records.items() if key in wanted}, failures


if __name__ == "__main__":
    app()
