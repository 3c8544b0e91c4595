"""The page of a run: one file that loads nothing, holds what was logged, and lays itself out in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gft_kernels.cli import main, report
from gft_kernels.cli.plots import PANELS, svgs
from gft_kernels.data.rows import Response, Row
from gft_kernels.trainer.groups import Group
from gft_kernels.trainer.logs import read_metrics, show_completions

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 3?\n2 < 3 & so on"}]
LONG = "https://" + "a" * 300 + "\n" + "and so it follows " * 40


def response(step, row, reward, text, source="sampled", prompt=MESSAGES):
    return {"step": step, "row": f"rows.jsonl:{row}", "source": source, "advantage": (reward or 0.5) - 0.5,
            "reward": reward, "prompt": prompt, "text": text}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A log of forty steps, of which the last was resumed two steps behind it; groups of one step in two, the last of
    two rows, resumed as well; half a line at the end."""
    folder = tmp_path / "a run"
    folder.mkdir()
    steps = [{"step": s, "loss": 0.1, "reward/sampled": s / 40, "reward/expert": 1.0, "entropy": 2 - s / 40,
              "grad_norm": 0.5, "rectified": 0.2, "tokens_per_second": 100.0} for s in range(1, 41)]  # fmt: skip
    held_out = [{"step": s, "eval_reward": r, "eval_runtime": 1.0} for s, r in ((0, 0.25), (20, 0.5), (40, 0.75))]
    again = {"step": 40, "loss": 0.1, "reward/sampled": 0.875, "train_loss": 1.0}
    gone = [{**steps[-1], "step": s} for s in (41, 42)]
    ends = [{"step": 40, "train_runtime": t} for t in (61.5, 0.25)]  # resumed once more, with no step left
    groups = [response(s, 1, r, f"step {s}: {r}") for s in range(0, 40, 2) for r in (0.0, 1.0)]
    groups += [response(40, 1, 0.0, "gone"), response(38, 1, 0.0, "step 38: 0.0"), response(38, 1, 1.0, "once more")]
    groups += [response(38, 2, None, "<script>alert(1)</script>"), response(38, 2, 1.0, LONG, "expert")]
    write = lambda name, lines: (folder / name).write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')  # noqa: E731
    write("metrics.jsonl", [*sorted(steps + held_out, key=lambda line: line["step"]), *gone, again, *ends])
    write("completions.jsonl", groups)
    (folder / "run.yaml").write_text("model: some/model\ndata: rows <1>.jsonl\n")
    return folder


class Outline(HTMLParser):
    """Tags with their attributes, and the text of each table cell."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.cells, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in ("td", "th") or (self.inside and tag == "pre")
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


@pytest.mark.filterwarnings("ignore:.*was cut short")
def test_the_page_holds_what_was_logged_and_loads_nothing(run, capsys):
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == [str(run / n) for n in ("curves.png", "README.md", "report.html")]
    page = (run / "report.html").read_text()
    found = Outline(page)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object"}
    named = [value for _, given in found.tags for key, value in given.items() if key.endswith(("src", "href"))]
    assert all(value.startswith("#") for value in named) and not re.search(r"@import|url\((?!#)", page)
    rows = [found.cells[i : i + 6] for i in range(0, len(found.cells), 6)]
    assert ["eval_reward", "0.25", "0", "0.75", "40", "+0.5"] in rows
    assert ["reward/sampled", "0.025", "1", "0.875", "40", "+0.85"] in rows  # the resumed run's last line
    for text in ("<script>alert(1)</script>", LONG, "once more", "–"):
        assert text in found.cells
    assert (
        not {"step 38: 1.0", "gone"} & {*found.cells}
        and "40 optimizer steps in 62 s" in page
        and "rows &lt;1&gt;" in page
    )
    assert html.escape(MESSAGES[1]["content"], quote=False) in page
    readme = (run / "README.md").read_text()
    assert "| `eval_reward` | 0.25 | step 0 | 0.75 | step 40 |" in readme and "model: some/model\n" in readme


def test_no_line_of_a_log_is_lost(tmp_path):
    """Texts with what Unicode calls the end of a line, and two sets of held-out rows evaluated at one step."""
    show_completions([Group(Row("a\x85b", [1], []), [Response("c\u2028d", [1], "sampled", 1.0)])], 1, str(tmp_path))
    assert report.groups_of(tmp_path)[0]["responses"][0]["text"] == "c\u2028d"
    found = [{"eval_a_reward": 0.5}, {"eval_b_reward": 1.0}, {"eval_a_reward": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({"step": 1, **line}) for line in found))
    assert read_metrics(tmp_path) == [{"step": 1, "eval_a_reward": 0.75, "eval_b_reward": 1.0}]


@pytest.mark.filterwarnings("ignore:.*was cut short")
def test_a_page_shows_all_of_the_newest_step_and_one_group_of_others(run):
    groups = report.groups_of(run)
    assert [len(group["responses"]) for group in groups] == [2] * 21 and groups[-1]["step"] == 38
    shown = report.chosen(groups)
    assert [group["step"] for group in shown[:3]] == [38, 38, 36] and len(shown) == 21
    many = [{"step": s, "row": s, "prompt": "", "responses": []} for s in range(100)]
    assert [group["step"] for group in report.chosen(many)] == [*range(99, 99 - report.SHOWN, -1)]


def test_the_curves_are_the_same_for_the_same_log_and_only_those_that_were_logged():
    lines = [{"step": s, "loss": 0.1, "entropy": 1.0 / s, "clipped": 0.1} for s in range(1, 4)]
    drawn = svgs(lines)
    assert drawn == svgs(lines) and [title for title, _ in drawn] == ["entropy (nats)", "tokens held back"]
    assert set(dict(drawn)) < set(PANELS)
    for _, svg in drawn:
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "optimizer step" in svg


PROBE = """<style>iframe { border: 0; display: block }</style><script>
onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, reach = [...page.querySelectorAll("h1, h2, p, figure, details, pre.box")].map(
    each => each.getBoundingClientRect());
  return { over: page.documentElement.scrollWidth - frame.clientWidth,
           outside: reach.filter(box => box.left < 0 || box.right > frame.clientWidth).length,
           cut: page.querySelector(".wide").scrollWidth - page.querySelector(".wide").clientWidth,
           curves: new Set([...page.querySelectorAll("figure")].map(each => each.getBoundingClientRect().left)).size,
           drawn: [...page.querySelectorAll("svg")].every(each => each.getBoundingClientRect().height > 100) };
})) }</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH: apt-get install chromium")
@pytest.mark.filterwarnings("ignore:.*was cut short")
def test_a_browser_lays_the_page_out_on_a_telephone_and_on_a_desk(run, tmp_path):
    page = html.escape(Path(report.plot(str(run), str(tmp_path / "page.html"))).read_text())
    frames = [f'<iframe width={width} height=4000 srcdoc="{page}"></iframe>' for width in (390, 1280)]
    (tmp_path / "probe.html").write_text(f"<!DOCTYPE html>{PROBE}{''.join(frames)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    telephone, desk = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert telephone == {"over": 0, "outside": 0, "cut": 0, "curves": 1, "drawn": True}
    assert desk == {"over": 0, "outside": 0, "cut": 0, "curves": 3, "drawn": True}
