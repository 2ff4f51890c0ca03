"""Typed access to the fields of a `config.json`; every refusal names the field and its value."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from minidsv.errors import ConfigError


class Fields:
    """A JSON object. A field that is absent or null takes its default, or is missing."""

    def __init__(self, raw: Any, name: str = "config.json"):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{name}: {reprlib.repr(raw)} is not a JSON object")
        self.raw = raw

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: {_show(value)} is not an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1e30:
            raise ConfigError(f"{name}: {_show(value)} is not a positive number")
        return float(value)

    def number_or_zero(self, name: str) -> float:
        """A positive number; absent, null and 0 mean 0."""
        return self.number(name) if self.raw.get(name) not in (None, 0) else 0.0

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: {_show(value)} is not true or false")
        return value

    def object(self, name: str) -> "Fields":
        """A nested object; empty if absent."""
        return Fields(self._value(name, {}), name)

    def strings(self, name: str) -> list[str]:
        value = self._value(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name}: {_show(value)} is not a list of strings")
        return value

    def choice(self, name: str, accepted: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(name, default)
        if value not in accepted:
            raise ConfigError(f"{name}: {_show(value)} is not supported; accepted: {accepted}")
        return str(value)

    def fixed(self, name: str, accepted: Any) -> None:
        """A field that, if given, must have one value."""
        if self.has(name) and self.raw[name] != accepted:
            raise ConfigError(
                f"{name}: {_show(self.raw[name])} is not supported; accepted: {accepted!r}"
            )

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Null, one token id, or a list of them."""
        value = self._value(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ConfigError(f"{name}: {_show(value)} is not a token id or a list of them")
        return tuple(ids)

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default is None:
            raise ConfigError(f"{name}: missing from config.json")
        return default if value is None else value


def _show(value: Any) -> str:
    return "nan" if isinstance(value, float) and math.isnan(value) else reprlib.repr(value)
