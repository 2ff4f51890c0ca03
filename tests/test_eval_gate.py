"""The parity gate: green for a clean engine, red for every broken one.

The reference is transformers' own model, so a fault in this tree cannot hide in both runs.
"""

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from eval_backends import HTTPOptions
from eval_items import Item, bundled_problems, make_items
from eval_parity import LIMITS, Tier, Verdict, compare, judge
from eval_records import Record, RecordFile
from eval_run import Settings, run
from eval_sources import common_tier, read_conf
from mutants import FP8_MUTANTS, MUTANTS

SHORT = {"facts", "retrieval 64", "retrieval 128", "retrieval 192"}
SETTINGS = Settings("loglikelihood", 8, ignore_eos=True)
Records = dict[tuple[str, int], Record]


@cache
def items(seed: int = 0, count: int = 20) -> list[Item]:
    return list(make_items([p for p in bundled_problems(seed) if p.topic in SHORT][:count], 1))


def records(conf: str, asked: list[Item]) -> Records:
    backend, file = read_conf(conf, HTTPOptions()).open(), RecordFile(None, {})
    run(asked, backend, SETTINGS, file)
    backend.close()
    return file.records


@cache
def reference(seed: int = 0) -> Records:
    return records("transformers", items(seed))


def verdict(got: Records, tier: Tier, want: Records) -> Verdict:
    return judge([compare(want[key], got[key]) for key in want], LIMITS[tier])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clean_engine_is_green(seed: int) -> None:
    found = verdict(records("device=cpu", items(seed)), "fp32", reference(seed))
    assert found.green, found.reasons
    assert found.divergences == 0


def test_the_same_configuration_twice_gives_the_same_bits() -> None:
    runs = [records("device=cpu", items()) for _ in range(2)]
    assert verdict(runs[0], "same", runs[1]).green
    source = read_conf("device=cpu", HTTPOptions())
    assert common_tier(source, read_conf("", HTTPOptions())) == "same"


@pytest.mark.parametrize(
    ("conf", "tier"),
    [
        ("dtype=bfloat16", "bf16"),
        ("kv_cache_dtype=bfloat16", "bf16"),
        ("kv_cache_dtype=fp8", "fp8"),
        ("kv_cache_dtype=fp8_flat", "fp8_flat"),
        ("index_cache_dtype=fp8", "fp8_index"),
        ("activations=fp8", "fp8_flat"),
    ],
)
def test_other_dtypes_are_green_in_their_own_tier(conf: str, tier: Tier) -> None:
    a, b = read_conf("transformers", HTTPOptions()), read_conf(conf, HTTPOptions())
    assert common_tier(a, b) == tier
    found = verdict(records(conf, items()), tier, reference())
    assert found.green, found.reasons
    assert found.mean_shift > 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_engine_is_red(mutant: object, tmp_path: Path) -> None:
    with mutant(tmp_path / "broken") as folder:  # type: ignore[operator]
        got = records(f"model={folder}", items())
    assert not verdict(got, "fp32", reference()).green
    # one layer's router bias moves this model no further than fp8 rows do
    coarse = verdict(got, "fp8", reference()).green
    assert coarse == (mutant.__name__ == "dropped_router_bias")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mutant", "conf"), FP8_MUTANTS)
def test_a_fault_in_an_fp8_cache_is_red(mutant: object, conf: str, tmp_path: Path) -> None:
    """The indexer has to choose in long contexts only; the sound cache is green in the same."""
    long = [p for p in bundled_problems(0) if p.topic in ("retrieval 512", "retrieval 576")][:8]
    asked = list(make_items(long, 1)) if "index" in conf else items()
    want = records("transformers", asked)
    tier = common_tier(read_conf("transformers", HTTPOptions()), read_conf(conf, HTTPOptions()))
    clean = verdict(records(conf, asked), tier, want)
    assert clean.green, clean.reasons
    with mutant(tmp_path / "broken"):  # type: ignore[operator]
        assert not verdict(records(conf, asked), tier, want).green
