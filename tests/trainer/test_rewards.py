"""Reward functions: the ready ones, finding one by name, and what happens when one fails."""

from __future__ import annotations

import threading

import pytest

from gft_kernels.data import digit_sum, gsm8k
from gft_kernels.data.answers import boxed_answer, last_boxed, last_number, math_verify
from gft_kernels.data.rows import Row
from gft_kernels.trainer import RewardError, rewards
from gft_kernels.trainer.rewards import Rewards, find


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so 48+24 = 72.\n#### 72", "72", 1.0),
        ("#### 72", "Natalia sold 48/2 = 24 clips.\n#### 72", 1.0),
        ("the total is 1,200 dollars", "1200", 1.0),
        ("#### 72.0", "72", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 3", "-3", 0.0),
        ("#### 72, or maybe 73", "72", 0.0),
        ("no number at all", "72", 0.0),
        ("#### .5", "0.5", 1.0),
        ("#### 0.50000000000000000001", "0.5", 0.0),
        ("", "72", 0.0),
    ],
)
def test_last_number(completion, answer, reward):
    assert last_number(["?"], [completion], [answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so \boxed{72}", "72", 1.0),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{72.0}", r"\boxed{72}", 1.0),
        (r"\boxed{x + 1}", "x+1", 1.0),
        ("72", "72", 0.0),
        (r"\boxed{72", "72", 0.0),
        (r"\boxed{}", "72", 0.0),
    ],
)
def test_boxed_answer(completion, answer, reward):
    assert boxed_answer(["?"], [completion], [answer]) == [reward]


def test_the_last_box_is_read_with_its_braces_balanced():
    assert last_boxed(r"\boxed{1} \boxed{a{b}{c{d}}} }") == "a{b}{c{d}}"


def test_math_verify_knows_equal_forms_also_outside_the_main_thread():
    pytest.importorskip("math_verify")
    arguments = (["?"] * 3, [r"$\frac{1}{2}$", "$0.25$", r"\boxed{\frac{2}{4}}"], ["$0.5$"] * 3)
    assert math_verify(*arguments) == [1.0, 0.0, 1.0]
    out = []
    thread = threading.Thread(target=lambda: out.extend(math_verify(*arguments)))
    thread.start()
    thread.join()
    assert out == [1.0, 0.0, 1.0]


def test_a_reward_is_found_by_name_or_path():
    assert find("last_number") is last_number
    assert find("gft_kernels.data.digit_sum:strict") is digit_sum.strict
    assert find("gft_kernels.data.digit_sum.strict") is digit_sum.strict


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lastnumber", "must be one of last_number, boxed_answer, math_verify or a dotted path, got 'lastnumber'"),
        ("no.such.module:f", "must be importable"),
        ("gft_kernels.data.digit_sum:nothing", "module gft_kernels.data.digit_sum has no 'nothing'"),
        ("gft_kernels.data.digit_sum:DIGITS", "must be callable"),
    ],
)
def test_a_reward_that_cannot_be_found_is_named(path, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        find(path)


def row(number, **columns):
    return Row(prompt=f"p{number}", prompt_ids=[1], given=[], columns=columns, where=f"data.jsonl, line {number}")


def test_functions_are_weighted_and_none_does_not_apply():
    def a(prompts, completions, **columns):
        return [1.0, 2.0, None]

    def b(prompts, completions, **columns):
        return [10.0, None, 30.0]

    totals, parts = Rewards([a, b], [0.5, 2.0]).score([row(1), row(2), row(3)], ["x", "y", "z"])
    assert totals == [20.5, 1.0, 60.0]
    assert parts == [[1.0, 2.0, None], [10.0, None, 30.0]]


def test_columns_arrive_under_their_names_and_in_order():
    def check(prompts, completions, answer, level, **columns):
        assert prompts == ["p1", "p2"] and completions == ["x", "y"] and answer == ["3", "4"] and level == [None, 7]
        return [1.0, 1.0]

    rewards_ = Rewards(check)
    rewards_.score([row(1, answer="3"), row(2, answer="4", level=7)], ["x", "y"])
    assert rewards_.required_columns() == {"answer", "level"}


def test_a_failing_function_is_reported_with_its_row():
    def touchy(prompts, completions, answer, **columns):
        return [1.0 / int(gold) for gold in answer]

    rows = [row(1, answer="3"), row(2, answer="0"), row(3, answer="5")]
    with pytest.raises(RewardError, match=r"touchy raised ZeroDivisionError.*test_rewards.py:\d+.*data.jsonl, line 2"):
        Rewards(touchy).score(rows, ["x", "y", "z"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "must return 2 values, got 1"),
        (3.0, "must return 2 values, got float"),
        ([1.0, float("nan")], "line 2: .* must return finite numbers or None, got nan"),
        ([1.0, "good"], "line 2: .* must return finite numbers or None, got 'good'"),
        ([1.0, None], "line 2: no reward function applies"),
    ],
)
def test_a_bad_return_value_is_named(values, message):
    with pytest.raises(RewardError, match=message):
        Rewards(lambda prompts, completions, **columns: values).score([row(1), row(2)], ["x", "y"])


