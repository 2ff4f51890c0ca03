"""`minidsv bench`: measures on one device in one process; the last line of its output is JSON."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidsv.bench_options import BenchOptions
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError


class Result(NamedTuple):
    """What a subject's `run(config, options)`, in its file `bench_<subject>.py`, gives back."""

    device: str
    data: dict[str, Any]  # for the JSON
    is_sound: bool  # nothing was found that must not be


def run(config: EngineConfig, options: BenchOptions) -> int:
    """Measure, print, write the JSON; the exit status. Raises MinidsvError on bad input."""
    options.check_engine(config)
    for name, file in (("json", options.json), ("plot", options.plot)):
        if file is not None:
            check_file(name, file)
    subject = import_module(f"minidsv.bench_{options.subject}")
    result: Result = subject.run(config, options)
    text = json.dumps({"kind": options.subject, **provenance(result.device), **result.data})
    print(text)
    if options.json is not None:
        Path(options.json).write_text(text + "\n")
    return 0 if result.is_sound else 1


def provenance(device: str) -> dict[str, str | None]:
    """On what, by what and when a result was measured."""
    on_cpu = device == "cpu"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": f"{platform.machine()} CPU" if on_cpu else torch.cuda.get_device_name(device),
        "driver": None if on_cpu else _first_line(*driver),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else None,
        "commit": _first_line("git", "describe", "--always", "--dirty"),
        "command": " ".join(["minidsv", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def check_file(option: str, file: str) -> None:
    """Whether the file of an option can be written, before anything is measured: or ConfigError."""
    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {file} is not in a folder that exists")
    if not file or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: {file!r} is no file that can be written")


def shown(value: float | None, spec: str) -> str:
    """A number as a table has it; None is a dash."""
    return "-" if value is None else format(value, spec)


def _first_line(*command: str) -> str | None:
    """Of what a command prints; None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None
