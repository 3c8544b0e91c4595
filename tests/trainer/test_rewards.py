"""Reward functions: the ready ones, finding one by name, and what happens when one fails."""

from __future__ import annotations

import functools
import threading

import numpy
import pytest
import torch

from gft_kernels.data import digit_sum, gsm8k
from gft_kernels.data.answers import boxed_answer, exact_answer, json_answer, last_boxed, last_number, math_verify
from gft_kernels.data.rows import Row
from gft_kernels.trainer import RewardError, rewards
from gft_kernels.trainer.rewards import Rewards, find

NUMBERS = [
    ("so 48+24 = 72.\n#### 72", "72", 1.0), ("#### 72", "Natalia sold 48/2 = 24 clips.\n#### 72", 1.0),
    ("the total is 1,200 dollars", "1200", 1.0), ("#### 72.0", "72", 1.0), ("#### -3", "-3", 1.0),
    ("#### 3", "-3", 0.0), ("#### 72, or maybe 73", "72", 0.0), ("no number at all", "72", 0.0),
    ("#### .5", "0.5", 1.0), ("#### 0.50000000000000000001", "0.5", 0.0), ("", "72", 0.0),
    ("#### 16", 1e16, 0.0), ("#### 10,000,000,000,000,000", 1e16, 1.0), ("#### 0.00001", 1e-5, 1.0),
    ("2.5E3", 2500, 1.0), ("1,00,000", "100000", 1.0), ("3,5", "35", 0.0), ("(1,2)", "12", 0.0),
    ("12,3456", "123456", 0.0),
    ("\u22123", "3", 0.0), ("\u22123", "-3", 1.0), ("-$3", "3", 0.0), (r"-\$3.50", "-3.5", 1.0),
]  # fmt: skip
BOXES = [
    (r"so \boxed{72}", "72", 1.0), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
    (r"\boxed{1,000}", "1000", 1.0), (r"\boxed{72.0}", r"\boxed{72}", 1.0), (r"\boxed{x + 1}", "x+1", 1.0),
    ("72", "72", 0.0), (r"\boxed{72", "72", 0.0), (r"\boxed{}", "72", 0.0), (r"\boxed{1,2}", "12", 0.0),
    (r"\boxed{1 2}", "12", 0.0), (r"\boxed{1, 2}", "1,2", 1.0), (r"\boxed{1 000}", "1000", 1.0),
    (r"\boxed{247}", "24_7", 0.0), (r"\boxed{24_7}", "24_7", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("verify", "cases"), [(last_number, NUMBERS), (boxed_answer, BOXES)])
def test_an_answer_is_read_where_its_kind_stands(verify, cases):
    completions, answers, rewards = map(list, zip(*cases, strict=True))
    assert verify(["?"] * len(cases), completions, answers) == rewards


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


def test_math_verify_reads_an_answer_without_marks_as_a_formula():
    pytest.importorskip("math_verify")
    answers = [r"2\sqrt{3}", r"2\sqrt{3}", r"\sqrt{2}", "x^2+1", "(1,2)", "1/2", "#### 72"]
    said = ["2", *(rf"\boxed{{{a}}}" for a in (r"\sqrt{12}", r"\sqrt{2}", "1+x^2", "(1,2)", "0.5", "72"))]
    assert math_verify(["?"] * 7, said, answers) == [0.0] + [1.0] * 6


@pytest.mark.parametrize("answer", [7, torch.tensor(7), numpy.int64(7)])
def test_an_answer_is_the_same_number_whatever_a_dataset_holds_it_in(answer):
    for verify in (last_number, boxed_answer, exact_answer, json_answer):
        assert verify(["?"], [r"\boxed{7}" if verify is boxed_answer else "7"], [answer]) == [1.0]
    assert last_number(["?"], ["0.12345678"], [torch.tensor(0.12345678)]) == [1.0]


def test_a_reward_is_found_by_name_or_path():
    assert find("last_number") is last_number
    assert find("gft_kernels.data.digit_sum:strict") is digit_sum.strict
    assert find("gft_kernels.data.digit_sum.strict") is digit_sum.strict


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lastnumber", "must be one of last_number, boxed_answer, exact_answer, json_answer, math_verify or a dotted"),
        ("no.such.module:f", "must be importable"),
        ("gft_kernels.data.digit_sum:nothing", "module gft_kernels.data.digit_sum has no 'nothing'"),
        ("gft_kernels.data.digit_sum:DIGITS", "must be callable"),
        ("org/reward-model", r"must be a function, got 'org/reward-model'; where that is a model, wrap it: \n"),
        ("faulty:reward", "must be importable, got 'faulty:reward'; SyntaxError"),
        ("leaving:reward", "must be importable, got 'leaving:reward'; SystemExit"),
    ],
)
def test_a_reward_that_cannot_be_found_is_named(path, message, tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text("def reward(:\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
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
        ([1.0, float("nan")], "line 2: .* must return finite numbers of float32, .*or None, got nan"),
        ([1.0, "good"], "line 2: .* must return finite numbers of float32, .*or None, got 'good'"),
        ([1.0, "2"], "line 2: .* must return finite numbers of float32, .*or None, got '2'"),
        ([1e300, 1.0], "line 1: .* must return finite numbers of float32, .*or None, got 1e[+]300"),
        ([10**400, 1.0], "line 1: .* must return finite numbers of float32, .*or None, got 1000"),
        ([1.0, -3.5e38], "line 2: .* must return finite numbers of float32, .*or None, got -3.5e[+]38"),
        ([2**60, 2**60 + 1], r"line 1: .* float32, whole ones below 2\^53, or None, got 1152921504606846976"),
        (numpy.array([0, -(2**53)]), r"line 2: .* float32, whole ones below 2\^53, or None, got -9007199254740992"),
        ([1.0, numpy.int64(2**60)], r"line 2: .* float32, whole ones below 2\^53, or None, got .*1152921504"),
        ([1.0, 1j], "line 2: .* must return finite numbers of float32, .*or None, got 1j"),
        ([1.0, [2.0]], "line 2: .* must return finite numbers of float32, .*or None, got "),
        (torch.ones(2, 2), "line 1: .* must return finite numbers of float32, .*or None, got "),
        (torch.ones(3), "must return 2 values, got 3"),
        (numpy.float64(1.0), "must return 2 values, got float"),
        ({"x": 1.0, "y": 2.0}, "must return 2 values, got dict"),
        ({1.0, 2.0}, "must return 2 values, got set"),
        ("12", "must return 2 values, got str"),
        (b"12", "must return 2 values, got bytes"),
        ((value for value in (1.0, 2.0)), "must return 2 values, got generator"),
        ([1.0, None], "line 2: no reward function applies"),
    ],
)
def test_a_bad_return_value_is_named(values, message):
    with pytest.raises(RewardError, match=message):
        Rewards(lambda prompts, completions, **columns: values).score([row(1), row(2)], ["x", "y"])


