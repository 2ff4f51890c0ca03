"""Errors that minidsv raises at its users; each names the field, its value, what is accepted."""


class MinidsvError(ValueError):
    """Base class: bad input, never a bug of the engine."""


class ConfigError(MinidsvError):
    """A `config.json` or an engine option that cannot be served."""


class CheckpointError(MinidsvError):
    """A checkpoint whose files, names, shapes or dtypes are not what the config asks for."""


class RequestError(MinidsvError):
    """A prompt or a sampling parameter that cannot be served; `param` is the offending field."""

    def __init__(self, param: str, message: str):
        super().__init__(f"{param}: {message}")
        self.param = param
