"""Answer a file of completion requests, offline; what is done survives any interruption.

    python scripts/batch_generate.py --input in.jsonl --output out.jsonl

INPUT has a request a line: OpenAI batch lines (custom_id, method, url, body) of /v1/completions or
/v1/chat/completions, or plain bodies of the former, {"prompt": ..., "max_tokens": ...}, with or
without a custom_id (without one, line 17 is "line-17"). OUTPUT gets OpenAI's result lines, each as
soon as it is finished. Files that end in .gz or .zst are compressed; - is standard input or output,
the latter without resuming.

The same command again goes on where a run was interrupted or killed: it skips what OUTPUT has, cuts
off a torn end, and tries failed lines anew. OUTPUT.run.json keeps the options that results depend
on; other options, or a changed line under an answered custom_id, are refused. ERRORS is written
anew by each run: the lines that it has not answered, with their numbers and why.

Exit codes: 0 every line is answered, 1 some are in ERRORS or the run broke off, 2 bad usage, 130
interrupted. The first
SIGINT or SIGTERM reads no further and finishes what is in flight, the second one stops at once.
The last line on standard error is a summary in JSON.
"""

import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from batch_codec import BatchError
from batch_journal import Journal, check_options, options_hash
from batch_lines import Source
from batch_report import Reporter, program
from batch_run import Backend, Batch, Stop, summarise
from minidsv import __version__
from minidsv.cli import engine_options, limit_threads, run_app
from minidsv.engine_config import EngineConfig, model_path

SCHEDULING = ("max_num_seqs", "max_num_batched_tokens", "num_pages")  # change no result
WINDOW = 2  # lines in flight, times what runs at once: as much again waits
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__.partition("\n\n")[2])
@engine_options
def batch_generate(
    *,
    engine: dict[str, Any],
    source: Annotated[str, typer.Option("--input", help="JSONL file, or -")],
    output: Annotated[str, typer.Option(help="file for the results, or -")],
    errors: Annotated[str | None, typer.Option(help="default: OUTPUT.errors.jsonl")] = None,
    summary: Annotated[Path | None, typer.Option(help="file for the summary as well")] = None,
    order: Annotated[
        Literal["completion", "input"], typer.Option(help="of the lines that this run writes")
    ] = "completion",
    window: Annotated[int | None, typer.Option(min=1, help="lines in flight; 2x what runs")] = None,
    sync_lines: Annotated[int, typer.Option(min=1, help="fsync every so many lines")] = 64,
    sync_seconds: Annotated[float, typer.Option(min=0, help="or so many seconds")] = 1.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
    served_model_name: Annotated[str | None, typer.Option(help="default: its folder's")] = None,
    base_url: Annotated[str | None, typer.Option(help="an OpenAI-compatible server's")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="requests at once; 16")] = None,
    retries: Annotated[int | None, typer.Option(min=0, help="of one request; 4")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="of an answer, in s; 600")] = None,
) -> None:
    start = time.monotonic()
    asked = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    server: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    _check_options(engine, base_url, server, served_model_name)
    errors = _errors_path(source, output, errors, summary)
    if summary is not None:
        _touch(summary)
    lines = Source(source)
    stop = Stop()
    with (
        Journal(output, sync_lines, sync_seconds) as results,
        Journal(errors, sync_lines, sync_seconds) as failures,
        stop.listening(),
    ):
        _check_apart(lines, results, failures)
        if base_url is not None:
            server |= {"base_url": base_url, "api_key": api_key}
            backend, options, at_once = _http(engine, server)
        else:
            backend, options, at_once = _local(engine, served_model_name)
        if results.durable:
            check_options(output, options, fresh=not results.size)
        window, in_order = window or WINDOW * at_once, order == "input"
        batch = Batch(lines, backend, results, failures, window, engine["seed"], in_order)
        try:
            with Reporter(lines.size, quiet) as reporter:
                batch.run(reporter, stop)
        except KeyboardInterrupt:  # asked twice
            pass
        finally:
            backend.close()
    figures = summarise(batch.tally, backend.figures(), start) | program()
    figures |= {"config_hash": options_hash(options), "interrupted": stop.asked}
    text = json.dumps(figures)
    if summary is not None:
        summary.write_text(text + "\n")
    print(text, file=sys.stderr)
    raise typer.Exit(INTERRUPTED if stop.asked else int(batch.tally.failed > 0))


def _check_options(
    engine: dict[str, Any], base_url: str | None, server: dict[str, Any], name: str | None
) -> None:
    """Refuse options that would do nothing."""
    if base_url is None:
        for option in server:
            raise BatchError(f"--{option}: is for a server; give --base-url as well")
        return
    defaults = {option.name: option.default for option in fields(EngineConfig)}
    given = [option for option in engine if engine[option] != defaults[option]]
    if name is not None:
        given.append("served_model_name")
    for option in set(given) - {"model", "seed"}:
        raise BatchError(f"--{option.replace('_', '-')}: is the server's, not for --base-url")


def _errors_path(source: str, output: str, errors: str | None, summary: Path | None) -> str:
    """Where failed lines go; all files must differ."""
    if errors is None and output == "-":
        raise BatchError("--errors: name a file, as the results go to standard output")
    errors = errors or f"{output}.errors.jsonl"
    if errors == "-":
        raise BatchError("--errors: - is not a file")
    paths = [path for path in (source, output, errors, summary) if path not in ("-", None)]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise BatchError("--input, --output, --errors and --summary must be different files")
    return errors


def _check_apart(*files: Source | Journal) -> None:
    """Refuse one file under several names: writing the one would destroy the other."""
    known = [file.identity for file in files if file.identity]
    if len(set(known)) < len(known):
        raise BatchError("--input, --output and --errors are one file under several names")


def _touch(summary: Path) -> None:
    """Find out before the work whether the summary can be written."""
    try:
        summary.touch()
    except OSError as error:
        raise BatchError(f"--summary: {summary}: {error.strerror}") from None


def _local(engine: dict[str, Any], name: str | None) -> tuple[Backend, dict[str, Any], int]:
    """An engine, what results depend on, and how many requests run at once."""
    from batch_local import LocalBackend, fingerprint
    from minidsv import LLM

    llm = LLM(**engine)
    print(f"[{llm.engine.runner.describe()}]", file=sys.stderr)
    limit_threads(llm.engine)
    config = llm.engine.config
    folder = model_path(config).resolve()
    name = name or folder.name
    options = {k: v for k, v in asdict(config).items() if k not in ("model", *SCHEDULING)}
    options |= {"model_files": fingerprint(folder), "served_model_name": name}
    options["version"] = __version__
    return LocalBackend(llm, name), options, config.max_num_seqs


def _http(engine: dict[str, Any], server: dict[str, Any]) -> tuple[Backend, dict[str, Any], int]:
    """The same of a server."""
    try:
        from batch_http import Endpoint, HttpBackend
    except ImportError:
        raise BatchError("--base-url: needs httpx: pip install 'minidsv[batch]'") from None
    endpoint = Endpoint(model=engine["model"], **server)
    options = {"base_url": endpoint.base_url, "model": endpoint.model, "seed": engine["seed"]}
    return HttpBackend(endpoint), options | {"version": __version__}, endpoint.concurrency


if __name__ == "__main__":
    try:
        run_app(app)
    except typer.Abort:  # interrupted twice before the first line
        sys.exit(INTERRUPTED)
    except OSError as broken:  # the disk is full, the pipe is closed
        sys.exit(f"error: {broken}")
