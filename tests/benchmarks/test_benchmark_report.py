"""How benchmark results are shown: the table, losing shapes in red, plots drawn from the files and dated by them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import plots, provenance, report
from benchmarks.harness import Outcome
from benchmarks.shapes import LinearCase, RowCase

CASE = RowCase(rows=12, vocab=257, responses=4)


def timed(name: str, median: float, objective: str | None = "gft", **more) -> Outcome:
    spread = {"p10_s": median - 0.1, "p90_s": median + 0.1}
    return Outcome(name, "timed", objective, error=0.0, worst_row_error=0.0, samples_s=[median], median_s=median,
                   over_floor=median, **spread, **more)  # fmt: skip


def result_of(case, *outcomes: Outcome, kind: str = "row") -> report.CaseResult:
    return report.CaseResult(kind, asdict(case), case.label(), 100, list(outcomes))


def table(*outcomes: Outcome, told: set | None = None) -> str:
    return report.table(asdict(result_of(CASE, *outcomes)), told)


def test_fastest_first_and_a_reason_once():
    entries = timed("slow", 2.0), Outcome("peer", "absent", why="needs a GPU"), timed("fast", 1.0)
    told: set = set()
    first, second = table(*entries, told=told), table(*entries, told=told)
    assert first.index("fast") < first.index("slow") < first.index("peer: absent: needs a GPU")
    assert "needs a GPU" not in second


def test_a_losing_shape_is_shown_in_red_and_in_words(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = table(timed("gft_loss cpu", 2.0), timed("gft_loss reference", 9.0), timed("eager", 1.0)).splitlines()
    red = [line for line in lines if line.startswith("\033[31m")]
    assert len(red) == 1 and "gft_loss cpu" in red[0] and "slower than eager" in red[0]
    assert not [line for line in table(timed("gft_loss cpu", 1.0), timed("eager", 2.0)).splitlines() if "\033" in line]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in table(timed("gft_loss cpu", 2.0), timed("eager", 1.0))


def test_another_objective_and_the_longest_sequence_are_named():
    text = table(timed("gft_loss cpu", 1.0, longest_tokens=96, budget_bytes=512 << 20), timed("x", 2.0, "grpo"))
    assert "at most 96 tokens in 512 MiB" in text and "objective: grpo" in text and "objective: gft" not in text


def saved(path, results: list[report.CaseResult], kind: str = "row"):
    path.write_text(json.dumps(report.Report(kind, "c", 3, "cpu", provenance.commit(), "", 0.1, results).as_json()))
    return path


def sweeps(tmp_path):
    """A file in which each curve has three points, and we lose at one."""
    wide = [replace(CASE, rows=12 // n, vocab=257 * n) for n in (2, 3)]
    more = [replace(CASE, rows=12 * n) for n in (2, 3)]
    head = LinearCase(8, 16, 64)
    ours = timed("gft_loss cpu", 2.0, extra_bytes=1 << 20, reads=1, writes=1)
    rows = [result_of(c, ours, timed("x", t), timed("floor", 0.5, None))
            for c, t in ((CASE, 1.0), *((c, 4.0) for c in wide + more))]  # fmt: skip
    heads = [
        result_of(c, timed("gft_linear_loss cpu", t), timed("eager PyTorch, lean", 3.0), timed("floor", 0.9, None),
                  kind="linear") for c, t in ((head, 2.0), *((replace(head, dead="zero-advantage", dead_share=s), 1.0)
                                                             for s in (0.5, 0.75)))
    ]  # fmt: skip
    return saved(tmp_path / "all-cpu.json", rows + heads)


def test_every_plot_is_drawn_from_a_file_and_carries_its_digest(tmp_path):
    pytest.importorskip("matplotlib")
    source = sweeps(tmp_path)
    written = {path.name: path for path in plots.draw([source], tmp_path)}
    curves = {f"all-cpu-{stem}-float32.svg" for stem in ("time", "memory", "live")}
    assert written.keys() == curves | {"roofline.svg"}
    for path in written.values():
        assert plots.sources(path) == {"all-cpu.json": plots.digest(source)}
    assert "someone else is faster" in written["all-cpu-time-float32.svg"].read_text()
    assert plots.LOST in written["all-cpu-time-float32.svg"].read_text()
    assert "someone else is faster" not in written["all-cpu-live-float32.svg"].read_text()
    before = written["roofline.svg"].read_bytes()
    plots.draw([source], tmp_path)
    assert written["roofline.svg"].read_bytes() == before, "the same file gives the same plot"


def test_the_live_sweep_is_ordered_by_what_is_alive(tmp_path):
    points = plots.sweep(report.load(sweeps(tmp_path)), "float32", "live", "linear")
    assert [plots._live(r["case"]) for r in points] == [0.25, 0.5, 1.0]


def test_a_file_older_than_a_field_of_its_cases_is_read_with_the_default(tmp_path):
    path = saved(tmp_path / "old.json", [result_of(CASE, timed("a", 1.0))])
    old = json.loads(path.read_text())
    del old["results"][0]["benchmark"], old["results"][0]["case"]["dead_share"]
    path.write_text(json.dumps(old))
    (result,) = report.load(path)["results"]
    assert result["benchmark"] == "row" and RowCase(**result["case"]) == CASE
