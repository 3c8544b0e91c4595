"""Who won a case: asked by the table, the plots and the headline, of an outcome as it is saved (a dictionary)."""

from __future__ import annotations

OURS = "gft_"
"""What our contenders' names begin with."""


def timed(result: dict) -> list[dict]:
    """The outcomes of a case that have a time."""
    return [outcome for outcome in result["outcomes"] if outcome["status"] == "timed"]


def is_ours(outcome: dict) -> bool:
    return outcome["name"].startswith(OURS)


def best_of_ours(result: dict) -> dict | None:
    """Our fastest entry in a case."""
    return min((o for o in timed(result) if is_ours(o)), key=lambda o: o["median_s"], default=None)


def winner_over_us(result: dict) -> dict | None:
    """The fastest of the others if it beat our best entry; floors do not count, other objectives do."""
    ours = best_of_ours(result)
    others = [o for o in timed(result) if o["objective"] is not None and not is_ours(o)]
    best = min(others, key=lambda o: o["median_s"], default=None)
    return best if ours and best and best["median_s"] < ours["median_s"] else None