def test_weights_match_functions():
    with pytest.raises(ValueError, match="one weight per reward function, got 1 for 2"):
        Rewards(["last_number", "boxed_answer"], [1.0])


def test_every_ready_reward_is_listed():
    assert set(rewards.READY) == {"last_number", "boxed_answer", "math_verify"}


# The tasks' own verifiers


@pytest.mark.parametrize("style", ["left", "right", "odd-even", "ends", "bracket"])
def test_the_strict_verifier_accepts_every_worked_style(style):
    digits = [3, 8, 0, 9, 5]
    assert digit_sum.strict([digit_sum.prompt_of(digits)], [digit_sum.solution(digits, style)]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "#5.",  # the answer alone
        "3+8=1;1+0=1;1+9=0;0+5=5;#6.",  # another answer than the steps'
        "3+8=2;2+0=2;2+9=1;1+5=6;#6.",  # a wrong step
        "3+8=1;1+9=0;0+5=5;#5.",  # an operand left out
        "3+8=1;1+8=9;9+9=8;8+5=3;#3.",  # an operand twice
        "3+8=1;2+0=2;2+9=1;1+5=6;#6.",  # a step that does not go on from the last result
        "3+8=1;1+0=1;1+9=0;0+5=5;#5.#5.",
        "",
    ],
)
def test_the_strict_verifier_rejects(text):
    assert digit_sum.strict([digit_sum.prompt_of([3, 8, 0, 9, 5])], [text]) == [0.0]


def test_digit_sum_rows_are_right_up_to_the_teachers_noise():
    rows = digit_sum.records(50, teacher_noise=0.0)
    scores = [digit_sum.strict([r["prompt"]] * 4, r["demonstrations"]) for r in rows]
    assert scores == [[1.0] * 4] * 50
    noisy = digit_sum.records(50, teacher_noise=0.5)
    assert all(digit_sum.strict([r["prompt"]], r["demonstrations"][:1]) == [1.0] for r in noisy)
    assert sum(digit_sum.strict([r["prompt"]], r["demonstrations"][1:2])[0] for r in noisy) < 25


def test_the_gsm8k_sample_is_right_by_its_own_reward():
    for split, count in (("train", 256), ("test", 64)):
        rows = gsm8k.read_rows(split=split)
        assert len(rows) == count
        for r in rows:
            assert last_number(["?"] * 2, r["demonstrations"], [r["answer"]] * 2) == [1.0, 1.0]
            assert gsm8k.has_final_line(["?"] * 2, r["demonstrations"]) == [1.0, 1.0]
            assert "<<" not in "".join(r["demonstrations"])
    assert gsm8k.has_final_line(["?"] * 3, ["72", "#### 72 and more", "x\n#### "]) == [0.0, 0.0, 0.0]
