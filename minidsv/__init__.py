"""minidsv: a miniature DeepSeek-V3.2 decode engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidsv.llm import LLM as LLM
    from minidsv.request import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when LLM is asked for."""
    if name == "LLM":
        from minidsv.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minidsv.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'minidsv' has no attribute {name!r}")
