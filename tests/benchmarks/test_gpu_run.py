"""`python -m benchmarks.gpu`, rehearsed without a GPU: every stage, every kind of failure, what is left of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import lines, prebuilt, programs, stub, summary, traffic
from benchmarks.gpu.stages import PROFILES, Run

ROOT = Path(__file__).parents[2]


def names(profile: str) -> set[str]:
    return {stage.name for step in PROFILES[profile].steps for stage in step}


def rehearse(tmp_path, profile: str, *options: str) -> tuple[int, dict[str, dict], list[Path]]:
    code = gpu.main([profile, "--results", str(tmp_path), "--stub", "--commit", "abc", *options])
    lines = [json.loads(line) for line in (tmp_path / f"{profile}.jsonl").read_text().splitlines()]
    return code, {line["stage"]: line for line in lines}, sorted(path for path in tmp_path.iterdir() if path.is_file())


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_is_reached_and_the_summary_comes_last(tmp_path, capsys, monkeypatch, profile):
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    code, found, files = rehearse(tmp_path, profile)
    assert code == 0 and found.keys() == names(profile)
    assert {line["outcome"] for line in found.values()} == {"passed"}, found
    assert len(files) <= 4 and found["machine"]["commit"]["revision"] == "abc" and found["machine"]["nvidia_smi"]
    assert found["machine"]["machine"]["home"], "one that can be written, where HOME says nothing of use"
    printed = capsys.readouterr().out
    table = printed[printed.index("stage            outcome") :]
    if profile == "correctness":
        assert "gpu-tests.jsonl: 1 passed" in table and "oracle-tests.jsonl: 7 passed" in table
    else:
        assert "row.json: 8192 × 128256 row" in table and "1.20 × floor" in table and "OutOfMemoryError" in table
        assert "traffic-0: void cluster_row" in table and "2.00 passes (floor 2), 71 % of issue slots" in table


def test_reserves_add_up_and_bfloat16_comes_first():
    for profile in PROFILES.values():
        assert sum(max(stage.reserve_s for stage in step) for step in profile.steps) <= profile.limit_s
    assert PROFILES["correctness"].limit_s <= 240 and PROFILES["speed"].limit_s <= 360
    assert traffic.CASES[0][2] == "bfloat16"


FAULTY = {
    "correctness": {"build": "fail", "calls": "sticky", "gpu-tests": "oom", "oracle-tests": "torn",
                    "memcheck": "missing", "racecheck": "flood"},
    "speed": {"machine": "silent", "build": "missing", "row": "oom", "linear": "torn", "small": "fail",
              "traffic-0": "silent", "machine-after": "flood"},
}  # fmt: skip


@pytest.mark.parametrize("profile", FAULTY)
def test_every_kind_of_failure_is_kept_and_the_rest_goes_on(tmp_path, capsys, monkeypatch, profile):
    faults = FAULTY[profile]
    monkeypatch.setenv("GFT_STUB", ",".join(f"{stage}={fault}" for stage, fault in faults.items()))
    code, found, _ = rehearse(tmp_path, profile)
    assert code == 1 and found.keys() == names(profile)
    wrong = {stage for stage, fault in faults.items() if fault not in ("silent", "flood")}
    assert {name for name, line in found.items() if line["outcome"] == "failed"} == wrong
    assert {line["outcome"] for name, line in found.items() if name not in wrong} == {"passed"}
    for stage, fault in faults.items():
        assert stub.MESSAGES.get(fault, "") in found[stage].get("output", "")
    printed = capsys.readouterr().out
    if profile == "correctness":
        assert "FAILED tests/backends/gpu::test: E   assert 1 == 2" in printed, "by name"
        assert "oracle-tests.jsonl: 6 failed" in printed, "the last line is torn"
    else:
        assert "read_failed" in found["machine"], "a tool that prints nothing"
        assert "row.json: 8192 × 151936 row" in printed, "the case that was done before it failed"
        assert printed.count("row.json:") == 1 and "linear.json cannot be read: JSONDecodeError" in printed


def alive(word: str) -> list[int]:
    """Processes with a word in their command line."""
    return [one.pid for one in psutil.process_iter(["cmdline"]) if word in " ".join(one.info["cmdline"] or ())]


def test_who_hangs_is_interrupted_killed_with_its_children_and_the_reserves_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("GFT_STUB", "build=hang")
    monkeypatch.setattr(programs, "GRACE_S", 0.5)
    started = time.monotonic()
    code, found, _ = rehearse(tmp_path, "correctness", "--stages", "build,calls", "--limit", "29")
    assert code == 1 and found["build"]["outcome"] == "out of time" and 3 < found["build"]["seconds"] < 9
    assert found["calls"]["outcome"] == "passed" and time.monotonic() - started < 29


def test_the_stages_of_a_step_run_at_once_and_each_has_its_own_end(tmp_path, monkeypatch):
    monkeypatch.setenv("GFT_STUB", "gpu-tests=hang,memcheck=hang,racecheck=oom")
    monkeypatch.setattr(programs, "GRACE_S", 0.5)
    started = time.monotonic()
    stages = "gpu-tests,oracle-tests,memcheck,racecheck"
    _, found, _ = rehearse(tmp_path, "correctness", "--stages", stages, "--limit", "3.1")
    assert time.monotonic() - started < 5, "two that hang, one after the other, would take 6 s"
    outcomes = {"gpu-tests": "out of time", "memcheck": "out of time", "racecheck": "failed", "oracle-tests": "passed"}
    assert {name: line["outcome"] for name, line in found.items()} == outcomes
    assert set(list(found)[2:]) == {"gpu-tests", "memcheck"}, "who is done is written down before who hangs"


def test_interrupted_it_writes_what_it_has(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    program = programs.Program([sys.executable, "-c", code], 6.0, tmp_path / "log", dict(os.environ))
    while not (ended := program.ended()):
        time.sleep(0.05)
    assert (ended.outcome, ended.output.strip()) == ("out of time", "written") and ended.seconds < 8


@pytest.mark.parametrize(
    ("profile", "stages", "hang", "end"),
    [("correctness", "gpu-tests,oracle-tests", ("gpu-tests", "oracle-tests"), signal.SIGTERM),
     ("correctness", "gpu-tests,oracle-tests", ("gpu-tests", "oracle-tests"), signal.SIGKILL),
     ("speed", "row,linear", ("row",), signal.SIGTERM)],
)  # fmt: skip
def test_a_stage_never_outlives_its_driver(tmp_path, profile, stages, hang, end):
    options = ["--stub", "--stages", stages, "--results", str(tmp_path)]
    driver = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", profile, *options], cwd=ROOT, text=True,
                              env={**os.environ, "GFT_STUB": ",".join(f"{stage}=hang" for stage in hang)},
                              stdout=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 20
    own = 1 + 2 * len(hang)  # the driver, its programs, and what those started
    while len(alive(str(tmp_path))) < own and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(end)
    printed, _ = driver.communicate(timeout=20)
    while alive(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(str(tmp_path)) == []
    if end == signal.SIGTERM:
        lines = {line["stage"]: line for line in programs.lines_of(tmp_path / f"{profile}.jsonl")}
        assert lines.keys() == set(hang), "and no further stage"
        assert {(line["outcome"], line["why"]) for line in lines.values()} == {("stopped", "ended by SIGTERM")}
        assert f"{hang[0]:<16} stopped" in printed, "the summary"


def test_results_that_no_file_takes_are_printed(capsys):
    programs.append(Path("/dev/full"), {"stage": "row", "outcome": "passed"})
    assert capsys.readouterr().out == 'full: No space left on device; {"stage": "row", "outcome": "passed"}\n'


@pytest.mark.parametrize(("name", "stages", "message"), [
    ("file", "row", "--results must be a folder, got"),
    ("folder", "row,bild", "--stages must be some of machine, build, row, linear, small, traffic-0"),
])  # fmt: skip
def test_a_folder_that_cannot_be_made_and_an_unknown_stage_are_refused(tmp_path, capsys, name, stages, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main(["speed", "--results", str(tmp_path / name), "--stages", stages])
    assert message in capsys.readouterr().err


def test_a_tool_that_is_not_there_skips_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "tool", lambda run, name: None)
    code, found, _ = rehearse(tmp_path, "correctness", "--stages", "memcheck")
    assert code == 0 and found["memcheck"]["outcome"] == "skipped"
    assert found["memcheck"]["why"] == "compute-sanitizer is not on this machine"


def test_the_profilers_table_is_set_beside_the_traffic_model():
    output = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","dram__bytes_read.sum","byte","1,250,000,000"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","dram__bytes_write.sum","byte","1,240,000,000"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","gpu__time_duration.sum","ns","900000"
"""
    (launch,) = traffic.read(0, None, output)["launches"]
    assert launch["passes"] == pytest.approx(2.49e9 / (4096 * 151936 * 2))
    assert traffic.read(0, None, "==ERROR== no permission")["launches"] == []


