"""What the batch program shows of its progress."""

import random

import pytest

import batch_report
from batch_report import Histogram, Load, Reporter, Tally


def test_histogram_is_close_to_exact() -> None:
    draw = random.Random(3)
    seconds = sorted(draw.lognormvariate(-4, 2) for _ in range(2000))
    histogram = Histogram()
    assert histogram.percentiles() is None
    for value in seconds:
        histogram.add(value)
    for name, got in (histogram.percentiles() or {}).items():
        want = 1000 * seconds[2000 * int(name[1:]) // 100 - 1]
        assert got == pytest.approx(want, rel=0.046), name


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_without_a_terminal(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_report, "PLAIN_SECONDS", 0.0)
    with Reporter(1000, quiet) as reporter:
        reporter.show(Tally(ok=3, failed=1, skipped=2), Load(5, 6, 0.25, 70), 500, False)
    err = capsys.readouterr().err
    parts = (
        "3 ok, 1 failed, 2 skipped",
        "5 running, 6 waiting",
        "KV 25%",
        "tokens/s",
        "50%",
        "left",
    )
    assert all((part in err) != quiet for part in parts)
