"""Logs: a line for each call, a status line under load, as text or as JSON."""

import asyncio
import json
import logging
import math
import sys
import time
from typing import Any

from minidsv.server.exchange import Exchange
from minidsv.server.options import ServerOptions
from minidsv.server.serving import Serving

logger = logging.getLogger(__name__)


class TextFormatter(logging.Formatter):
    """`time level message key=value ...`; the pairs come from the record's `fields`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = [f"{name}={value}" for name, value in _fields(record).items()]
        return " ".join([super().formatMessage(record), *pairs])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (seconds), level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def setup(options: ServerOptions) -> None:
    """Send every log of the process to standard error; for the process that serves, not for
    tests."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if options.log_json else TextFormatter())
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler], force=True)


def log_call(exchange: Exchange, method: str, path: str, status: int) -> None:
    """The one line of an HTTP call. Calls that ran nothing and went well are worth a debug line."""
    total = time.monotonic() - exchange.arrived
    fields: dict[str, Any] = {"id": exchange.id, "status": status, "total_ms": _ms(total)}
    if exchange.runs:
        fields |= _run_fields(exchange)
    if exchange.error is not None:
        fields["error"] = str(exchange.error)
    quiet = not exchange.runs and status < 400
    level = logging.DEBUG if quiet else logging.INFO
    logger.log(level, "%s %s", method, ascii(path)[1:-1], extra={"fields": fields})


def _run_fields(exchange: Exchange) -> dict[str, Any]:
    requests = [run.request for run in exchange.runs]
    starts = [run.started for run in exchange.runs if run.started is not None]
    firsts = [run.first for run in exchange.runs if run.first is not None]
    return {
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
        "generated_tokens": sum(len(request.output_token_ids) for request in requests),
        "queue_ms": _ms(min(starts, default=math.nan) - exchange.arrived),
        "ttft_ms": _ms(min(firsts, default=math.nan) - exchange.arrived),
        "finish": ",".join(sorted({request.finish_reason or "abort" for request in requests})),
    }


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds * 1e3, 1)


async def report_status(serving: Serving) -> None:
    """Log load and speed every `status_seconds` while there is work; runs until cancelled."""
    interval, before = serving.options.status_seconds, 0.0
    while interval:
        await asyncio.sleep(interval)
        if not serving.is_loaded:
            continue
        generated, stats = serving.metrics.generated, serving.engine.stats()
        if stats.running or stats.waiting or generated > before:
            fields = {
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_cache_usage": round(stats.kv_cache_usage, 3),
                "tokens_per_s": round((generated - before) / interval, 1),
            }
            logger.info("status", extra={"fields": fields})
        before = generated