TESTS = """
import os, time
poisoned = []
def test_good(): pass
def test_bad(): assert 1 == 2
def test_sticky(): poisoned.append(1); raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_on_another_gpu(): assert not poisoned
def test_hangs(): time.sleep(60)
def test_crashes(): os.abort()
def test_last(): pass
"""
BESIDE = """
import time, pytest
@pytest.fixture(params=range(30), autouse=True)
def passed_before_it_ends(): yield; time.sleep(0.2)
def test_good(): pass
"""


def test_what_one_test_breaks_the_others_do_not_notice(tmp_path, capsys):
    """A failure goes on; after a GPU that is lost, a hang or a crash the tests that are left run in a new process."""
    for name, text in (("test_it", TESTS), ("test_beside", BESIDE)):
        (tmp_path / f"{name}.py").write_text(text)
    file, paths = tmp_path / "gpu-tests.jsonl", [str(tmp_path / f"{name}.py") for name in ("test_it", "test_beside")]
    assert lines.main(file, [*paths, "--test-limit", "3"]) == pytest.ExitCode.INTERRUPTED, "the first's"
    found = {line["test"]: line for line in programs.lines_of(file)}
    ended = {name.partition("::")[2]: line["outcome"] for name, line in found.items() if "test_it" in name}
    outcomes = ("passed", "failed", "failed", "passed", "begun", "begun", "passed")
    assert tuple(ended.values()) == outcomes and list(ended)[4:6] == ["test_hangs", "test_crashes"]
    assert len({line["process"] for line in found.values()}) == 5, "one for the other file"
    table = summary.text(tmp_path, [])
    assert "33 passed, 2 failed, 2 begun" in table and "::test_hangs: it ended the process, or took 3 s" in table


