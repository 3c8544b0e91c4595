"""What the benchmarks take in and leave behind: inputs, traffic model, memory, result files, comparison, plots."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, grids, headline, provenance, report, traffic, verdicts
from benchmarks.harness import Outcome
from benchmarks.kinds import KINDS
from benchmarks.memory import NotMeasuredError, peak_extra_bytes
from benchmarks.peers import FLOOR
from benchmarks.row_problem import IGNORE_INDEX, build_row_problem
from benchmarks.runner import Options, Plan, run
from benchmarks.shapes import VOCABULARIES, LinearCase, RowCase

SMALL = RowCase(rows=12, vocab=257, responses=4)
SMALL_LINEAR = LinearCase(rows=24, hidden=48, vocab=311, responses=4)
DEAD = ("none", "masked", "zero-advantage")


@pytest.mark.parametrize("dead", DEAD)
def test_inputs_are_what_the_case_says(dead):
    problem = build_row_problem(replace(SMALL, rows=64, responses=8, dead=dead))
    live_N, advantages_S = problem.targets_N != IGNORE_INDEX, problem.advantages_N.view(8, 8)[:, 0]
    assert live_N.sum() == problem.live_rows == (32 if dead == "masked" else 64)
    assert (advantages_S == 0).sum() == (4 if dead == "zero-advantage" else 0)
    pi_N = problem.logits_NV.double().softmax(1).max(1).values
    assert pi_N[0] == pytest.approx(0.5, abs=1e-5) and pi_N[-1] == pytest.approx(0.999, abs=1e-5)


def test_same_case_same_inputs():
    assert torch.equal(build_row_problem(SMALL).logits_NV, build_row_problem(SMALL).logits_NV)
    assert not torch.equal(build_row_problem(SMALL).logits_NV, build_row_problem(replace(SMALL, seed=21)).logits_NV)


def test_grids_name_every_vocabulary_and_losing_sizes():
    cases = grids.row_cases("cpu")
    assert {case.vocab for case in cases} == {v.size for v in VOCABULARIES}
    assert 1 in {case.rows for case in cases}, "small N, where fused kernels lose, must be in the grid"
    assert {case.dead for case in cases} == set(DEAD) and {case.threads for case in cases} == {1, 2}
    assert len(grids.row_cases("cpu", quick=True)) < 5


def test_traffic_model():
    assert traffic.logits_bytes(8192, 151936, "bfloat16") == 8192 * 151936 * 2
    # 2.49 GB of logits, once in and once out, at 4.8 TB/s: 1.04 ms
    assert traffic.FLOOR.bytes_moved(8192, 151936, "bfloat16") / 4.8e12 == pytest.approx(1.04e-3, rel=0.01)
    assert traffic.linear_flop(2, 3, 5) == 6 * 2 * 3 * 5
    assert traffic.linear_flop(2, 3, 5, products=4) == 8 * 2 * 3 * 5


def test_peak_memory_of_a_step_in_a_fresh_process():
    case = RowCase(rows=8, vocab=262144)  # 8 MiB of logits
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its high-water mark")
    lean = peak_extra_bytes("row", case, "eager PyTorch, lean")
    # bf16 inputs are made from fp32 ones: unless the high-water mark is reset, that peak would be reported
    assert peak_extra_bytes("row", replace(case, dtype="bfloat16"), FLOOR) < 1 << 20
    assert 15 << 20 < lean < 60 << 20, "log-softmax and gradient are two arrays of the logits' size at least"


def test_memory_that_cannot_be_measured_says_why():
    with pytest.raises(NotMeasuredError, match="nobody"):
        peak_extra_bytes("row", SMALL, "nobody")


def test_row_benchmark_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = [SMALL, replace(SMALL, dead="masked"), replace(SMALL, vocab=300)]
    monkeypatch.setitem(KINDS, "row", replace(KINDS["row"], cases=lambda *_args, **_kwargs: tiny))
    file = tmp_path / "row.json"
    options = ["--quick", "--rounds", "2", "--no-memory", "--warm", "--only", "reference", "--save", str(file)]
    assert command.main(["row", *options]) == 0
    printed = capsys.readouterr().out
    assert "gft_loss reference" in printed and "over floor" in printed
    saved = json.loads(file.read_text())
    named = "format benchmark command taken load_average commit machine versions allocator clock rounds traffic_model"
    assert set(saved) == {*named.split(), "results"}
    assert saved["command"] == f"gft bench row {' '.join(options)}"
    assert saved["commit"].keys() == {"revision", "dirty"} and saved["versions"]["torch"] == torch.__version__
    assert saved["machine"]["cpu"] and saved["machine"]["cores"] and "instruction_sets" in saved["machine"]
    assert [RowCase(**result["case"]) for result in saved["results"]] == tiny, "inputs can be made again from the file"
    outcome = next(o for o in saved["results"][0]["outcomes"] if o["name"] == "gft_loss reference")
    assert outcome["status"] == "timed" and len(outcome["samples_s"]) == 2
    assert outcome["p10_s"] <= outcome["median_s"] <= outcome["p90_s"] and outcome["error"] < 1e-5


def report_of(*outcomes: Outcome, **changes) -> dict:
    result = report.CaseResult("row", vars(SMALL).copy(), SMALL.label(), 100, list(outcomes))
    return report_with([result]) | changes


def report_with(results: list[report.CaseResult]) -> dict:
    return report.Report("row", "clock", 3, "cpu", provenance.commit(), "gft bench row", 0.1, results).as_json()


def timed(name: str, median: float, spread: float = 0.1, objective: str | None = "gft") -> Outcome:
    return Outcome(name, "timed", objective, "", 0.0, 0.0, [median], median, median - spread, median + spread, median)


def as_json(value: dict) -> dict:
    return json.loads(json.dumps(value))


def test_compare_tells_change_from_noise():
    before = as_json(report_of(timed("a", 1.0), timed("b", 1.0), timed("gone", 1.0)))
    after = as_json(report_of(timed("a", 1.15), timed("b", 2.0), timed("new", 1.0)))
    found = {change.name: (change.verdict(), change.ratio) for change in compare.changes(before, after)}
    assert found == {"a": ("same", pytest.approx(1.15)), "b": ("slower", 2.0)}
    assert compare.differences(before, after) == []


def test_compare_refuses_another_machine(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, cpu in zip(paths, ("one", "other"), strict=True):
        path.write_text(json.dumps(report_of(timed("a", 1.0), machine={"cpu": cpu})))
    assert compare.compare(*paths) == 1
    assert "not comparable: machine differs" in capsys.readouterr().err


def test_ratios_reproduce_or_are_named(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    floor = timed("floor", 1.0, objective=None)
    first = [floor, timed("a", 2.0), timed("b", 5.0), timed("gone", 1.0)]
    for path, outcomes in zip(paths, (first, [floor, timed("a", 2.6), timed("b", 3.0)]), strict=True):
        path.write_text(json.dumps(report_of(*outcomes, machine={"cpu": path.name})))  # any machine will do
    assert command.main(["--compare", *map(str, paths), "--ratios"]) == 1
    printed = capsys.readouterr().out
    (bad,) = [line for line in printed.splitlines() if "DIFFERS" in line]
    assert bad.split()[0] == "b" and "1 of 2 ratios agree within a factor of 1.5" in printed
    assert command.main(["--compare", *map(str, paths), "--ratios", "--tolerance", "1.7"]) == 0
    assert command.main(["--compare", str(paths[0]), str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    "bad", [["rows"], ["row", "--sweep", "live"], ["--sweep", "tau"], ["--device", "tpu"], ["--budget", "9"]]
)
def test_bad_input_is_refused_before_anything_runs(bad, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(bad)
    assert ended.value.code == 2 and "gft bench: error:" in capsys.readouterr().err


def test_sweeps_are_cases_of_their_kind():
    for name, (kind, cases) in grids.SWEEPS.items():
        found = cases("cpu", threads=1)
        assert len(found) == len(set(found)) > 3 and all(isinstance(case, KINDS[kind].case) for case in found), name


def winner_over(*outcomes: Outcome) -> str | None:
    winner = verdicts.winner_over_us(as_json(report_of(*outcomes))["results"][0])
    return winner and winner["name"]


def test_losing_shapes_are_found():
    ours, objective = timed("gft_loss cpu", 2.0), "cross-entropy"
    assert winner_over(ours, timed("eager", 1.0), timed("slow", 9.0)) == "eager"
    assert winner_over(ours, timed("eager", 3.0)) is None
    assert winner_over(ours, timed("cross", 1.0, objective=objective)) == "cross", "another objective counts too"
    assert winner_over(ours, timed("floor", 1.0, objective=None)) is None


def test_headline_quotes_ratios_scaling_memory_and_losses():
    def result(case: RowCase, ours: float, eager: float, memory: int) -> report.CaseResult:
        outcomes = [replace(timed("gft_loss cpu, in place", ours), extra_bytes=0),
                    replace(timed("eager", eager), extra_bytes=memory)]  # fmt: skip
        return report.CaseResult("row", vars(case).copy(), case.label(), 100, outcomes)

    results = [result(SMALL, 2.0, 10.0, 350), result(replace(SMALL, threads=2), 1.25, 9.0, 350),
               result(replace(SMALL, vocab=300), 2.0, 1.0, 350)]  # fmt: skip
    text = "\n".join(
        headline.lines(
            as_json(
                report.Report("row", "clock", 3, "cpu", provenance.commit(), "gft bench row", 0.1, results).as_json()
            )
        )
    )
    assert "eager: 5.0 × our time" in text and "1 → 2 threads: 1.60 × as fast" in text
    assert "eager: 3.50 × the logits" in text and "in place: 0.00 × the logits" in text
    assert f"another contender was faster: {replace(SMALL, vocab=300).label()}" in text


def test_headline_allocator_restarts_once(monkeypatch):
    started = []
    monkeypatch.setattr(provenance.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(provenance.os, "execve", lambda *call: started.append(call))
    for name in provenance.KEEP_FREED_BLOCKS:
        monkeypatch.delenv(name, raising=False)
    provenance.restart_under_headline_allocator("benchmarks")
    assert started[0][1][1:3] == ["-m", "benchmarks"]
    assert started[0][2].items() >= provenance.KEEP_FREED_BLOCKS.items()
    for name, value in provenance.KEEP_FREED_BLOCKS.items():
        monkeypatch.setenv(name, value)
    provenance.restart_under_headline_allocator("benchmarks")
    assert len(started) == 1
    assert "MALLOC_MMAP_MAX_=0" in provenance.allocator()


def test_kinds_build_from_json():
    for kind, case in (("row", SMALL), ("linear", SMALL_LINEAR)):
        again = KINDS[kind].case(**json.loads(json.dumps(vars(case))))
        assert again == case and KINDS[kind].input_bytes(again) > 0


def test_run_prints_provenance_first(capsys):
    run([Plan("row", [SMALL])], Options(rounds=1, warm=True, only="lean"))
    first = capsys.readouterr().out.splitlines()
    assert first[1].startswith("commit ") and "perf_counter, warm cache" in first[1]
    assert [line for line in first if line.startswith("traffic model")]
    assert [line for line in first if line.startswith("row: loss and gradient")]


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (900.0, True), (None, False)])
def test_a_busy_machine_is_told(load, busy):
    assert ("the machine is busy" in report.header("cpu", "clock", provenance.commit(), load)) is busy