@pytest.mark.parametrize(
    "values",
    [(1, True), [numpy.float32(1.0), numpy.int64(1)], numpy.ones(2, dtype=numpy.float16),
     torch.ones(2, dtype=torch.bfloat16), [torch.tensor(1.0), numpy.array(1.0)], [torch.ones(1), torch.ones(1)]],
    ids=lambda values: type(values).__name__,
)  # fmt: skip
def test_arrays_and_tensors_of_rewards_count_as_numbers(values):
    totals, _ = Rewards(lambda prompts, completions: values, [0.5]).score([row(1), row(2)], ["x", "y"])
    assert totals == [0.5, 0.5]


@pytest.mark.parametrize("code", [0, 3, None])
def test_a_function_that_exits_has_failed(code):
    def leaving(prompts, completions, **columns):
        raise SystemExit(code)

    with pytest.raises(RewardError, match=r"reward function leaving raised SystemExit: .* line 1, completion 'x'"):
        Rewards(leaving).score([row(1)], ["x"])


# Functions as users write them, and what each could not be called with


def by_place(*arguments):
    """A wrapper that passes on by place what it is given by name."""


@functools.wraps(digit_sum.strict)
def decorated_by_place(*arguments):
    """The same, under the signature of what it wraps."""


def places_only(prompts, completions, /, **columns):
    """Python refuses the names."""


