"""The benchmark harness: it times no wrong answer, its statistics are right, its files say where figures are from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_row, compare, plots, provenance, report, shapes, traffic
from benchmarks.clocks import CpuClock
from benchmarks.harness import Absent, Answer, Contender, Outcome, check, measure, quantile
from benchmarks.kinds import KINDS
from benchmarks.memory import peak_extra_bytes
from benchmarks.peers import FLOOR, row_contender, row_contenders
from benchmarks.row_losses import lean_loss, step_of
from benchmarks.row_problem import IGNORE_INDEX, build_row_problem
from benchmarks.runner import run
from benchmarks.shapes import RowCase

SMALL = RowCase(rows=12, vocab=257, responses=4)
DEAD = ("none", "masked", "zero-advantage")


class CountingClock:
    """Hands out set durations instead of measuring, and counts the steps it was asked for."""

    name = "counting"

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.steps = seconds, []

    def arm(self, step):
        return step

    def time(self, step) -> float:
        self.steps.append(step())
        return self.seconds[self.steps[-1]]


class NamedProblem:
    """A problem whose answers are right if they say so."""

    limit, timed_upstream = 0.1, 1.0

    def prepare(self, upstream: float) -> None: ...

    def deviation(self, answer, objective):
        raise AssertionError("floors are not checked")


def floor(name: str) -> Contender:
    return Contender(name, lambda: name, objective=None)


# ---- wrong answers


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_answers_pass(dead, dtype):
    problem = build_row_problem(replace(SMALL, dead=dead, dtype=dtype, temperature=0.8))
    for name in ("gft_loss reference", "gft_loss reference, in place", "eager PyTorch, lean", "F.cross_entropy"):
        outcome = check(problem, row_contender(problem, name))
        assert outcome.status == "ready", f"{name}: {outcome.why}"


def spoiled(problem, spoil) -> Contender:
    """The lean loss with its gradient spoiled afterwards."""
    step = step_of(lean_loss, problem)

    def wrong() -> Answer:
        answer = step()
        return Answer(answer.loss, (spoil(answer.gradients[0].clone()),))

    return Contender("spoiled", wrong)


def one_nan(gradient_NV):
    gradient_NV[3, 5] = math.nan
    return gradient_NV


def one_row_doubled(gradient_NV):
    gradient_NV[gradient_NV.norm(dim=1).argmax()] *= 2
    return gradient_NV


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [one_nan, one_row_doubled, torch.zeros_like, torch.neg, lambda g: g / 1.7])
def test_wrong_gradient_is_never_timed(spoil, dtype):
    problem = build_row_problem(replace(SMALL, dtype=dtype))
    clock = CountingClock({})
    (outcome,) = measure(problem, [spoiled(problem, spoil)], clock, rounds=3)
    assert outcome.status == "wrong answer" and "not timed" in outcome.why
    assert outcome.samples_s == [] and outcome.median_s is None and clock.steps == []


def test_wrong_loss_is_never_timed():
    problem = build_row_problem(SMALL)
    step = step_of(lean_loss, problem)
    shifted = Contender("shifted", lambda: Answer((a := step()).loss + 0.1, a.gradients))
    assert check(problem, shifted).status == "wrong answer"


def test_gradient_in_a_dead_row_is_wrong():
    problem = build_row_problem(replace(SMALL, dead="masked"))
    dead = (problem.targets_N == IGNORE_INDEX).nonzero()[0, 0]

    def fill(gradient_NV):
        gradient_NV[dead] += 1e-2
        return gradient_NV

    assert check(problem, spoiled(problem, fill)).status == "wrong answer"


def test_dropping_the_upstream_gradient_is_wrong():
    problem = build_row_problem(SMALL)

    def step() -> Answer:
        logits_NV = problem.logits_NV.clone().requires_grad_()
        loss = lean_loss(logits_NV, problem)
        return Answer(loss.detach(), torch.autograd.grad(loss, logits_NV))

    assert check(problem, Contender("drops it", step)).status == "wrong answer"


def test_failing_and_absent_contenders_leave_a_sentence():
    problem = build_row_problem(SMALL)

    def fail():
        raise RuntimeError("no such kernel\nsecond line")

    outcomes = measure(
        problem, [Contender("fails", fail), Absent("absent", "not installed")], CpuClock(cold=False), rounds=1
    )
    assert [(o.status, o.why) for o in outcomes] == [
        ("failed", "RuntimeError: no such kernel"),
        ("absent", "not installed"),
    ]


def test_absent_peers_say_why_and_the_rest_is_not_failed():
    problem = build_row_problem(SMALL)
    absent = [entry for entry in row_contenders(problem) if isinstance(entry, Absent)]
    assert {entry.name for entry in absent} >= {"Liger cross-entropy", "Liger GRPO", "quack cross-entropy"}
    for entry in absent:
        assert len(entry.why.split()) > 4, f"{entry.name}: {entry.why!r} is no sentence"


# ---- timing and statistics


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.5) == 1.5
    assert quantile([float(i) for i in range(11)], 0.1) == pytest.approx(1.0)
    assert quantile([5.0], 0.9) == 5.0
    with pytest.raises(ValueError, match="samples must not be empty"):
        quantile([], 0.5)


def test_contenders_take_turns_and_warm_up_is_dropped():
    clock = CountingClock({"a": 2.0, "b": 3.0})
    a, b = measure(NamedProblem(), [floor("a"), floor("b")], clock, rounds=4, warmup=2)
    assert len(clock.steps) == 2 * (2 + 4)
    assert all({clock.steps[i], clock.steps[i + 1]} == {"a", "b"} for i in range(0, 12, 2)), "a round without everyone"
    assert len({tuple(clock.steps[i : i + 2]) for i in range(0, 12, 2)}) == 2, "the order must change"
    assert a.samples_s == [2.0] * 4 and (a.median_s, a.over_floor) == (2.0, 1.0)
    assert (b.median_s, b.p10_s, b.p90_s, b.over_floor) == (3.0, 3.0, 3.0, 1.5)


def test_logits_are_restored_before_every_step():
    problem = build_row_problem(SMALL)
    seen = []
    measure(problem, [Contender("spoils", lambda: seen.append(problem.logits_NV.clone()) or problem.logits_NV.zero_(),
                                None)], CpuClock(cold=False), rounds=2)  # fmt: skip
    assert len(seen) == 5 and all(torch.equal(logits, problem.pristine_NV) for logits in seen)


# ---- inputs


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
    cases = shapes.row_cases("cpu")
    assert {case.vocab for case in cases} == {v.size for v in shapes.VOCABULARIES}
    assert 1 in {case.rows for case in cases}, "small N, where fused kernels lose, must be in the grid"
    assert {case.dead for case in cases} == set(DEAD) and {case.threads for case in cases} == {1, 2}
    assert len(shapes.row_cases("cpu", quick=True)) < 5


def test_traffic_model():
    assert traffic.logits_bytes(8192, 151936, "bfloat16") == 8192 * 151936 * 2
    # 2.49 GB of logits, once in and once out, at 4.8 TB/s: 1.04 ms
    assert traffic.FLOOR.bytes_moved(8192, 151936, "bfloat16") / 4.8e12 == pytest.approx(1.04e-3, rel=0.01)
    assert traffic.linear_flop(2, 3, 5) == 6 * 2 * 3 * 5
    assert traffic.linear_flop(2, 3, 5, products=4) == 8 * 2 * 3 * 5


# ---- memory, reports


def test_peak_memory_of_a_step_in_a_fresh_process():
    case = RowCase(rows=8, vocab=262144)  # 8 MiB of logits
    lean = peak_extra_bytes("row", case, "eager PyTorch, lean")
    if lean is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    # bf16 inputs are made from fp32 ones: unless the high-water mark is reset, that peak would be reported
    assert peak_extra_bytes("row", replace(case, dtype="bfloat16"), FLOOR) < 1 << 20
    assert 15 << 20 < lean < 60 << 20, "log-softmax and gradient are two arrays of the logits' size at least"


def test_row_benchmark_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = [SMALL, replace(SMALL, dead="masked"), replace(SMALL, vocab=300)]
    monkeypatch.setattr(shapes, "row_cases", lambda *_args, **_kwargs: tiny)
    file = tmp_path / "row.json"
    bench_row.main(["--quick", "--rounds", "2", "--no-memory", "--warm", "--only", "reference", "--save", str(file)])
    printed = capsys.readouterr().out
    assert "gft_loss reference, in place" in printed and "over floor" in printed
    saved = json.loads(file.read_text())
    named = "format benchmark taken commit machine versions allocator clock rounds traffic_model results"
    assert set(saved) == set(named.split())
    assert saved["commit"].keys() == {"revision", "dirty"} and saved["versions"]["torch"] == torch.__version__
    assert saved["machine"]["cpu"] and saved["machine"]["cores"] and "instruction_sets" in saved["machine"]
    assert [RowCase(**result["case"]) for result in saved["results"]] == tiny, "inputs can be made again from the file"
    outcome = next(o for o in saved["results"][0]["outcomes"] if o["name"] == "gft_loss reference")
    assert outcome["status"] == "timed" and len(outcome["samples_s"]) == 2
    assert outcome["p10_s"] <= outcome["median_s"] <= outcome["p90_s"] and outcome["error"] < 1e-5


def report_of(*outcomes: Outcome, **changes) -> dict:
    result = report.CaseResult(vars(SMALL).copy(), SMALL.label(), 100, list(outcomes))
    return report.Report("row", "clock", 3, "cpu", [result]).as_json() | changes


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
    assert compare.main([str(path) for path in paths]) == 1
    assert "not comparable: machine differs" in capsys.readouterr().err


def test_losing_shapes_are_found():
    ours, objective = timed("gft_loss cpu", 2.0), "cross-entropy"
    assert plots.loses(as_json(report_of(ours, timed("eager", 1.0)))["results"][0])
    assert not plots.loses(as_json(report_of(ours, timed("eager", 3.0)))["results"][0])
    assert not plots.loses(as_json(report_of(ours, timed("cross", 1.0, objective=objective)))["results"][0])


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results = []
    for vocab in (257, 514):
        case = replace(SMALL, rows=SMALL.rows * 257 // vocab, vocab=vocab)
        results.append(
            report.CaseResult(vars(case).copy(), case.label(), 1, [timed("gft_loss cpu", 2.0), timed("x", 1.0)])
        )
    made = report.Report("row", "clock", 3, "cpu", results).as_json()
    written = plots.draw(as_json(made), tmp_path)
    assert [path.name for path in written] == ["row-time-float32.png"] and written[0].stat().st_size > 1000


def test_table_lists_fastest_first_and_tells_a_reason_once():
    absent = Outcome("peer", "absent", why="needs a GPU")
    result = report.CaseResult(vars(SMALL), SMALL.label(), 100, [timed("slow", 2.0), absent, timed("fast", 1.0)])
    told: set = set()
    first, second = report.table(result, told), report.table(result, told)
    assert first.index("fast") < first.index("slow") < first.index("peer: absent: needs a GPU")
    assert "needs a GPU" not in second


def test_headline_allocator_restarts_once(monkeypatch):
    started = []
    monkeypatch.setattr(provenance.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(provenance.os, "execve", lambda *call: started.append(call))
    for name in provenance.KEEP_FREED_BLOCKS:
        monkeypatch.delenv(name, raising=False)
    provenance.restart_under_headline_allocator("benchmarks.bench_row")
    assert started[0][1][1:3] == ["-m", "benchmarks.bench_row"]
    assert started[0][2].items() >= provenance.KEEP_FREED_BLOCKS.items()
    for name, value in provenance.KEEP_FREED_BLOCKS.items():
        monkeypatch.setenv(name, value)
    provenance.restart_under_headline_allocator("benchmarks.bench_row")
    assert len(started) == 1
    assert "MALLOC_MMAP_MAX_=0" in provenance.allocator()


def test_kinds_build_from_json():
    for kind in KINDS.values():
        assert kind.case(**json.loads(json.dumps(vars(kind.case(8, *([16] * (2 if kind.case is not RowCase else 1)))))))


def test_run_prints_provenance_first(capsys):
    options = bench_row.arguments(
        "benchmarks.bench_row", "", ["--rounds", "1", "--no-memory", "--warm", "--only", "lean"]
    )
    run("row", [SMALL], [], options)
    first = capsys.readouterr().out.splitlines()
    assert (
        first[1].startswith("commit ")
        and "perf_counter, warm cache" in first[1]
        and first[2].startswith("traffic model")
    )
