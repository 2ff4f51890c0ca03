"""ServerOptions: every option of `minidsv serve` beside the engine's. No torch in here."""

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": ()})


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves around the engine."""

    served_model_name: str | None = _option(None, "the model's name (default: its folder's)")
