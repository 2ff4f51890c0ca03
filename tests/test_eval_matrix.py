"""The accuracy matrix on the CPU: what is run, what is refused, what makes it red."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import eval_matrix
from eval_backends import HTTPOptions
from eval_gpqa import load_items
from eval_matrix import BEGIN, END, Axes, combinations, measure
from eval_sources import read_conf

CPU = ("--device", "cpu", "--backend", "torch", "--pdl", "off", "--graph", "off")
CACHES = [
    "--weights", "auto", "--kv", "float32", "--kv", "fp8", "--index", "float32", "--index", "fp8",
]  # fmt: skip
SHORT = {"facts", "retrieval 64", "retrieval 128"}


def invoke(*args: str) -> Result:
    return CliRunner().invoke(eval_matrix.app, args)


def test_what_a_gpu_runs() -> None:
    """Two weights, two caches, PDL and graph on and off; two rows more for the indexer's dtype."""
    rows = list(
        combinations(
            eval_matrix.WEIGHTS, eval_matrix.KV, eval_matrix.INDEX, ["off", "on"], ["off", "on"]
        )
    )
    assert len(set(rows)) == len(rows) == 2 * 2 * 2 * 2 + 2
    assert {row.index for row in rows[:16]} == {"fp8"}
    assert rows[16:] == [
        Axes("none", "bfloat16", "bfloat16", "on", "on"),
        Axes("auto", "fp8", "bfloat16", "on", "on"),
    ]


def test_the_cpu_matrix_is_green_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [item for item in load_items(None, "loglikelihood", 1, None, 0) if item.topic in SHORT]
    monkeypatch.setattr(eval_matrix, "load_items", lambda *args: items[:16])
    document, out, records = (tmp_path / name for name in ("doc.md", "out.json", "records"))
    document.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nbehind\n")
    options = ["--records", str(records), "--json", str(out)]
    result = invoke(*CPU, *CACHES, *options, "--write", str(document))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found == json.loads(result.stdout.splitlines()[-1])
    assert found["green"]
    assert [row["tier"] for row in found["rows"]] == ["same", "fp8", "fp8_index", "fp8"]
    assert {row["weights"] for row in found["rows"]} == {"fp8"}
    assert len(list(records.iterdir())) == 1 + 4
    assert len((records / "reference.jsonl").read_text().splitlines()) == 1 + 16
    text = document.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nbehind\n")
    assert "old" not in text
    assert text.count("\n| ") == 2 + 4
    assert text.count("green") == 4
    monkeypatch.setattr("eval_sources.EngineBackend", lambda *args: pytest.fail("asked again"))
    again = invoke(*CPU, *CACHES, *options)
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*CPU, "--graph", "on"], ["cuda_graph", "'on'"]),
        ([*CPU, "--pdl", "on"], ["pdl", "'on'", "accepted here: 'auto', 'off'"]),
        ([*CPU[:2], *CPU[4:]], ["backend", "'triton'", "capability"]),
        ([*CPU, "--kv", "int8"], ["kv_cache_dtype", "'int8'"]),
        ([*CPU, "--write", "README.md"], ["no pair of lines", "eval_matrix.py"]),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    options: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_matrix, "ask", lambda *args: pytest.fail("a run was started"))
    result = invoke(*options)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_other_tokens_with_pdl_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    items = load_items(None, "loglikelihood", 1, 2, 0)
    truth = read_conf("device=cpu,num_pages=64", HTTPOptions())
    want = eval_matrix.ask(truth, items, eval_matrix.SETTINGS, None, None)[0]
    key = items[1].key
    changed = want | {key: replace(want[key], tokens=(*want[key].tokens[:-1], "other"))}
    runs = iter([want, dict(want), dict(want), changed])
    monkeypatch.setattr(eval_matrix, "ask", lambda *args: (next(runs), None))
    axes = [
        Axes("auto", "float32", "float32", pdl, graph)
        for pdl, graph in (("off", "off"), ("on", "off"), ("on", "on"))
    ]
    rows = list(measure(axes, [truth] * 3, items, truth))
    assert [row.differing for row in rows] == [None, 0, 1]
    assert [row.green for row in rows] == [True, True, False]
    assert [row.cells()[-2] for row in rows] == ["-", "same", "1 items differ"]
