"""The command line. torch and transformers are imported by the commands alone."""

import functools
import inspect
import io
import sys
import time
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minidsv import __version__
from minidsv.bench_options import BenchOptions
from minidsv.engine_config import EngineConfig
from minidsv.errors import MinidsvError, RequestError
from minidsv.request import SamplingParams
from minidsv.server.options import ServerOptions

if TYPE_CHECKING:
    from minidsv.engine import Engine, StepOutput

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A miniature DeepSeek-V3.2 decode engine.",
)


def options_of(
    options_class: type, argument: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass; it gets them as dict `argument`."""
    options = fields(options_class)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            command(**{argument: {o.name: arguments.pop(o.name) for o in options}}, **arguments)

        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != argument]
        parameters += [_parameter(option) for option in options]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _parameter(option: "Field[Any]") -> inspect.Parameter:
    """A dataclass's field as the parameter from which typer makes an option."""
    choices, default = option.metadata["choices"], option.default
    # A switch that is off needs no word for off.
    flags = [f"--{option.name.replace('_', '-')}"] if default is False else []
    kind: Any = Literal[choices] if choices else option.type
    if kind == tuple[str, ...]:
        kind = list[str]
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*flags, help=option.metadata["help"])],
    )


engine_options = options_of(EngineConfig, "engine")
server_options = options_of(ServerOptions, "server")
bench_options = options_of(BenchOptions, "bench")


@app.command()
@engine_options
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads standard input")],
    *,
    engine: dict[str, Any],
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="keep the smallest set with this probability")] = 1.0,
    top_k: Annotated[int, typer.Option(help="keep this many tokens; 0: all")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before it; repeatable")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on past EOS")] = False,
    min_tokens: Annotated[int, typer.Option(help="do not end before so many tokens")] = 0,
) -> None:
    """Continue PROMPT, streaming to standard output; figures go to standard error."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or None,
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
    )
    from minidsv.llm import LLM

    llm = LLM(**engine)
    print(f"[{llm.engine.runner.describe()}]", file=sys.stderr)
    limit_threads(llm.engine)
    times = [time.perf_counter()]

    def on_output(output: "StepOutput") -> None:
        times.append(time.perf_counter())
        print(output.text, end="", flush=True)

    text = _standard_input() if prompt == "-" else prompt
    result = llm.generate(text, params, on_output)[0]
    print()
    first, total, count = times[1] - times[0], times[-1] - times[0], len(times) - 1
    rate = f", then {(count - 1) / (total - first):.1f} tokens/s" if count > 1 else ""
    print(
        f"[{len(result.prompt_token_ids)} prompt tokens, {count} generated "
        f"({result.outputs[0].finish_reason}); first after {first:.3f} s{rate}]",
        file=sys.stderr,
    )


def limit_threads(engine: "Engine") -> None:
    """`minidsv.threads.limit_threads` for an engine."""
    from minidsv import threads

    threads.limit_threads(engine.config.device, engine.runner.weight_bytes)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError("prompt", f"standard input is not UTF-8: {error}") from None


@app.command()
@engine_options
@server_options
def serve(*, engine: dict[str, Any], server: dict[str, Any]) -> None:
    """Serve the model over HTTP: /generate, /v1/completions, /health, /metrics and more."""
    config, options = EngineConfig(**engine), ServerOptions(**server)
    from minidsv.engine import Engine
    from minidsv.server.process import serve as serve_until_signal

    def load() -> Engine:
        loaded = Engine(config)
        limit_threads(loaded)
        return loaded

    raise typer.Exit(serve_until_signal(load, options))


@app.command("bench")
@engine_options
@bench_options
def bench_command(*, engine: dict[str, Any], bench: dict[str, Any]) -> None:
    """Time decode steps against the memory's floor, with and without graph and PDL."""
    config, options = EngineConfig(**engine), BenchOptions(**bench)
    from minidsv.bench import run

    raise typer.Exit(run(config, options))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="a checkpoint folder or a config.json")],
    batch: Annotated[int, typer.Option(min=1, help="requests in the decode step")] = 1,
    context: Annotated[int, typer.Option(min=1, help="tokens of context")] = 4096,
    gpu: Annotated[str, typer.Option(help="A100, H100, H200 or B200")] = "H100",
    weights: Annotated[Literal["fp8", "bf16"], typer.Option(help="weights' format")] = "fp8",
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "fp8", "fp8_flat"],
        typer.Option(help="latent cache; auto: fp8 where the model has such rows"),
    ] = "auto",
    index_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "fp8"], typer.Option(help="indexer cache")
    ] = "auto",
) -> None:
    """Show a model's dimensions, its cache bytes a token, and the roofline of a decode step."""
    from rich.console import Console

    from minidsv.inspect_checkpoint import show

    show(
        path,
        batch=batch,
        context=context,
        gpu=gpu,
        weights=weights,
        kv_cache_dtype=kv_cache_dtype,
        index_cache_dtype=index_cache_dtype,
        console=Console(),
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line."""
    run_app(app)


def run_app(application: typer.Typer) -> None:
    """Run and exit; bad input ends with one line on standard error and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text need not fit the terminal
    try:
        sys.exit(application(standalone_mode=False))
    except MinidsvError as error:
        message = str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # typer's ClickException, which it does not export
    if message:  # it is empty where typer has shown the help instead
        print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
