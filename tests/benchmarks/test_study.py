"""benchmarks/experiments: a tiny study from end to end, what a second run repeats, and the committed report."""

from __future__ import annotations

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat_tokenizers import chatml

from benchmarks.experiments import evaluation, jobs, report, results, runner, settings, verdicts, work
from benchmarks.experiments.__main__ import BAD_INPUT, DONE, main
from benchmarks.experiments.jobs import Folder
from benchmarks.experiments.methods import stages
from benchmarks.experiments.statistics import OverDraws
from gft_kernels.data import extract_json, scratch

ROOT = Path(__file__).parents[2]
TINY = {
    "name": "tiny",
    "task": {"name": "digit-sum", "digits": 5, "styles": {"left": 1.0}, "base_count": 64, "rows": 16, "width": 16,
             "layers": 1, "heads": 2},
    "base": {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_completion_length": 34},
    "stage": {"max_steps": 3, "per_device_train_batch_size": 2, "max_completion_length": 34, "eval_steps": 2,
              "per_device_eval_batch_size": 8},
    "follow_steps": 2,
    "evaluation": {"prompts": 4, "samples": 4, "retention": 8, "curve": 4},
    "rates": {"sft": 1e-4, "grpo": 1e-3, "gft": 1e-3},
    "grid": [{"chains": ["sft", "gft>grpo"], "experts": ["leap"], "bases": [0], "seeds": [0, 1]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Folder, list[str]]:
    """A study that has run to its end, and the lines it printed."""
    folder, lines = Folder(tmp_path_factory.mktemp("study")), []
    study = settings.from_dict(TINY)
    runner.keep_settings(study, folder)
    runner.run(study, folder, 1, "cpu", lines.append)
    return folder, lines


@pytest.fixture
def no_workers(monkeypatch):
    """Threads in place of processes, of which each imports transformers before its first job."""
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda jobs, *options, **more: ThreadPoolExecutor(jobs))


@pytest.mark.slow
def test_every_job_leaves_a_result_and_a_line_with_the_time_left(finished):
    folder, lines = finished
    assert lines[0] == "7 jobs, 0 already finished"
    assert len(list(folder.path.glob("results/*.json"))) == len(lines) - 1 == 7
    assert all(re.search(r"\[ +\d/7\] \w+.*pass@1 [\d.]+ .* s  left about \d+ min$", line) for line in lines[1:])
    record = folder.read("run_gft--grpo_leap_b0_s1")
    norms = record["training"]["grad_norm"]
    assert len(norms) == 11 and norms == sorted(norms) and record["rate"] == TINY["rates"]["grpo"]
    assert record["training"]["held_out"]["step"] == [0, 2]
    assert set(record["metrics"]["pass_at"]) == {"1", "2", "4"} and record["cpu_seconds"] > 0


def test_an_interrupted_study_repeats_the_missing_run_alone_and_to_the_same_numbers(finished, no_workers):
    folder, _ = finished
    before, name = folder.read("run_gft_leap_b0_s1"), "run_gft_leap_b0_s1"
    folder.result(name).unlink()
    lines: list[str] = []
    runner.run(settings.from_dict(TINY), folder, 1, "cpu", lines.append)
    assert lines[0] == "7 jobs, 6 already finished" and len(lines) == 2 and name in lines[1]
    for key in ("metrics", "training", "rate"):
        assert folder.read(name)[key] == before[key]


def test_a_folder_takes_a_larger_grid_but_no_other_settings(finished):
    folder, _ = finished
    larger = {**TINY, "grid": [*TINY["grid"], {"chains": ["sft"], "experts": ["leap"], "bases": [1], "seeds": [0]}]}
    runner.keep_settings(settings.from_dict(larger), folder)
    with pytest.raises(ValueError, match="follow_steps"):
        runner.keep_settings(settings.from_dict({**TINY, "follow_steps": 3}), folder)


def test_a_failed_job_names_itself(tmp_path, no_workers):
    broken = settings.from_dict({**TINY, "base": {**TINY["base"], "max_completion_length": 2}})
    with pytest.raises(runner.StudyError, match=r"base_b0: .*max_completion_length"):
        runner.run(broken, Folder(tmp_path), 1, "cpu", lambda line: None)


def test_the_report_follows_from_the_packed_results_alone(finished, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(results, "USABLE", 0.0)
    packed = results.pack(settings.from_dict(TINY), folder, "cpu")
    found = results.read(packed)
    assert len(found.records) == 7
    assert found.of("sft", "leap")[0]["metrics"] == folder.read("run_sft_leap_b0_s0")["metrics"]
    for name in "ab":
        assert main(["report", str(packed), "--out", str(tmp_path / name / "page.md")]) == DONE
    pages = [(tmp_path / name / "page.md").read_text() for name in "ab"]
    assert pages[0] == pages[1]
    plots = [sorted(path.read_bytes() for path in (tmp_path / name / "page").glob("*.svg")) for name in "ab"]
    assert plots[0] == plots[1] and len(plots[0]) == 5
    shown = [record["metrics"]["pass_at"]["1"] for record in found.of("sft", "leap")]
    assert f"| SFT | 2 | 0.0001 | {sum(shown) / 2:.3f}" in pages[0]


def test_the_committed_page_is_what_the_committed_results_say(tmp_path):
    files = sorted(results.PACKED.glob("*.jsonl"))
    page = report.write([results.read(path) for path in files], tmp_path / "experiments.md")
    committed = ROOT / "docs" / "experiments.md"
    assert page.read_text() == committed.read_text(), "make docs writes it anew"
    for path in (tmp_path / "experiments").iterdir():
        assert (ROOT / "docs" / "experiments" / path.name).is_file(), f"{path.name} is not committed"


def test_bad_input_is_one_sentence(capsys, tmp_path):
    assert main(["run", "nonsense"]) == BAD_INPUT
    assert main(["run", "quick", "--jobs", "0"]) == BAD_INPUT
    assert main(["report", str(tmp_path / "none.jsonl")]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert all(word in errors for word in ("a YAML file or one of bases, digits, digits7", "none.jsonl", "--jobs"))
    assert errors.count("\n") == 3


def test_a_weak_base_counts_in_no_mean_and_is_reported_apart(finished, tmp_path):
    folder, _ = finished
    larger = {**TINY, "grid": [{**TINY["grid"][0], "bases": [0, 1]}]}
    found = results.read(results.pack(settings.from_dict(larger), folder, "cpu"))
    records = [*found.records, *({**r, "base": 1} for r in found.records)]
    for record in (r for r in records if r["kind"] == "base" and r["base"] == 1):
        record["metrics"] = {**record["metrics"], "pass_at": {**record["metrics"]["pass_at"], "1": results.USABLE}}
    both = dataclasses.replace(found, records=records)
    assert {r["base"] for r in both.of("sft", "leap")} == {1}
    assert {r["base"] for r in both.of("sft", "leap", both.weak)} == {0}
    page = report.write([both], tmp_path / "page.md").read_text()
    assert "0.010 (base 1)" in page and "base 0 (0.000)" in page and "### Weak bases" in page


def test_what_was_planned_and_is_missing_is_said(finished):
    folder, _ = finished
    found = results.read(results.pack(settings.from_dict(TINY), folder, "cpu"))
    entry = {"claim": "c", "origin": "paper", "measure": "kl", "expect": "more"}
    entry["pairs"] = [["gft", "sft"], ["gft", "dft"]]
    some = [r for r in found.records if not (r["chain"] == "gft" and r["seed"] == 1)]
    less = dataclasses.replace(found, records=some, entries=[entry])
    first, second = verdicts.findings(less, "leap", less.bases)
    assert (first.difference.pairs, first.missing) == (1, 1) and second.said == "not testable here"
    decided = dataclasses.replace(first, said="held")
    assert verdicts.short([decided, second]) == "**held**; compared with 1 of 2 planned"


def test_a_registered_study_runs_from_a_commit_and_keeps_its_claims(tmp_path, monkeypatch):
    study = settings.from_dict({**TINY, "claims": "bases"})
    monkeypatch.setattr(runner.provenance, "commit", lambda: {"revision": "0" * 40, "dirty": True})
    with pytest.raises(ValueError, match="must run from a commit"):
        runner.keep_settings(study, Folder(tmp_path))
    monkeypatch.setattr(runner.provenance, "commit", lambda: {"revision": "0" * 40, "dirty": False})
    runner.keep_settings(study, Folder(tmp_path))
    entries = runner.claims.read("bases")
    monkeypatch.setattr(runner.claims, "read", lambda name: entries[1:])
    with pytest.raises(ValueError, match="another `entries`"):
        runner.keep_settings(study, Folder(tmp_path))


def test_methods_are_left_for_later_with_all_that_needs_them(tmp_path):
    planned = jobs.plan(settings.load("bases"))
    left = runner._not_left(planned, ["gft"])
    assert left and not any("gft" in stages(job.chain) for job in left)
    assert not any(job.chain == "gft-mean" for job in left), "its rate is tuned as gft's"
    assert any(job.chain == "gft-split" for job in left)


def test_a_stage_that_follows_another_is_tuned_after_it():
    tuning = {"methods": ["sft>grpo", "sft", "grpo"], "experts": ["leap"], "rates": [1e-4, 1e-3]}
    tuning |= {"bases": [9], "seeds": [7]}
    grid = [{**TINY["grid"][0], "chains": ["sft>grpo"]}]
    study = settings.from_dict({**TINY, "rates": {}, "tuning": tuning, "grid": grid})
    planned = {job.name: job for job in jobs.plan(study)}
    job = planned["tuning_sft--grpo_leap_b9_s7_0.001"]
    assert job.needs == ("base_b9", "run_sft_leap_b9_s7")
    assert {name for name in planned["run_sft--grpo_leap_b0_s0"].needs if name.startswith("tuning")} == {
        "tuning_sft--grpo_leap_b9_s7_0.001", "tuning_sft--grpo_leap_b9_s7_0.0001"}  # fmt: skip


def test_a_pretrained_model_is_studied_over_seeds_and_prompts(tmp_path, monkeypatch):
    """The study of the real model, on a model of its make: no fitting, chat prompts, two-way bootstrap, its page."""
    texts = [text for row in extract_json.records(40) for text in (row["prompt"][1]["content"], *row["demonstrations"])]
    tokenizer = scratch.byte_pair_tokenizer(texts, 400)
    tokenizer.chat_template = chatml().replace("<|im_end|>", scratch.EOS)
    tokenizer.save_pretrained(tmp_path / "model")
    scratch.small_llama(tokenizer, width=16, layers=1, heads=2, context=1024).save_pretrained(tmp_path / "model")
    changes = [f"task.model={tmp_path / 'model'}", "task.rows=8", "stage.max_steps=1", "stage.max_completion_length=80"]
    changes += ["evaluation.prompts=3", "evaluation.retention=1", "evaluation.scored=2"]
    changes += ["tuning.methods=[gft]", "tuning.rates=[1.0e-5]", "tuning.prompts=2"]
    cells = "[{chains: [gft, none], experts: [json], bases: [0], seeds: [0, 1]}]"
    study = settings.load("smollm2", [*changes, f"grid={cells}"])
    folder, asked = Folder(tmp_path / "out"), []
    sample, score = evaluation.sample_groups, evaluation.entropy_and_kl
    monkeypatch.setattr(evaluation, "sample_groups", lambda *a: asked.append(len(a[2])) or sample(*a))
    monkeypatch.setattr(evaluation, "entropy_and_kl", lambda *a: asked.append((asked.pop(), len(a[2]))) or score(*a))
    for job in jobs.plan(study):
        work.do(study, folder, job, "cpu")
    assert [path.name for path in folder.path.glob("models/*")] == ["base_b0.pt"], "where other jobs start"
    record = folder.read("run_gft_json_b0_s1")
    assert record["rate"] == 1e-5 and folder.read("tuning_gft_json_b0_s100_1e-05")["rate"] == 1e-5
    assert asked == [(3, 2), 2, *[(3, 2)] * 4], "all prompts are asked, some scored; fewer and none while tuning"
    assert "retention" not in folder.read("tuning_gft_json_b0_s100_1e-05")["metrics"]
    assert len(record["metrics"]["right_of_each"]) == 3 and record["training"]["held_out"]["step"] == []
    assert record["training"]["tokens"]["generated"] > 0 and -20 < record["metrics"]["retention"] < 0
    assert folder.read("run_none_b0_s0")["metrics"]["kl"] == 0.0
    monkeypatch.setattr(results, "USABLE", 0.0)
    found = results.read(results.pack(study, folder, "cpu"))
    entry = {"claim": "c", "origin": "control", "measure": "distinct", "expect": "more", "pairs": [["gft", "none"]]}
    first, *others = verdicts.findings(dataclasses.replace(found, entries=[entry, *found.entries]), "json")
    assert first.difference.units == 2 and isinstance(first.difference, OverDraws)
    assert {f.said for f in [first, *others]} == {"not testable here"}, "nothing is solved, nothing varies"
    page = report.write([found], tmp_path / "page.md").read_text()
    assert "Registered: `benchmarks/experiments/claims/smollm2.yaml`" in page and "| seeds |" in page
