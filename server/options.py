"""ServerOptions: every option of `minidsv serve` beside the engine's. No torch in here."""

from dataclasses import dataclass, field, fields
from typing import Any

from minidsv.errors import ConfigError


def _option(default: Any, help: str, *choices: str, least: float = 0, most: float = 1e12) -> Any:
    metadata = {"help": help, "choices": choices, "range": (least, most)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves around the engine. Raises ConfigError on bad values."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on; 0: any free one", most=65535)
    served_model_name: str | None = _option(None, "the model's name (default: its folder's)")
    api_key: tuple[str, ...] = _option((), "accepted bearer key; repeatable; none: no key needed")
    api_key_file: str | None = _option(None, "file of accepted bearer keys, one a line")
    open_metrics: bool = _option(False, "let /metrics be read without a key")
    max_queued_requests: int = _option(256, "most requests that wait; more get 503", least=1)
    max_queued_tokens: int = _option(2**18, "most prompt tokens that wait; more get 503", least=1)
    max_body_bytes: int = _option(2**24, "longest request body; longer get 413", least=1)
    max_body_seconds: float = _option(
        60.0, "longest wait for a request's body; then 408", least=1e-3
    )
    request_timeout: float = _option(0.0, "seconds for a request, its wait included; 0: no limit")
    drain_seconds: float = _option(30.0, "seconds that requests may go on at SIGTERM or Ctrl-C")
    stall_seconds: float = _option(120.0, "an engine step this long flips /health", least=1e-3)
    status_seconds: float = _option(10.0, "seconds between status lines under load; 0: none")
    log_level: str = _option(
        "info", "least severe message to log", "debug", "info", "warning", "error"
    )
    log_json: bool = _option(False, "log one JSON object a line")

    def __post_init__(self) -> None:
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{option.name}: {value!r} is not one of {list(choices)}")
            if isinstance(option.default, int | float) and not isinstance(option.default, bool):
                least, most = option.metadata["range"]
                number = isinstance(value, type(option.default) | int)
                if not number or isinstance(value, bool) or not least <= value <= most:
                    kind = "an integer" if isinstance(option.default, int) else "a number"
                    raise ConfigError(
                        f"{option.name}: {value!r} is not {kind} from {least:g} to {most:g}"
                    )
        if self.served_model_name == "":
            raise ConfigError("served_model_name: '' is no name; give at least one character")