def one_prompt(prompt, completions, **columns):
    """There is one prompt for each completion."""


def the_groups(completions, responses, **columns):
    """Offline rows are rewarded already."""


def texts_alone(prompts, answer):
    """Never sees a completion."""


async def later(prompts, completions, **columns):
    """Returns a coroutine."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (by_place, r"by_place must take `completions` by name, got by_place\(\*arguments\); write it as f"),
        (decorated_by_place, r"strict must take `completions` by name, got strict\(\*arguments\)"),
        (places_only, r"places_only must take `completions` by name, got places_only\(prompts, completions"),
        (texts_alone, r"texts_alone must take `completions` by name, got texts_alone\(prompts, answer\)"),
        (one_prompt, "one_prompt must do without `prompt`, got a parameter; it is called with `prompts`"),
        (the_groups, "the_groups must do without `responses`, got a parameter; it is no column"),
        (later, "later must return numbers, got an async function"),
        (torch.nn.Linear(2, 1), r"must be a function, got the model Linear; wrap it: \n    def reward\(prompts, compl"),
        (7, "reward function must be a function or a name, got 7"),
    ],
)
def test_a_function_that_could_not_be_called_is_refused_before_anything_is_sampled(function, message):
    with pytest.raises(TypeError, match=message):
        Rewards([function])


@pytest.mark.parametrize("function", ["math_verify", math_verify, functools.partial(math_verify, level=1)])
def test_a_library_that_a_ready_reward_needs_is_missed_before_anything_is_sampled(function, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^math_verify must be installed for .*.*'gft-kernels\[math\]'"):
        Rewards([function])


def test_a_function_gets_the_columns_it_has_room_for():
    def plain(completions, answer):
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    @functools.wraps(plain)
    def decorated(*arguments, **named):
        return plain(*arguments, **named)

    def twice(completions, answer, *, weight):
        return [weight * value for value in plain(completions, answer)]

    rewards_ = Rewards([plain, decorated, functools.partial(twice, weight=2.0)])
    rows = [row(1, answer="x", level=3), row(2, answer="x", level=4)]
    assert rewards_.score(rows, ["x", "y"]) == ([4.0, 0.0], [[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert rewards_.required_columns() == {"answer"}


def test_a_column_takes_no_place_of_prompts_and_completions():
    def check(prompts, completions, **columns):
        return [float(prompts == ["p1"] and completions == ["x"])]

    assert Rewards(check).score([row(1, completions="mine", prompts="mine")], ["x"])[0] == [1.0]


def test_every_function_has_a_name_of_its_own():
    def grade(prompts, completions, bonus=0.0, **columns):
        return [bonus] * len(completions)

    partials = [functools.partial(grade, bonus=bonus) for bonus in (1.0, 2.0)]
    functions = [lambda completions: [1.0], partials[0], lambda completions: [2.0], partials[1], grade]
    assert Rewards(functions).names == ["lambda", "grade", "lambda_2", "grade_2", "grade_3"]


def test_weights_match_functions():
    with pytest.raises(ValueError, match="one weight per reward function, got 1 for 2"):
        Rewards(["last_number", "boxed_answer"], [1.0])


def test_every_ready_reward_is_listed():
    assert set(rewards.READY) == {"last_number", "boxed_answer", "exact_answer", "json_answer", "math_verify"}


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
