"""`python -m benchmarks.gpu`, rehearsed without a GPU: every stage, every kind of failure, what is left of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import prebuilt, programs, stub, traffic
from benchmarks.gpu.stages import PROFILES, Run
from benchmarks.kinds.row import logits_bytes

ROOT = Path(__file__).parents[2]


def rehearse(tmp_path, profile: str, *options: str) -> tuple[int, dict[str, dict], list[Path]]:
    code = gpu.main([profile, "--results", str(tmp_path), "--stub", "--commit", "abc", *options])
    lines = [json.loads(line) for line in (tmp_path / f"{profile}.jsonl").read_text().splitlines()]
    return code, {line["stage"]: line for line in lines}, sorted(path for path in tmp_path.iterdir() if path.is_file())


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_is_reached_and_the_summary_comes_last(tmp_path, capsys, profile):
    code, found, files = rehearse(tmp_path, profile)
    assert code == 0 and list(found) == [stage.name for stage in PROFILES[profile].stages]
    assert {line["outcome"] for line in found.values()} == {"passed"}, found
    assert len(files) <= 4 and found["machine"]["commit_given"] == "abc" and found["machine"]["nvidia_smi"]
    printed = capsys.readouterr().out
    table = printed[printed.index("stage            outcome") :]
    if profile == "correctness":
        assert "tests: 4 passed" in table
    else:
        assert "row.json: 8192 × 128256 row" in table and "1.20 × floor" in table and "OutOfMemoryError" in table
        assert "traffic-0: void cluster_row" in table and "2.00 passes (floor 2), 71 % of issue slots" in table


def test_reserves_add_up_and_bfloat16_comes_first():
    for profile in PROFILES.values():
        assert sum(stage.reserve_s for stage in profile.stages) <= profile.limit_s
    assert PROFILES["correctness"].limit_s <= 240 and PROFILES["speed"].limit_s <= 360
    assert traffic.CASES[0].dtype == "bfloat16"


FAULTY = {
    "correctness": {"build": "fail", "calls": "sticky", "gpu-tests": "oom", "memcheck": "missing",
                    "racecheck": "silent"},
    "speed": {"machine": "silent", "build": "missing", "row": "oom", "small": "fail", "traffic-0": "silent"},
}  # fmt: skip


@pytest.mark.parametrize("profile", FAULTY)
def test_every_kind_of_failure_is_kept_and_the_rest_goes_on(tmp_path, capsys, monkeypatch, profile):
    faults = FAULTY[profile]
    monkeypatch.setenv("GFT_STUB", ",".join(f"{stage}={fault}" for stage, fault in faults.items()))
    code, found, _ = rehearse(tmp_path, profile)
    assert code == 1 and list(found) == [stage.name for stage in PROFILES[profile].stages]
    wrong = {stage for stage, fault in faults.items() if fault != "silent"}
    assert {name for name, line in found.items() if line["outcome"] == "failed"} == wrong
    assert {line["outcome"] for name, line in found.items() if name not in wrong} == {"passed"}
    for stage, fault in faults.items():
        assert stub.MESSAGES.get(fault, "") in found[stage].get("output", "")
    printed = capsys.readouterr().out
    if profile == "correctness":
        assert "FAILED tests/backends/gpu::test: E   assert 1 == 2" in printed, "by name"
        assert "tests: 1 failed, 3 passed" in printed
    else:
        assert "read_failed" in found["machine"], "a tool that prints nothing"
        assert "row.json: 8192 × 151936 row" in printed, "the case that was done before it failed"
        assert printed.count("row.json:") == 1 and printed.count("linear.json:") == 2


def alive(word: str) -> list[int]:
    """Processes with a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(entry.parent.name)] if word in entry.read_text() else []
        except OSError:
            continue
    return found


def test_who_hangs_is_interrupted_killed_with_its_children_and_the_reserves_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("GFT_STUB", "build=hang")
    monkeypatch.setattr(programs, "GRACE_S", 0.5)
    started = time.monotonic()
    code, found, _ = rehearse(tmp_path, "correctness", "--stages", "build,calls", "--limit", "26")
    assert code == 1 and found["build"]["outcome"] == "out of time" and found["build"]["seconds"] < 9
    assert found["calls"]["outcome"] == "passed" and time.monotonic() - started < 26


def test_interrupted_it_writes_what_it_has(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    ended = programs.run([sys.executable, "-c", code], 6.0, tmp_path / "log", dict(os.environ))
    assert (ended.outcome, ended.output.strip()) == ("out of time", "written") and ended.seconds < 8


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_never_outlives_its_driver(tmp_path, end):
    word = f"time.sleep(61); '{tmp_path.name}-{end}'"
    code = f"""
import os, sys
from pathlib import Path
from benchmarks.gpu import programs
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
child = [sys.executable, "-c", "import time; {word}"]
parent = "import subprocess, sys; subprocess.run(" + repr(child) + ")"
programs.run([sys.executable, "-c", parent], 60, Path({str(tmp_path / "log")!r}), dict(os.environ))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 20
    while len(alive(word)) < 3 and time.monotonic() < deadline:  # the driver, its program, and what that started
        time.sleep(0.1)
    driver.send_signal(end)
    driver.wait(20)
    while alive(word) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(word) == []


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
    assert launch["passes"] == pytest.approx(2.49e9 / logits_bytes(traffic.CASES[0]))
    assert traffic.read(0, None, "==ERROR== no permission")["launches"] == []


def test_tests_leave_a_line_each_as_they_end(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    file = tmp_path / "tests.jsonl"
    command = [
        "-m",
        "pytest",
        "-p",
        "benchmarks.gpu.lines",
        "--test-lines",
        file,
        "-p",
        "no:cacheprovider",
        "-q",
        tmp_path,
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=60)
    good, bad = map(json.loads, file.read_text().splitlines())
    assert good["outcome"] == "passed" and bad["outcome"] == "failed" and "assert 1 == 2" in bad["why"]


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["speed", "--results", str(tmp_path), "--stages", "bild"])
    assert "bild" in capsys.readouterr().err


def test_a_module_that_asks_for_a_newer_libc_than_the_machines_is_named():
    table = "0000 DF *UND* 0000 (GLIBC_2.4) memcpy\n0000 DF *UND* 0000 (GLIBC_2.34) x\n0000 DO *UND* (GLIBCXX_3.4.30) y"
    assert prebuilt.too_new(table, {"GLIBC": "2.35", "GLIBCXX": "3.4.30"}) == []
    (sentence,) = prebuilt.too_new(table, {"GLIBC": "2.31", "GLIBCXX": "3.4.30"})
    assert sentence.startswith("GLIBC must be at most 2.31 there, got 2.34"), "2.34 is newer than 2.4"
    assert len(prebuilt.too_new(table, {"GLIBC": "2.31", "GLIBCXX": "3.4.28"})) == 2


def test_a_python_without_the_tools_is_refused():
    with pytest.raises(SystemExit, match=r"must have no_such_tool, got .* without no_such_tool"):
        prebuilt.build(sys.executable, needed=("no_such_tool",))
