"""The figures and test names in docs/formulas.md. `python tests/theory/test_theory_figures.py` prints the tables."""

import math
import re
from pathlib import Path

import pytest
from tiny_policy import (
    EXPERT,
    PROBS_Q,
    REWARDS_Q,
    closed_mixture,
    cosine,
    expected_advantages,
    expected_gradient,
    f64,
    mixed_gradient,
    scale,
    true_gradient,
)

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parents[1] / "docs" / "formulas.md"
GROUP_SIZES = (2, 4, 8, 16)
TAUS = (0.0, 0.3, 0.7, 1.0)
BINARY, *GRADED = REWARDS_Q


def table(header, rows):
    """Markdown; a float gets four digits after the point."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def baselines():
    """How far E[estimator] reaches along the true gradient, binary rewards."""
    truth_P = true_gradient(REWARDS_Q[BINARY])
    rows = [
        [f"`{name}`", *(scale(expected_gradient(REWARDS_Q[BINARY], k, name), truth_P) for k in GROUP_SIZES)]
        for name in ("mean", "leave-one-out", "std")
    ]
    return table(["`normalize`", *(f"K = {k}" for k in GROUP_SIZES)], rows)


def query_weights():
    """c(K, p): the factor by which `std` rescales the gradient of a query solved with probability p."""
    rows = []
    for success in (0.01, 0.05, 0.1, 0.25, 0.5):
        row = [f"p = {success:g}"]
        for k in GROUP_SIZES:
            low, high = expected_advantages(f64([0.0, 1.0]), f64([1.0 - success, success]), k, "std")
            row.append(float(high - low))
        rows.append([*row, 1.0 / math.sqrt(success * (1.0 - success))])
    return table(["c(K, p)", *(f"K = {k}" for k in GROUP_SIZES), "1/√(p(1−p))"], rows)


def graded_directions():
    """cos(E[estimator], true gradient) of `std`, three and four reward levels."""
    rows = []
    for name in GRADED:
        truth_P = true_gradient(REWARDS_Q[name])
        rows.append([name, *(cosine(expected_gradient(REWARDS_Q[name], k, "std"), truth_P) for k in GROUP_SIZES)])
    return table(["reward levels", *(f"K = {k}" for k in GROUP_SIZES)], rows)


def group_mixtures():
    """cos(E[estimator], true gradient) of `std`, binary rewards, by what is in the group and tau."""
    truth_P = true_gradient(REWARDS_Q[BINARY])
    kinds = {
        "4 sampled": ([], 4),
        "expert + 3 sampled": ([EXPERT], 3),
        "expert + 4 sampled": ([EXPERT], 4),
        "expert + 3 teacher + 1 sampled": ([EXPERT, 1, 6, EXPERT], 1),
        "expert + 3 teacher (one wrong) + 4 sampled": ([EXPERT, 1, 6, 0], 4),
    }
    rows = [
        [kind, *(cosine(mixed_gradient(REWARDS_Q[BINARY], *group, tau=tau), truth_P) for tau in TAUS)]
        for kind, group in kinds.items()
    ]
    return table(["group", *(f"τ = {tau:g}" for tau in TAUS)], rows)


def mixed_weights():
    """What multiplies grad J and the mean score of the given ones, 4 given and right, 4 sampled, by p."""
    rows = []
    for p in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        slope, gate, _ = closed_mixture(4, 0, 4, p)
        rows.append([f"p = {p:g}", 4 / 8, 4 * 4 / 7 * (1.0 - p) / 8, 4 * slope / 8, 4 * gate / 8])
    return table(["", "∇J", "imitation", "∇J, `std`", "imitation, `std`"], rows)


TABLES = [baselines, query_weights, graded_directions, mixed_weights, group_mixtures]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_the_document_prints_this_table(make):
    assert make() in DOCUMENT.read_text(encoding="utf-8"), f"docs/formulas.md should hold:\n{make()}"


def test_the_document_describes_the_policy_it_measures():
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    assert f"success probability {float(PROBS_Q @ REWARDS_Q[BINARY]):.3f}" in text
    assert f"expert's response has probability {float(PROBS_Q[EXPERT]):.3f}" in text


def test_every_claim_names_a_test_that_exists_and_every_test_is_named():
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    defined = set()
    for name in ("test_theory.py", "test_theory_mixed.py", "test_theory_rows.py", "test_theory_family.py"):
        defined |= set(re.findall(r"^def (test_\w+)", (TESTS / name).read_text(encoding="utf-8"), re.MULTILINE))
    assert named - defined == set(), "named in the document, not defined"
    assert defined - named == set(), "defined, not named in the document"


def test_every_formula_has_an_anchor():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert sorted(re.findall(r'<a id="(F\d)"></a>', text)) == [f"F{n}" for n in range(1, 8)]


if __name__ == "__main__":
    for make in TABLES:
        print(f"{make.__doc__}\n\n{make()}\n")
