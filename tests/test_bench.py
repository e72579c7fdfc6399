"""The harness of the benchmarks: medians, ratios, the last line, processes of their own."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("better", "ratio"), [("lower", 2.5), ("higher", 0.4)])
def test_the_last_line(
    harness: Any, capsys: pytest.CaptureFixture[str], better: str, ratio: float
) -> None:
    """A ratio above 1 says that ours is the better one, whatever is measured."""
    harness.table(("", "ms"), [("ours", 2.0)])
    harness.report("name", 2.0, "ms", {"peer": 5.0}, better=better, more=[1])
    line = last_line(capsys)
    assert line["ratio"] == {"peer": ratio}
    assert (line["name"], line["ours"], line["unit"]) == ("name", 2.0, "ms")
    assert (line["peers"], line["more"]) == ({"peer": 5.0}, [1])
    assert 10 < line["peak_mib"] < 100_000
    assert {"python", "machine", "torch", "sae-lens"} <= set(line["versions"])


def test_a_figure_of_ones_own_replaces_the_shared_one(
    harness: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.report("name", 2.0, "ms", {}, peak_mib=7.0)
    assert last_line(capsys)["peak_mib"] == 7.0


def test_rounds_are_interleaved_and_the_median_counts(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = [0.0], []
    seconds = {"a": iter([100, 1, 9, 2]), "b": iter([100, 5, 4, 50])}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(name: str) -> None:
        calls.append(name)
        clock[0] += next(seconds[name])

    runs = {name: lambda name=name: run(name) for name in seconds}
    assert harness.interleave(runs, rounds=3) == {"a": 2, "b": 5}  # the warm-up is not counted
    assert calls == ["a", "b"] * 4


def test_a_worker_has_memory_of_its_own(harness: Any, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(BENCH)!r})
            from harness import serve
            kept = []
            def run():
                print("noise")
                kept.append(bytearray(b"x" * (64 << 20)))
            serve(run)
        """)
    )
    run = harness.worker([sys.executable, str(script)])
    first, second = run(), run()
    assert 64 < first < 200
    assert 60 < second - first < 70
    script.write_text("raise SystemExit(3)")
    with pytest.raises((RuntimeError, BrokenPipeError)):
        harness.worker([sys.executable, str(script)])()


def test_the_benchmark_of_scores_at_a_toy_size() -> None:
    sizes = {"features": 60, "concepts": 5, "texts": 300, "topics": 3, "sample": 10, "rounds": 1}
    command = [sys.executable, str(BENCH / "scores.py"), *(f"--{k}={v}" for k, v in sizes.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["name"] == "scores"
    assert line["largest_difference"] < 1e-12
    assert set(line["ratio"]) == {"scikit-learn"}
    assert line["peers"]["scikit-learn"] > 0
    assert 0 <= line["above_input_mib"] < 200
    assert "scikit-learn" in line["versions"]