def test_of_many_failures_the_first_are_named(tmp_path):
    for i in range(30):
        programs.append(tmp_path / "gpu-tests.jsonl", {"test": f"t{i}", "outcome": "failed", "why": "E   no"})
    table = summary.text(tmp_path, [])
    assert "FAILED t19" in table and "t20" not in table and "and 10 more" in table


def test_a_module_that_asks_for_a_newer_libc_than_the_machines_is_named():
    table = "0000 DF *UND* 0000 (GLIBC_2.4) memcpy\n0000 DF *UND* 0000 (GLIBC_2.34) x\n0000 DO *UND* (GLIBCXX_3.4.30) y"
    assert prebuilt.too_new(table, {"GLIBC": "2.35", "GLIBCXX": "3.4.30"}) == []
    (sentence,) = prebuilt.too_new(table, {"GLIBC": "2.31", "GLIBCXX": "3.4.30"})
    assert sentence.startswith("GLIBC must be at most 2.31 there, got 2.34"), "2.34 is newer than 2.4"
    assert len(prebuilt.too_new(table, {"GLIBC": "2.31", "GLIBCXX": "3.4.28"})) == 2


def test_a_python_without_the_tools_is_refused():
    with pytest.raises(SystemExit, match=r"must have no_such_tool, got .* without no_such_tool"):
        prebuilt.build(sys.executable, "90-real", needed=("no_such_tool",))


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """What lies where a module made from these sources would lie."""
    (tmp_path / "csrc").mkdir()
    for name in ("CMakeLists.txt", "setup.py", "csrc/kernel.cuh"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(prebuilt, "ROOT", tmp_path)
    (tmp_path / "_C.so").write_bytes(b"code" + prebuilt.mark())
    return tmp_path / "_C.so"


@pytest.mark.parametrize(
    ("probe", "reason"),
    [("", None), ("import sys; sys.exit('it has no CUDA kernels')", "it has no CUDA kernels"),
     ("import os; os.abort()", "exit status -6"),
     ("import time; time.sleep(9)", "a small call does not end within 1 s")],
)  # fmt: skip
def test_a_module_fits_that_runs_a_kernel(module, monkeypatch, probe, reason):
    monkeypatch.setattr(prebuilt, "PROBE", probe)
    monkeypatch.setattr(prebuilt, "PROBE_S", 1.0)
    assert prebuilt.unfit(module) == reason


def test_a_module_of_other_sources_does_not_fit(module):
    assert prebuilt.unfit(module.with_name("_C.other.so")) == "there is none"
    (module.parent / "csrc" / "kernel.cuh").write_text("changed")
    assert prebuilt.unfit(module) == "it was made from other sources"


def test_sources_from_a_clock_that_is_ahead_become_of_today(module):
    source = module.parent / "csrc" / "kernel.cuh"
    os.utime(source, (2e9, 2e9 + 86400 * 36500))
    prebuilt.touch_what_is_ahead()
    assert source.stat().st_mtime <= time.time() + 1


def test_wheels_that_share_a_package_or_bring_a_path_file_are_found(tmp_path):
    """As quack's compiler comes: one package in two wheels, and a third that adds a folder to the path."""
    contents = {"shared/a.py": ("one", "X = 1"), "shared/b.py": ("two", "Y = 2"), "more.pth": ("three", "inner"),
                "inner/deep.py": ("three", "Z = 3")}  # fmt: skip
    for path, (name, text) in contents.items():
        with zipfile.ZipFile(tmp_path / f"{name}-1-py3-none-any.whl", "a") as wheel:
            wheel.writestr(path, text)
    run = Run(tmp_path, tmp_path / "scratch")
    command = gpu.wheels(run, tmp_path).command(run)
    subprocess.run(command, check=True)
    code = "import shared.a, shared.b, deep; print(shared.a.X + shared.b.Y + deep.Z)"
    found = subprocess.run([sys.executable, "-c", code], env=run.environment, capture_output=True, text=True)
    assert found.stdout == "6\n", found.stderr
