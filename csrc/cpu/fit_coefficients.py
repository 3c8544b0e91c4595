"""Fit the polynomials of vector_math.h: 2^f on [0, 1) and tanh(x)/x as a ratio of polynomials in x².

Run it to reprint the tables. Lawson's iteration: weighted least squares on Chebyshev nodes, each weight multiplied by
its node's error, converges to the smallest maximum of the relative error.
"""

from __future__ import annotations

import numpy as np

NODES = 2000
TANH_REACH = 9.02  # tanh rounds to 1 in float32 from here on


def minimax(design: np.ndarray, right: np.ndarray, rounds: int = 400) -> tuple[np.ndarray, float]:
    """The x with the smallest largest |design·x - right|, and that error."""
    weight = np.full(len(right), 1.0 / len(right))
    size = np.abs(design).max(0)
    for _ in range(rounds):
        root = np.sqrt(weight)
        x = np.linalg.lstsq(design / size * root[:, None], right * root, rcond=None)[0] / size
        error = np.abs(design @ x - right)
        weight = weight * error
        weight /= weight.sum()
    return x, error.max()


def chebyshev(low: float, high: float) -> np.ndarray:
    return low + (high - low) * (1 - np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)) / 2


def fit_exp2(degree: int) -> tuple[np.ndarray, float]:
    f = chebyshev(0.0, 1.0)
    return minimax(np.vander(f, degree + 1, increasing=True) / 2.0 ** f[:, None], np.ones(NODES))


def fit_tanh(over: int, under: int) -> tuple[np.ndarray, np.ndarray, float]:
    """P, Q (ascending in x²) with tanh(x) = x·P/Q, Q[0] = 1; Sanathanan-Koerner: divide by the last round's Q."""
    x = chebyshev(1e-3, TANH_REACH)
    square, target = x * x, np.tanh(x) / x
    q = np.ones(NODES)
    for _ in range(30):
        p_columns = np.vander(square, over + 1, increasing=True) / (target * q)[:, None]
        q_columns = -np.vander(square, under + 1, increasing=True)[:, 1:] / q[:, None]
        fitted, error = minimax(np.hstack([p_columns, q_columns]), 1.0 / q, 200)
        coefficients_q = np.concatenate([[1.0], fitted[over + 1 :]])
        q = np.polyval(coefficients_q[::-1], square)
    return fitted[: over + 1], coefficients_q, error


def table(name: str, values: np.ndarray, note: str) -> str:
    return f"constexpr float {name}[] = {{{', '.join(f'{v:.9g}f' for v in values)}}};  // {note}"


if __name__ == "__main__":
    for degree in (3, 4, 5):
        coefficients, error = fit_exp2(degree)
        print(table(f"kExp2Degree{degree}", coefficients, f"relative error {error:.1e}"))
    p, q, error = fit_tanh(6, 3)
    print(table("kTanhOver", p, f"relative error {error:.1e}"))
    print(table("kTanhUnder", q, "in x*x"))
