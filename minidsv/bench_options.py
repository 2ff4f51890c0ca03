"""BenchOptions: the options of `minidsv bench` beside the engine's. No torch in here."""

from dataclasses import dataclass, field, fields
from typing import Any

from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError

VARIANTS = ("eager", "graph", "graph+seed", "graph+pdl", "graph+prefetch")
CONTEXTS = (4096, 65536)
REPLAYS = 200
SUBJECTS = ("graph", "profile", "wall")  # switches; without one, the table of variants
# The subjects to which an option means something; the others' are common to all.
_FOR = {
    "variants": ("table", "graph", "profile"),
    "replays": ("table", "profile", "wall"),
    "layers": ("table",),
    "plot": ("profile",),
}
# Options that only the whole engine has a use for, and why.
_ENGINE_ONLY = {
    "pdl": "variants choose it",
    "cuda_graph": "variants choose it",
    "max_num_seqs": "batch sets it",
    "max_num_batched_tokens": "no prompt is computed",
    "num_pages": "batch and context set it",
    "enable_prefix_caching": "no prompt is computed",
    "activations": "no prompt is computed",
}


def _option(default: Any, help: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. Raises ConfigError on bad values and on options that do not go together."""

    batch: str = _option("1,8,64", "requests in a decode step, comma-separated")
    context: str | None = _option(
        None,
        "tokens of context, the first one decoded included (default: "
        f"{','.join(map(str, CONTEXTS))}; of graphs: the largest of each path)",
    )
    variants: str | None = _option(None, f"of {', '.join(VARIANTS)}; default: all that run here")
    replays: int | None = _option(None, f"timed steps of each measurement (default: {REPLAYS})")
    layers: str | None = _option(None, "two layer counts, whose difference prices a layer")
    graph: bool = _option(False, "capture, and report the nodes, edges and proofs of the graph")
    profile: bool = _option(False, "time and bytes of each kernel of a step")
    wall: bool = _option(False, "prefill and decode of the whole engine, by the host's clock")
    plot: str | None = _option(None, "with --profile: write the stacked bars there")
    json: str | None = _option(None, "also write the JSON there")

    def __post_init__(self) -> None:
        chosen = [name for name in SUBJECTS if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(f"{chosen[1]}: not together with {chosen[0]}; give one of {SUBJECTS}")
        for name, subjects in _FOR.items():
            if getattr(self, name) is not None and self.subject not in subjects:
                raise ConfigError(f"{name}: means nothing to {self.subject}, only to {subjects}")
        if self.replays is not None and self.replays < 1:
            raise ConfigError(f"replays: {self.replays} is not an integer of at least 1")
        _ = self.batches, self.contexts, self.layer_counts, self.variant_names  # raise

    @property
    def subject(self) -> str:
        """ "table", "graph", "profile" or "wall"."""
        return next((name for name in SUBJECTS if getattr(self, name)), "table")

    @property
    def timed_steps(self) -> int:
        return self.replays or REPLAYS

    @property
    def batches(self) -> tuple[int, ...]:
        return _integers("batch", self.batch)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of graphs the default is (): one of each path."""
        if self.context is None:
            return () if self.graph else CONTEXTS
        return _integers("context", self.context)

    @property
    def layer_counts(self) -> tuple[int, int] | None:
        if self.layers is None:
            return None
        counts = _integers("layers", self.layers)
        if len(counts) != 2 or counts[0] >= counts[1]:
            raise ConfigError(f"layers: {self.layers!r} is not two counts, the smaller one first")
        return counts[0], counts[1]

    @property
    def variant_names(self) -> tuple[str, ...] | None:
        """In the order of VARIANTS; None: not given."""
        if self.variants is None:
            return None
        given = self.variants.split(",")
        if unknown := sorted({*given} - {*VARIANTS}):
            raise ConfigError(f"variants: {unknown[0]!r} is not one of {list(VARIANTS)}")
        if self.subject != "table" and len(given) > 1:
            raise ConfigError(f"variants: {self.subject} takes one, got {self.variants!r}")
        return tuple(name for name in VARIANTS if name in given)

    def check_engine(self, config: EngineConfig) -> None:
        """Refuse options of the engine that would change nothing here."""
        if self.subject == "wall":
            return
        for option in fields(config):
            value = getattr(config, option.name)
            if option.name in _ENGINE_ONLY and value != option.default:
                raise ConfigError(
                    f"{option.name}: {value!r} changes nothing without --wall: "
                    f"{_ENGINE_ONLY[option.name]}"
                )


def _integers(name: str, text: str) -> tuple[int, ...]:
    """ "1,8,64" -> (1, 8, 64)."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{name}: {text!r} is not a comma-separated list of positive integers")
    return tuple(map(int, parts))
