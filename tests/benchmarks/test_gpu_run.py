"""`python -m benchmarks.gpu`: what can be checked of it without a GPU."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import profiler, stages
from benchmarks.gpu.one_call import CASES

NCU = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","dram__bytes_read.sum","byte","1,250,000,000"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","dram__bytes_write.sum","byte","1,240,000,000"
"0","7","void cluster_row<Bf16, 0>(RowTask, int)","gpu__time_duration.sum","ns","900000"
"""


def test_the_profilers_table_is_set_beside_the_traffic_model():
    (launch,) = profiler.read(NCU)
    first = CASES[0]
    assert launch["logits_bytes"] == first.rows * first.vocab * 2
    assert launch["passes"] == pytest.approx(2.49e9 / launch["logits_bytes"])
    assert launch["over_floor"] == pytest.approx(launch["passes"] / 2)
    assert profiler.read("==ERROR== no permission") == []


def run_in(tmp_path, limit=60.0):
    return stages.Run(tmp_path, tmp_path, limit)


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    result = stages.program(run_in(tmp_path), "hang", [sys.executable, "-c", hang], 1.0)
    assert result.outcome == "out of time" and result.seconds < 10


def test_a_program_that_fails_is_told_with_its_output(tmp_path):
    result = stages.program(run_in(tmp_path), "fail", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 30)
    assert (result.outcome, result.why, result.output.strip()) == ("failed", "exit status 3", "why")


def test_failures_of_a_test_report_are_kept(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="b"><failure message="m">text</failure></testcase>'
        '<testcase classname="a" name="c"><skipped message="no GPU"/></testcase>'
        '<testcase classname="a" name="d"/></testsuite></testsuites>'
    )
    read = stages.read_junit(report)
    assert read["tests"] == 3 and read["skip_reasons"] == {"no GPU": 1}
    assert read["failed"] == [{"test": "a::b", "message": "text"}]


def test_a_failed_stage_does_not_stop_the_next(tmp_path, monkeypatch):
    ran = []

    def stage(name, outcome):
        def run(_run):
            ran.append(name)
            return stages.StageResult(name, outcome, 0.0)

        return run

    monkeypatch.setattr(gpu, "STAGES", {"one": stage("one", "failed"), "two": stage("two", "passed")})
    assert gpu.main(["--results", str(tmp_path), "--commit", "abc"]) == 1
    summary = json.loads((tmp_path / "run.json").read_text())
    assert ran == ["one", "two"]
    assert [entry["outcome"] for entry in summary["stages"]] == ["failed", "passed"]
    assert summary["commit_given"] == "abc" and "machine" in summary and "versions" in summary


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--results", str(tmp_path), "--stages", "bild"])
    assert "bild" in capsys.readouterr().err
