"""What a run prints and leaves behind: table, file, comparison, plots, memory; and what the command refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, gpu_report, plots, provenance, report
from benchmarks.gpu.programs import append
from benchmarks.harness import Outcome
from benchmarks.kinds import KINDS, row
from benchmarks.kinds.linear import LinearCase
from benchmarks.kinds.row import RowCase
from benchmarks.memory import NotMeasuredError, peak_extra_bytes

SMALL = RowCase(rows=12, vocab=257, responses=4)
RESULTS = Path(report.__file__).parent / "results"


def timed(name: str, median: float, objective: str | None = "gft", spread: float = 0.1, **more) -> Outcome:
    figures = {"error": 0.0, "worst_row_error": 0.0, "rounds": 1, "median_s": median, "over_floor": median}
    return Outcome(name, "timed", objective, p10_s=median - spread, p90_s=median + spread, **figures, **more)


def result_of(case, *outcomes: Outcome, kind: str = "row") -> report.CaseResult:
    return report.CaseResult(kind, asdict(case), case.label(), 100, list(outcomes))


def saved(path: Path, *results: report.CaseResult, **changes) -> Path:
    made = report.Report("python -m benchmarks row", "clock", 3, results=list(results))
    report.write(path, json.loads(json.dumps(made.as_json() | changes)))
    return path


# ---- the table


def table(*outcomes: Outcome, told: set | None = None) -> str:
    return report.table(asdict(result_of(SMALL, *outcomes)), told)


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


@pytest.mark.parametrize(("others", "winner"), [
    ([timed("eager", 1.0), timed("slow", 9.0)], "eager"),
    ([timed("eager", 3.0)], None),
    ([timed("cross", 1.0, "cross-entropy")], "cross"),  # another objective counts too
    ([timed("floor", 1.0, None)], None),
])  # fmt: skip
def test_losing_shapes_are_found(others, winner):
    found = report.winner_over_us(asdict(result_of(SMALL, timed("gft_loss cpu", 2.0), *others)))
    assert (found and found["name"]) == winner


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (900.0, True), (None, False)])
def test_a_busy_machine_is_told(load, busy):
    assert ("the machine is busy" in report.Report("", "clock", 1, load_average=load).header()) is busy


# ---- the file


def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    tiny = [SMALL, replace(SMALL, dead="masked"), replace(SMALL, vocab=300)]
    others = [replace(SMALL, vocab=500)]
    monkeypatch.setitem(KINDS, "row", replace(KINDS["row"], cases=lambda *_args, **_kwargs: tiny + others))
    file = tmp_path / "row.json"
    options = ["--quick", "--rounds", "2", "--no-memory", "--warm", "--only", "reference", "--save", str(file),
               "--case", "12 × 257", "--case", "12 × 300"]  # fmt: skip
    assert command.main(["row", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("commit ") and "perf_counter, warm cache" in printed[1]
    assert any("gft_loss reference" in line for line in printed)
    raw, loaded = json.loads(file.read_text()), report.load(file)
    named = "format command taken load_average commit machine versions allocator clock rounds traffic_model results"
    assert set(raw) == set(named.split())
    assert raw["command"] == shlex.join(["python", "-m", "benchmarks", "row", *options])
    assert raw["commit"].keys() == {"revision", "dirty"} and raw["versions"]["torch"] == torch.__version__
    assert raw["machine"]["cpu"] and raw["machine"]["cores"] and "instruction_sets" in raw["machine"]
    assert [RowCase(**result["case"]) for result in loaded["results"]] == tiny, "inputs can be made again from the file"
    outcome = next(o for o in loaded["results"][0]["outcomes"] if o["name"] == "gft_loss reference")
    assert outcome["status"] == "timed" and outcome["rounds"] == 2
    assert outcome["p10_s"] <= outcome["median_s"] <= outcome["p90_s"] and outcome["error"] < 1e-5
    started = []
    monkeypatch.setattr(command.subprocess, "call", lambda words: started.append(words) or 3)
    assert command.main(["--again", str(file)]) == 3, "its own exit status, from a process with its own allocator"
    assert started == [[sys.executable, "-m", "benchmarks", "row", *options]]


def test_a_case_whose_model_is_not_here_is_lost_alone(monkeypatch, capsys):
    def build(case):
        raise ValueError("model must be on this machine, got none; pip install it")

    monkeypatch.setitem(KINDS, "step", replace(KINDS["step"], build=build))
    assert command.main(["step", "--quick", "--no-memory"]) == 0
    assert "all: failed: ValueError: model must be on this machine, got none; pip install it" in capsys.readouterr().out


def test_a_tree_is_as_committed_whatever_has_been_measured_there(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "benchmarks" / "provenance.py"))
    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "row.json"
    result.parent.mkdir(parents=True)
    for file in (code, result):
        file.write_text("before")
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
    result.write_text("after")
    assert not provenance.commit()["dirty"] and len(provenance.commit()["revision"]) == 40
    code.write_text("after")
    assert provenance.commit()["dirty"]
    monkeypatch.setenv("GFT_COMMIT", "abc")
    assert provenance.commit() == {"revision": "abc", "dirty": False}, "a copy of a tree, which git cannot speak for"


def test_a_file_holds_no_default_and_loads_with_all_of_them(tmp_path):
    before = timed("a", 1.23456789)
    path = saved(tmp_path / "a.json", result_of(SMALL, before))
    text = path.read_text()
    assert "1.23456789" not in text and "extra_bytes" not in text and "seed" not in text
    (result,) = report.load(path)["results"]
    rounded = replace(before, median_s=1.235, over_floor=1.235, p10_s=1.135, p90_s=1.335)
    assert RowCase(**result["case"]) == SMALL and result["outcomes"] == [asdict(rounded)]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_committed_files_are_small_and_name_their_command(path):
    loaded = report.load(path)
    assert path.stat().st_size < 50_000 and "samples" not in path.read_text()
    if "gpu" in loaded["machine"]:  # left by benchmarks.gpu, and put here with the card's name
        *_, written = shlex.split(loaded["command"])
        assert Path(written).name == path.name.replace(f"-{gpu_report.CARD}", "") != path.name
        assert not loaded["commit"]["dirty"] and len(loaded["commit"]["revision"]) == 40
    else:
        assert loaded["command"].endswith(f"--save benchmarks/results/{path.name}")
    for result in loaded["results"]:
        assert KINDS[result["benchmark"]].case(**result["case"]).label() == result["label"]


# ---- the blocks about a GPU

GPU = {"gpu": "NVIDIA X", "multiprocessors": 7, "compute_capability": "9.0", "cuda": "13.0"}


def test_without_files_a_gpu_is_not_yet_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    assert gpu_report.short() == gpu_report.whole() == gpu_report.NOTHING


def test_files_of_a_gpu_become_tables_that_say_what_was_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    bf16, wide = (RowCase(8, 99, "bfloat16", device="cuda"), RowCase(8, 999, "bfloat16", device="cuda"))
    commit = {"revision": "0123456789abcdef", "dirty": False}
    head = LinearCase(8, 16, 64, "bfloat16", device="cuda")
    saved(tmp_path / "row-h200.json", result_of(bf16, FLOOR, timed("gft_loss cuda", 2.0), timed("peer", 3.0, "grpo")),
          result_of(wide, FLOOR, timed("gft_loss cuda", 3.0), timed("peer", 2.0, "grpo"),
                    Outcome("broken", "failed", why="no room")), machine=GPU, commit=commit)  # fmt: skip
    short = gpu_report.short()
    assert "NVIDIA X" in short and "0123456789ab" in short and f"torch {torch.__version__}" in short
    assert "| peer (grpo) | 3 s | 3.00 |" in short and "999 |" not in short, "one case of a dtype"
    slower = "**Slower** at 8 × 999 bfloat16: peer is 1.50 times as fast."
    assert slower in short
    saved(tmp_path / "linear-h200.json", result_of(head, timed("gft_linear_loss cuda", 1.0), kind="linear"),
          machine=GPU, commit=commit)  # fmt: skip
    launch = {"kernel": "void gft::cuda::cluster_row<gft::cuda::Bf16, false>(RowTask, int)", "read_bytes": 1.5e9,
              "written_bytes": 1e9, "nanoseconds": 1e6, "issue_active_percent": 38.6, "passes": 2.01}  # fmt: skip
    traffic = {"stage": "traffic-0", "case": "4 × 9", "launches": [launch, {"kernel": "x"}]}
    append(tmp_path / "speed-h200.jsonl", traffic)
    for line in ({"stage": "memcheck", "outcome": "failed"}, {"stage": "gpu-tests", "tests": {"passed": 5}}):
        append(tmp_path / "correctness-h200.jsonl", line)
    whole = gpu_report.whole()
    assert "7 multiprocessors" in whole and "| gft_loss cuda | 2 s (2.00) | 3 s (3.00) |" in whole and slower in whole
    assert "- broken: failed: no room." in whole and "| gft_linear_loss cuda | 1 s (1.00) |" in whole
    assert "| 4 × 9 | `cluster_row<Bf16, false>` | 2.01 | 2.50 TB/s | 39 % |" in whole
    assert "memcheck: failed; gpu-tests: 5 passed." in whole, "what failed is told"
    assert whole.count("Nobody was faster") == 1


# ---- comparison


def test_compare_tells_change_from_noise_and_refuses_another_machine(tmp_path, capsys):
    before = result_of(SMALL, timed("a", 1.0), timed("b", 1.0), timed("gone", 1.0))
    after = result_of(SMALL, timed("a", 1.15), timed("b", 2.0), timed("new", 1.0))
    paths = [saved(tmp_path / "a.json", before), saved(tmp_path / "b.json", after)]
    assert compare.compare(*paths) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(words[0], *words[-2:]) for words in printed] == [("a", "1.15", "same"), ("b", "2.00", "slower")]
    saved(tmp_path / "b.json", after, machine={"cpu": "another"})
    assert compare.compare(*paths) == 1
    assert "not comparable: machine differs" in capsys.readouterr().err


FLOOR = timed("floor: a", 0.5, None)
OURS = timed("gft_loss cpu", 1.0, spread=0.0)


def reproduced(tmp_path, case, *peers: Outcome, committed: tuple[Outcome, ...], sets=((), ()), kind="row") -> int:
    """Exit status of --ratios; each file from a machine of its own, as any machine will do."""
    paths = [
        saved(tmp_path / f"{number}.json", result_of(case, FLOOR, OURS, *outcomes, kind=kind),
              machine={"cpu": number, "instruction_sets": list(sets[number])})
        for number, outcomes in enumerate((committed, peers))
    ]  # fmt: skip
    return command.main(["--compare", *map(str, paths), "--ratios"])


def test_a_ratio_holds_within_its_spread_and_tolerance_and_upwards(tmp_path, capsys):
    peer = timed("eager", 5.0, spread=0.0)
    assert reproduced(tmp_path, SMALL, replace(peer, p90_s=2.6), committed=(peer,)) == 0, "within 2 × for rows"
    assert reproduced(tmp_path, SMALL, timed("eager", 50.0), committed=(peer,)) == 0, "more than was claimed"
    assert reproduced(tmp_path, SMALL, timed("eager", 2.4, spread=0.2), committed=(peer,)) == 0, "its own spread"
    capsys.readouterr()
    assert reproduced(tmp_path, SMALL, timed("eager", 2.4, spread=0.0), committed=(peer,)) == 1
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if "DIFFERS" in line] == ["eager"]
    assert "0 of 1 ratios hold" in printed
    case, peer = LinearCase(8, 16, 64), timed("eager", 2.0, spread=0.0)
    for less, status in ((1.7, 0), (1.5, 1)):  # less is tolerated where products are nearly all of it
        found = timed("eager", less, spread=0.0)
        assert reproduced(tmp_path, case, found, committed=(peer,), kind="linear") == status


def test_only_the_same_work_is_compared(tmp_path, capsys):
    other = timed("cross", 9.0, "cross-entropy", spread=0.0)
    assert reproduced(tmp_path, SMALL, replace(other, median_s=1.0, p90_s=1.0), committed=(other,)) == 1
    assert "no case and contender in common" in capsys.readouterr().err, "floors and other objectives take no part"
    bf16, peer = replace(SMALL, dtype="bfloat16"), timed("eager", 5.0, spread=0.0)
    slow = timed("eager", 1.0, spread=0.0)
    assert reproduced(tmp_path, bf16, slow, committed=(peer,), sets=(("avx512_bf16",), ("avx2",))) == 1
    assert "no case and contender in common" in capsys.readouterr().err, "bf16 with and without instructions for it"


# ---- memory


def test_peak_memory_of_a_step_in_a_fresh_process():
    case = RowCase(rows=8, vocab=262144)  # 8 MiB of logits
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its high-water mark")
    lean = peak_extra_bytes("row", case, "eager PyTorch, lean")
    # bf16 inputs are made from fp32 ones: unless the high-water mark is reset, that peak would be reported
    assert peak_extra_bytes("row", replace(case, dtype="bfloat16"), row.FLOOR) < 1 << 20
    assert 15 << 20 < lean < 60 << 20, "log-softmax and gradient are two arrays of the logits' size at least"


def test_memory_that_cannot_be_measured_says_why():
    with pytest.raises(NotMeasuredError, match="nobody"):
        peak_extra_bytes("row", SMALL, "nobody")


# ---- plots


def sweeps(tmp_path) -> Path:
    """A file in which each curve has three points, and we lose at one."""
    wide = [replace(SMALL, rows=12 // n, vocab=257 * n) for n in (2, 3)]
    more = [replace(SMALL, rows=12 * n) for n in (2, 3)]
    ours = timed("gft_loss cpu", 2.0, extra_bytes=1 << 20, reads=1, writes=1)
    results = [result_of(case, ours, timed("x", 1.0 if case == SMALL else 4.0), timed("floor", 0.5, None))
               for case in (SMALL, *wide, *more)]  # fmt: skip
    head, eager = LinearCase(8, 16, 64), (timed("eager PyTorch, lean", 3.0), timed("floor", 0.9, None))
    for share, time in ((0.0, 2.0), (0.5, 1.0), (0.75, 1.0)):
        case = replace(head, dead="zero-advantage", dead_share=share) if share else head
        results.append(result_of(case, timed("gft_linear_loss cpu", time), *eager, kind="linear"))
    return saved(tmp_path / "all-cpu.json", *results)


def test_every_plot_is_drawn_from_a_file_and_carries_its_digest(tmp_path):
    pytest.importorskip("matplotlib")
    source = sweeps(tmp_path)
    written = {path.name: path for path in plots.draw([source], tmp_path)}
    curves = {f"all-cpu-{stem}-float32.svg" for stem in ("time", "memory", "live")}
    assert written.keys() == curves | {"roofline.svg"}
    bars = plots.bars(source, SMALL.label(), tmp_path / "bars.svg", "a product", "linear", (0, 0.25, 1))
    assert {"0.25", "1.00", "time over the floor: a product"} <= {t.text for t in texts(bars)}, "labels keep digits"
    written["bars.svg"] = bars
    for path in written.values():
        assert plots.sources(path) == {"all-cpu.json": plots.digest(source)}
        assert texts(path) and path.read_text().count("\n") < 12
    assert "someone else is faster" in written["all-cpu-time-float32.svg"].read_text()
    assert plots.LOST in written["all-cpu-time-float32.svg"].read_text()
    assert "someone else is faster" not in written["all-cpu-live-float32.svg"].read_text()
    before = written["roofline.svg"].read_bytes()
    plots.draw([source], tmp_path)
    assert written["roofline.svg"].read_bytes() == before, "the same file gives the same plot"


def test_the_roofline_is_a_cpus(tmp_path):
    ours, on_cpu = timed("gft_loss cuda", 1.0), sweeps(tmp_path)
    large = [result_of(replace(SMALL, rows=n, device="cuda"), ours) for n in (999, 1999)]
    _, _, drawn_from = plots._roofline_cases([on_cpu, saved(tmp_path / "row-gpu.json", *large)])
    assert drawn_from == [on_cpu]


def texts(plot):
    return ElementTree.parse(plot).getroot().findall(".//{*}text")


def test_the_live_sweep_is_ordered_by_what_is_alive(tmp_path):
    points = plots.sweep(report.load(sweeps(tmp_path)), "float32", "live", "linear")
    assert [plots.live(r["case"]) for r in points] == [0.25, 0.5, 1.0]


# ---- the command


@pytest.mark.parametrize(
    "bad", [["rows"], ["row", "--sweep", "live"], ["--sweep", "tau"], ["--device", "tpu"], ["--budget", "9"],
            ["--compare", "none.json", "none.json"], ["--again", "none.json"]]
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(bad, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(bad)
    assert ended.value.code == 2 and "python -m benchmarks: error:" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", provenance.ALLOCATORS)
def test_another_allocator_restarts_once(wanted, monkeypatch):
    started = []
    monkeypatch.setattr(provenance.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(provenance.os, "execve", lambda *call: started.append(call))
    environments = {"keep": provenance.KEEP_FREED_BLOCKS, "default": {}}
    for now, environment in environments.items():
        monkeypatch.setattr(provenance.os, "environ", environment)
        provenance.restart_under(wanted, "benchmarks")
        assert ("MALLOC_MMAP_MAX_=0" in provenance.allocator()) is (now == "keep")
    [(_, words, environment)] = started
    assert words[1:3] == ["-m", "benchmarks"] and environment == environments[wanted]
