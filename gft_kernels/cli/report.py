"""What a run's folder says of itself: report.html to look at, README.md to read and to publish beside the model.

Both hold the settings, held-out metrics before and after, the curves, and how to go on; the page, which is one file
and loads nothing, also has groups with each response's reward, advantage and text.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gft_kernels.cli.folder import MODELS, README, RECORD
from gft_kernels.cli.plots import draw, logged, svgs
from gft_kernels.trainer.logs import COMPLETIONS_FILE, METRICS_FILE

PAGE = "report.html"
COMPARED = {"eval_": ("eval_reward", "eval_expert"), "loss": ("reward/", "entropy", "kl_to")}
SHOWN = 24  # groups on a page


class Change(NamedTuple):
    """A metric, the steps of its first and its last line, and what these say."""

    name: str
    first_step: int
    first: float
    last_step: int
    last: float


def changes(lines: list[dict]) -> list[Change]:
    """First and last value of what a reader asks about first: held-out metrics, then rewards, entropy and KL."""
    found = []
    for kind, prefixes in COMPARED.items():
        of_kind = [line for line in lines if any(key.startswith(kind) for key in line)]
        for name in sorted({key for line in of_kind for key in line if key.startswith(prefixes)}):
            had = [line for line in of_kind if name in line]
            found.append(Change(name, had[0]["step"], had[0][name], had[-1]["step"], had[-1][name]))
    return found


def write(run: str | Path, lines: list[dict]) -> list[Path]:
    """Writes curves.png, README.md and report.html into a run's folder; returns their paths. lines: of its log."""
    found, curves = content(run, lines), draw(lines, Path(run, "curves.png"))
    return [curves, _rendered(README, found, Path(run, README)), _rendered(PAGE, found, Path(run, PAGE))]


def plot(run: str, out: str | None) -> str:
    """Writes all of these, or the page (.html) or the curves to a path of one's own; returns what was written."""
    lines = logged(run)
    if out is None:
        return "\n".join(map(str, write(run, lines)))
    return str(_rendered(PAGE, content(run, lines), Path(out)) if out.endswith(".html") else draw(lines, out))


def content(run: str | Path, lines: list[dict]) -> dict[str, Any]:
    """All that the templates say of a run."""
    folder = Path(run)
    groups = groups_of(folder)
    shown = chosen(groups)
    settings = (folder / RECORD).read_text(encoding="utf-8") if (folder / RECORD).is_file() else ""
    return {
        "run": str(folder),
        "name": folder.resolve().name,
        "changes": changes(lines),
        "curves": svgs(lines),
        "steps": max(line["step"] for line in lines),
        "seconds": sum(line.get("train_runtime", 0) for line in lines),
        "groups": shown,
        "left_out": len(groups) - len(shown),
        "settings": settings,
        "options": yaml.safe_load(settings) or {},
        "adapter": (folder / "adapter_config.json").is_file(),
        "saved": any(any(folder.glob(kind)) for kind in MODELS),
        "files": [name for name in (METRICS_FILE, COMPLETIONS_FILE, RECORD) if (folder / name).is_file()],
    }


def groups_of(folder: Path) -> list[dict[str, Any]]:
    """The groups of completions.jsonl in order; where a resumed run logged one again, the later one counts.

    Those of steps behind the ones that it went on with are left out.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    current = None
    with contextlib.suppress(FileNotFoundError):
        for text in (folder / COMPLETIONS_FILE).read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, of a run that was killed
                response = json.loads(text)
                key = response["step"], response["row"]
                if key != current:
                    if current is not None and key[0] < current[0]:
                        groups = {kept: group for kept, group in groups.items() if kept[0] <= key[0]}
                    groups.pop(key, None)
                    groups[key] = {name: response[name] for name in ("step", "row", "prompt")} | {"responses": []}
                    current = key
                groups[key]["responses"].append(response)
    return list(groups.values())


def chosen(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those a page has room for, the newest step first: all of that step, one of each before."""
    newest = max((group["step"] for group in groups), default=None)
    firsts = {group["step"]: group for group in reversed(groups)}
    kept = [group for group in groups if group["step"] == newest]
    return [*kept, *(firsts[step] for step in sorted(firsts, reverse=True) if step != newest)][:SHOWN]


def _rendered(template: str, found: dict[str, Any], path: Path) -> Path:
    import jinja2

    loader = jinja2.PackageLoader("gft_kernels.cli")
    environment = jinja2.Environment(
        loader=loader, autoescape=lambda name: name == PAGE, trim_blocks=True, lstrip_blocks=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(found) + "\n", encoding="utf-8")
    return path
