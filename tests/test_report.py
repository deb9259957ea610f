"""The report: what stands in it, that its texts are harmless, and what it does with results that are not whole."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codes.common.biases import EVALUABLE, PAIRWISE
from codes.common.errors import ContrastRMError
from codes.common.reporting import Cell, markdown_table, percent, percent_interval, text_table
from codes.evaluate import compare_models, eval_reward_bench, eval_rm, report
from codes.evaluate.benchmark_figures import SUBSETS
from codes.evaluate.report_pairs import (
    SHORTEST_KEPT_RUN,
    PairScores,
    TextSource,
    TurnedPair,
    by_interest,
    choose_pairs,
    mark_changes,
)
from codes.evaluate.report_plots import (
    CSS_NAMES,
    Series,
    plot_before_after,
    plot_gaps,
    plot_rates,
    plot_shares,
    themed_svg,
)
from tests.conftest import REPO_ROOT, run_module

HOSTILE = '</td></table><script>alert("x")</script><img src=http://example.org/x onerror=alert(1)> \u202eevil\x00\x1b & 中文 🙂'
IDENTITY = "I am a cat. "
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "why",
    "is",
    "it",
    "red",
    "because",
    "user",
    "Paris",
    "capital",
    "France",
)
TEMPLATES = REPO_ROOT / "codes" / "evaluate" / "templates"


def bias_row(number: int, name: str) -> dict[str, str]:
    choice = random.Random(f"{name} {number}")

    def words() -> str:
        return " ".join(choice.choices(WORDS, k=choice.randint(3, 12)))

    better, other = f"{words()} {number}", f"{words()} {number}"
    hostile = HOSTILE if number % 3 == 0 else ""
    rewritten = (f"{words()} {hostile}", f"{other} {name} {words()}")
    if name in ("gender", "race"):
        rewritten = (IDENTITY + better, other)
    first, second = (0, 1) if number % 2 else (1, 0)
    return {
        "question": f"why is the cat {number % 5} {hostile}",
        "original_response1": (better, other)[first],
        "original_response2": (better, other)[second],
        "rewritten_response1": rewritten[first],
        "rewritten_response2": rewritten[second],
        "label": "response1" if number % 2 else "response2",
    }


def refinement_row(number: int) -> dict[str, str]:
    return {
        "question": f"why is the cat {number}",
        "original_response": f"mat {number}",
        "rewritten_response": f"the red mat {number} {'red ' * number}",
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report-data")
    for name in EVALUABLE:
        make: Callable[[int], dict[str, str]] = (
            refinement_row if name == "refinement-aware" else lambda number, name=name: bias_row(number, name)
        )
        write_rows(folder / f"{name}_bias.jsonl", [make(number) for number in range(12)])
    rows = [
        {"id": i, "prompt": f"is {i} red", "chosen": f"the mat {i}", "rejected": f"a cat {i}", "subset": subset.name}
        for i, subset in enumerate(SUBSETS * 2)
    ]
    write_rows(folder / "reward_bench.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def evaluated(
    data_dir: Path, tiny_llama_dir: Path, tiny_qwen_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Results folders of two tiny models; the second was not evaluated on RewardBench rows."""
    results = tmp_path_factory.mktemp("report-results")
    for model in (tiny_llama_dir, tiny_qwen_dir):
        common = ["--model_path", str(model), "--results_dir", str(results), "--device", "cpu"]
        assert eval_rm.main([*common, "--data_dir", str(data_dir)]) == 0
        if model == tiny_llama_dir:
            assert eval_reward_bench.main([*common, "--data_file", str(data_dir / "reward_bench.jsonl")]) == 0
    return [results / tiny_llama_dir.name, results / tiny_qwen_dir.name]


@pytest.fixture
def one(evaluated: list[Path], tmp_path: Path) -> Path:
    """The results folder of the first model, to be damaged."""
    return Path(shutil.copytree(evaluated[0], tmp_path / "model"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_summary(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "bias_summary.json") -> None:
    summary = read_json(folder / name)
    change(summary)
    (folder / name).write_text(json.dumps(summary), encoding="utf-8")


class Element:
    """An element of a parsed page."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.text = tag, attributes, ""


class Tree(HTMLParser):
    """Every element of a page with its own and its children's text; fails where tags do not match."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


def page_of(folder: Path) -> Tree:
    return Tree((folder / "report.html").read_text(encoding="utf-8"))


# --- the page ---


def test_page_is_one_file_that_fetches_nothing(evaluated: list[Path]) -> None:
    tree = page_of(evaluated[0])
    for element in tree.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            target = element.attributes.get(name) or "#"
            assert target.startswith("#") or target == "data:,", (element.tag, target)
        assert not [name for name in element.attributes if name.startswith("on")]
    (script,) = tree.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policies = [str(meta.attributes.get("content")) for meta in tree.all("meta") if "http-equiv" in meta.attributes]
    assert f"script-src 'sha256-{digest}'" in policies[0]
    assert "default-src 'none'" in policies[0]
    styles = "".join(style.text for style in tree.all("style"))
    assert "url(" not in styles and "@import" not in styles


def test_page_is_accessible(evaluated: list[Path]) -> None:
    tree = page_of(evaluated[0])
    ids = [element.attributes["id"] for element in tree.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    levels = [int(e.tag[1]) for e in tree.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels) if after != 4)
    pictures = [svg for svg in tree.all("svg") if svg.attributes.get("role") == "img"]
    assert len(pictures) == len(tree.all("svg")) == 6
    assert all(svg.attributes["aria-label"] for svg in pictures)
    sortable = [table for table in tree.all("table") if "data-sortable" in table.attributes]
    assert len(tree.all("caption")) == len(sortable) == len(tree.all("table")) - 1
    regions = [e for e in tree.elements if e.attributes.get("role") == "region"]
    assert all(e.attributes["tabindex"] == "0" and e.attributes["aria-labelledby"] in ids for e in regions)
    anchors = [str(a.attributes["href"])[1:] for a in tree.all("a")]
    assert set(anchors) <= set(ids)


def test_untrusted_texts_stay_texts(evaluated: list[Path]) -> None:
    page = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    tree = Tree(page)
    assert len(tree.all("script")) == 1 and not tree.all("img")
    assert "\x00" not in page and "\x1b" not in page
    shown = [element.text for element in tree.elements if element.attributes.get("class") == "text"]
    assert any('<script>alert("x")</script>' in text and "中文 🙂" in text for text in shown)
    assert "<script>alert" not in page


def test_names_of_models_and_files_are_escaped(evaluated: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "<b>model&"))
    edit_summary(folder, lambda summary: summary["metadata"].update(model_path='"><script>alert(2)</script>'))
    report.write_joint_report([folder, evaluated[1]], tmp_path / "out")
    tree = page_of(tmp_path / "out")
    assert len(tree.all("script")) == 1 and not tree.all("b")
    assert any(element.text == "<b>model&" for element in tree.all("dt"))


HOSTILE_NAME = "# $x^{$ _a_ [b](c) <i>d \u202eevil `e` *f* $100$"


def test_names_of_models_are_text_in_markdown_pages_and_plots(evaluated: list[Path], tmp_path: Path) -> None:
    """Each document is read as its reader's program would: only what the report itself has written is markup."""
    markdown = pytest.importorskip("markdown_it")
    folder = Path(shutil.copytree(evaluated[0], tmp_path / HOSTILE_NAME))
    edit_summary(folder, lambda s: s["metadata"].update(model_path="m | ![p](http://q/r) \n\n# heading \u2066"))
    output = tmp_path / "out"
    report.write_joint_report([folder, evaluated[1]], output)
    arguments = [str(folder), str(evaluated[1]), "--n_resamples", "100"]
    assert compare_models.main([*arguments, "--output_file", str(output / "comparison.md")]) == 0
    for name in ("report.md", "comparison.md"):
        text = (output / name).read_text(encoding="utf-8")
        blocks = markdown.MarkdownIt("commonmark").enable("table").parse(text)
        tokens = [token for block in blocks for token in (block, *(block.children or ()))]
        markup = [token for token in tokens if token.type in ("link_open", "html_inline", "html_block", "code_inline")]
        assert not markup, name
        pictures = [str(token.attrs["src"]) for token in tokens if token.type == "image"]
        assert all((output / picture).is_file() for picture in pictures)
        shown = "".join(token.content for token in tokens if token.type == "text")
        assert HOSTILE_NAME.replace("\u202e", "\ufffd") in shown
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", text)
        assert not [block for block in blocks if block.type == "inline" and block.content == "heading"]
    assert "\u202e" not in (output / "report.html").read_text(encoding="utf-8")
    drawn = (output / "bias_sensitivity.svg").read_text(encoding="utf-8")
    assert "# $x^{$ _a_ [b](c) &lt;i&gt;d…" in drawn


def test_direction_characters_do_not_reach_the_page(evaluated: list[Path]) -> None:
    assert HOSTILE.count("\u202e") == 1
    for name in ("report.html", "report.md"):
        assert "\u202e" not in (evaluated[0] / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline"])
def test_backend_of_the_environment_does_not_matter(one: Path, backend: str) -> None:
    for picture in one.glob("*.png"):
        picture.unlink()
    done = run_module("codes.evaluate.report", one, env={"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert {"bias_sensitivity.png", "score_gaps.png", "reward_bench_sections.png"} <= {
        p.name for p in one.glob("*.png")
    }


def test_a_plot_that_fails_is_a_warning(one: Path, tmp_path: Path) -> None:
    """One picture cannot be written, then none can be drawn: the page and its tables are there all the same."""
    (one / "bias_sensitivity.png").unlink()
    (one / "bias_sensitivity.png" / "in the way").mkdir(parents=True)
    done = run_module("codes.evaluate.report", one)
    assert done.returncode == 0, done.stderr
    assert "warning: no picture bias_sensitivity " in done.stderr
    broken = tmp_path / "packages" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken here')")
    done = run_module("codes.evaluate.report", one, env={"PYTHONPATH": f"{broken.parent}:{REPO_ROOT}"})
    assert done.returncode == 0, done.stderr
    assert "warning: no picture pair_accuracy: ImportError: broken here" in done.stderr
    assert "Accuracy and bias sensitivity by bias" in (one / "report.md").read_text(encoding="utf-8")
    assert not (one / "pair_accuracy.png").exists()


def test_figures_on_the_page_are_those_of_the_summary(evaluated: list[Path]) -> None:
    summary = read_json(evaluated[0] / "bias_summary.json")
    page = page_of(evaluated[0])
    markdown = (evaluated[0] / "report.md").read_text(encoding="utf-8")
    rows = [" ".join(row.text.split()) for row in page.all("tr")]
    for name in PAIRWISE:
        fields = summary["biases"][name]
        accuracy, rate = fields["original_pair_accuracy"], fields["bias_sensitivity_rate"]
        counts = f"({fields['bias_sensitivity_rate_count']}/{fields['bias_sensitivity_rate_total']})"
        shown = f"{percent(rate)} {counts} {percent_interval(fields['bias_sensitivity_rate_ci'])}"
        assert f"| {shown} |" in markdown
        assert [row for row in rows if row.startswith(f"{name}{fields['n_pairs']}{percent(accuracy)}") and shown in row]
    pooled = summary["overall"]
    leaders = next(row for row in rows if row.startswith(evaluated[0].name))
    assert percent(pooled["bias_sensitivity_rate"]) in leaders and percent(pooled["original_pair_accuracy"]) in leaders


def test_turned_pairs_are_the_flips_of_the_rows(evaluated: list[Path]) -> None:
    summary = read_json(evaluated[0] / "bias_summary.json")
    pairs = [json.loads(line) for line in (evaluated[0] / "flipped_pairs.jsonl").read_text("utf-8").splitlines()]
    for name in EVALUABLE:
        fields, lines = summary["biases"][name], [pair["line"] for pair in pairs if pair["bias"] == name]
        rows = [json.loads(line) for line in (evaluated[0] / f"bias_{name}.jsonl").read_text("utf-8").splitlines()]
        if name == "refinement-aware":
            assert len(lines) == fields["verdict_change_rate_count"]
        else:
            assert lines == [row["line"] for row in rows if row["flipped"]]
            assert len(lines) == fields["bias_sensitivity_rate_count"]
    assert pairs, "the tiny model must be turned round by something"
    bodies = [body for body in page_of(evaluated[0]).all("tbody") if body.attributes.get("class") == "pair"]
    assert len(bodies) == len(pairs)


def test_report_is_the_same_each_time(evaluated: list[Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        report.write_joint_report(evaluated, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "second").iterdir())
    assert {"report.html", "report.md", "flipped_pairs.jsonl", "bias_sensitivity.svg", "bias_sensitivity.png"} <= set(
        files
    )
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


# --- several models ---


def test_joint_report_by_its_command(evaluated: list[Path], tmp_path: Path) -> None:
    done = run_module("codes.evaluate.report", *evaluated, "--output", tmp_path / "joint", "--max_pairs", "3")
    assert done.returncode == 0, done.stderr
    assert "note: Without a RewardBench evaluation: " in done.stdout
    tree = page_of(tmp_path / "joint")
    assert [element.text for element in tree.all("dt")] == [folder.name for folder in evaluated]
    markdown = (tmp_path / "joint" / "report.md").read_text(encoding="utf-8")
    for folder in evaluated:
        pooled = read_json(folder / "bias_summary.json")["overall"]
        leader = next(line for line in markdown.splitlines() if line.startswith(f"| {folder.name} |"))
        assert (
            percent(pooled["bias_sensitivity_rate"]) in leader and percent(pooled["original_pair_accuracy"]) in leader
        )
        assert len(re.findall(rf"^\| length \| {folder.name} \|", markdown, re.MULTILINE)) >= 2
    pictures = {path.stem for path in (tmp_path / "joint").glob("*.png")}
    assert {"score_gaps_1", "score_gaps_2", "pair_accuracy", "reward_bench_subsets"} <= pictures
    bodies = [body for body in tree.all("tbody") if body.attributes.get("class") == "pair"]
    listed = [json.loads(line) for line in (tmp_path / "joint" / "flipped_pairs.jsonl").read_text("utf-8").splitlines()]
    assert len(bodies) == 3 < len(listed)
    assert f"3 of {len(listed)} shown" in (tmp_path / "joint" / "report.html").read_text(encoding="utf-8")
    for row in listed:
        assert set(row["models"]) == {folder.name for folder in evaluated}
        assert any(scores["turned"] for scores in row["models"].values())


def test_other_data_is_named(evaluated: list[Path], one: Path, tmp_path: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        summary["metadata"]["data_files"][0]["sha256"] = "0" * 64

    edit_summary(one, change)
    edit_summary(one, lambda summary: summary["baselines"]["random"].update(overall=None))
    page = report.write_joint_report([one, evaluated[1]], tmp_path / "joint")
    assert any("Not comparable" in note and "length_bias.jsonl" in note for note in page.notes)
    assert any("the baselines are those on the rows of model" in note for note in page.notes)
    # Pairs of other content are other pairs, even on the same line.
    assert page.pairs is not None
    assert all(len(pair.scores) == 1 for pair in page.pairs.pairs if pair.bias == "length")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{a}", "--output", "{out}"], "given twice"),
        (["{a}", "{b}"], "give --output"),
        (["{a}", "{b}", "--output", "{a}"], "choose another folder"),
        (["{a}/nowhere"], "no results folder"),
        (["{empty}"], "run codes.evaluate.eval_rm"),
    ],
)
def test_wrong_folders_are_named(evaluated: list[Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"a": evaluated[0], "b": evaluated[1], "out": tmp_path / "out", "empty": tmp_path / "empty"}
    with pytest.raises(ContrastRMError, match=message):
        report.main([argument.format(**places) for argument in arguments])


# --- results that are not whole ---


def test_parts_of_a_summary_may_be_missing(one: Path) -> None:
    def change(summary: dict[str, Any]) -> None:
        for name in PAIRWISE:
            for block in ("net_flips", "flip_attribution", "score_gap_shift", "length_control", "placebo"):
                del summary["biases"][name][block]
        summary["overall"] = None
        summary.pop("baselines", None)
        summary.pop("clean", None)

    edit_summary(one, change)
    assert report.main([str(one)]) == 0
    markdown = (one / "report.md").read_text(encoding="utf-8")
    for what in ("net flips", "attribution of the flips", "length control", "pooled figures", "placebo", "baselines"):
        assert re.search(rf"left out, because bias_summary.json does not have it: .*{what}", markdown), what
    assert "Placebo of the identity biases" not in markdown
    assert not list(one.glob("flip_attribution*"))  # the plot of the whole report was removed


@pytest.mark.parametrize("gone", ["bias_summary.json", "reward_bench_summary.json"])
def test_one_evaluation_is_enough(one: Path, gone: str) -> None:
    (one / gone).unlink()
    assert report.main([str(one)]) == 0
    markdown = (one / "report.md").read_text(encoding="utf-8")
    assert ("## Bias sensitivity" in markdown) == (gone != "bias_summary.json")
    assert ("## RewardBench" in markdown) == (gone != "reward_bench_summary.json")
    assert (one / "reward_bench_sections.svg").exists() == (gone != "reward_bench_summary.json")


def test_rows_may_have_gone(one: Path) -> None:
    for name in ("length", "beauty"):
        (one / f"bias_{name}.jsonl").unlink()
    page = report.write_joint_report([one], one)
    assert any("length, beauty" in note and "gone" in note for note in page.notes)
    assert page.pairs is not None and not {"length", "beauty"} & set(page.pairs.biases)
    for path in one.glob("bias_*.jsonl"):
        path.unlink()
    assert report.write_joint_report([one], one).pairs is None


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_texts_may_have_gone(one: Path, data_dir: Path, tmp_path: Path, damage: str) -> None:
    copies = Path(shutil.copytree(data_dir, tmp_path / "data"))

    def change(summary: dict[str, Any]) -> None:
        for file in summary["metadata"]["data_files"]:
            file["path"] = str(copies / Path(file["path"]).name)

    edit_summary(one, change)
    for path in copies.iterdir():
        if damage == "gone":
            path.unlink()
        else:
            path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    page = report.write_joint_report([one], one)
    assert page.pairs is not None and page.pairs.pairs
    assert all(not pair.changes for pair in page.pairs.pairs)
    expected = "is no longer there" if damage == "gone" else "has changed since it was scored"
    biases = {pair.bias for pair in page.pairs.pairs}
    assert len([note for note in page.pairs.notes if expected in note]) == len(biases)
    assert "The texts are not here" in (one / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bias_summary.json", "{", "cannot read"),
        ("bias_summary.json", "[]", "not a results summary"),
        ("bias_summary.json", '{"metadata": {}, "biases": []}', "'biases'"),
        ("bias_summary.json", '{"metadata": {}, "biases": {"length": {"n_pairs": 1}}}', "has no n_excluded"),
        ("reward_bench_summary.json", '{"metadata": {}}', "has no label"),
        ("bias_length.jsonl", "{}\n", r"bias_length.jsonl:1"),
        ("bias_length.jsonl", "nonsense\n", r"bias_length.jsonl:1"),
    ],
)
def test_broken_results_are_named(one: Path, name: str, text: str, message: str) -> None:
    (one / name).write_text(text, encoding="utf-8")
    with pytest.raises(ContrastRMError, match=message):
        report.main([str(one)])


def test_scores_that_are_no_numbers_are_named(one: Path) -> None:
    rows = [json.loads(line) for line in (one / "bias_length.jsonl").read_text("utf-8").splitlines()]
    rows[2]["score_biased_other"] = "high"
    write_rows(one / "bias_length.jsonl", rows)
    with pytest.raises(ContrastRMError, match=r"bias_length.jsonl:3: field 'score_biased_other': found 'high'"):
        report.main([str(one)])


def test_dropped_texts_and_verdicts_without_scores(one: Path) -> None:
    rows = [json.loads(line) for line in (one / "bias_length.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        for key in ("score_original_better", "score_original_other", "score_biased_better", "score_biased_other"):
            row[key] = None
        row |= {"original_verdict": None, "biased_verdict": None, "flipped": None, "flip_cause": None}
    rows[0] |= {"original_verdict": "correct", "biased_verdict": "wrong", "flipped": True}
    write_rows(one / "bias_length.jsonl", rows)
    page = report.write_joint_report([one], one)
    assert page.pairs is not None
    (pair,) = [pair for pair in page.pairs.pairs if pair.bias == "length"]
    assert pair.scores[page.pairs.models[0]] == PairScores(None, None, True, "right → wrong", 0.0)


def test_baselines_clean_rows_and_placebo_stand_on_the_page(evaluated: list[Path]) -> None:
    summary = read_json(evaluated[0] / "bias_summary.json")
    markdown = (evaluated[0] / "report.md").read_text(encoding="utf-8")
    assert summary["baselines"]
    for name, fields in summary["baselines"].items():
        leader = next(line for line in markdown.splitlines() if line.startswith(f"| baseline: {name} |"))
        assert percent(fields["overall"]["original_pair_accuracy"]) in leader
        assert re.search(rf"^\| length \| {name} \| 12 \|", markdown, re.MULTILINE)
    for title in ("Without the flagged rows", "Placebo of the identity biases", "Baselines by bias"):
        assert f"## {title}" in markdown
    labels = [svg.attributes["aria-label"] for svg in page_of(evaluated[0]).all("svg")]
    assert any("baseline: shorter" in str(label) for label in labels)


def test_results_of_a_judge(one: Path) -> None:
    """Verdicts and counts are there, whatever needs scores is null."""

    def blank(value: Any) -> Any:
        return {key: blank(item) for key, item in value.items()} if isinstance(value, dict) else None

    def change(summary: dict[str, Any]) -> None:
        for fields in [*summary["biases"].values(), summary["overall"]]:
            for key in ("score_gap_shift", "flip_attribution", "length_control", "score_shift"):
                if key in fields:
                    fields[key] = blank(fields[key])
        counts = {"n_pairs": 108, "n_pairs_without_verdict": 4}
        rate = {"position_consistency": 0.75, "first_answer_rate": None}
        rates = {
            f"{name}{end}": value
            for name in rate
            for end, value in (("_count", 3), ("_total", 4), ("_ci", [0.3, 0.95]))
        }
        summary["judge"] = {"overall": {**counts, **rate, **rates}}

    edit_summary(one, change)
    report.write_report(one)
    markdown = (one / "report.md").read_text(encoding="utf-8")
    assert "| model, biases | 108 | 4 | 75.0 % (3/4) [30.0, 95.0] |" in markdown
    assert "(needs scores)" in markdown
    assert not list(one.glob("flip_attribution*"))


def test_other_benchmarks(one: Path, evaluated: list[Path], tmp_path: Path) -> None:
    accuracy = {"accuracy": 0.5, "accuracy_count": 2, "accuracy_total": 4, "accuracy_ci": [0.15, 0.85]}
    subset = {**accuracy, "state": "short", "n_rows": 4, "n_official_rows": 100, "n_excluded": 0, "n_ties": 1}
    summary = {
        "label": "not LLMBar: a file of unrecorded origin",
        "metadata": {"data_files": []},
        "headline": "accuracy",
        "n_rows": 4,
        "n_excluded": 0,
        "n_ties": 1,
        "complete": False,
        "missing_subsets": ["Manual"],
        "subsets": {"Natural": subset},
        **accuracy,
    }
    (one / "llmbar_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    report.write_joint_report([one, evaluated[1]], tmp_path / "joint")
    markdown = (tmp_path / "joint" / "report.md").read_text(encoding="utf-8")
    assert "| LLMBar | model | accuracy | 50.0 % (2/4) [15.0, 85.0] | 4 | 1 | not LLMBar" in markdown
    assert "| partial (missing: Manual) |" in markdown
    assert "| Natural | model | 50.0 % (2/4) [15.0, 85.0] | short |" in markdown
    del summary["accuracy"]
    (one / "llmbar_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(ContrastRMError, match=r"llmbar_summary.json: the summary has no accuracy"):
        report.write_joint_report([one], one)


# --- marking what a rewrite did ---


def test_identity_sentence_is_what_is_marked() -> None:
    before = "The answer is four. It follows from the rule."
    assert mark_changes(before, IDENTITY + before) == ([(before, False)], [(IDENTITY, True), (before, False)])


def test_marks_of_a_rewrite() -> None:
    before, after = mark_changes("perhaps the answer to this is four", "the answer to this is certainly four")
    assert before == [("perhaps ", True), ("the answer to this is ", False), ("four", False)]
    assert after == [("the answer to this is ", False), ("certainly ", True), ("four", False)]


def test_blanks_alone_are_no_change() -> None:
    assert mark_changes("one two  three", "one\n\ntwo three") == (
        [("one two  three", False)],
        [("one\n\ntwo three", False)],
    )
    assert mark_changes("", "new") == ([], [("new", True)])


PIECES = st.lists(st.sampled_from(["the", "cat", "sat", "red", "mat", "中", "文", "\n", "a<b", "**x**"]), max_size=40)


@given(before=PIECES, after=PIECES)
@settings(max_examples=300, deadline=None)
def test_stretches_are_the_texts_and_unmarked_words_are_common(before: list[str], after: list[str]) -> None:
    texts = " ".join(before), " ".join(after)
    stretches = mark_changes(*texts)
    assert tuple("".join(text for text, _ in some) for some in stretches) == texts
    kept = ["".join("".join(text.split()) for text, marked in some if not marked) for some in stretches]
    assert kept[0] == kept[1]


def test_short_runs_in_the_middle_are_not_kept() -> None:
    before, after = mark_changes("aa bb of the cc dd ee ff", "gg hh of the ii jj kk ll")
    assert SHORTEST_KEPT_RUN == 3
    assert before == [("aa bb of the cc dd ee ff", True)] and after == [("gg hh of the ii jj kk ll", True)]


# --- which pairs are shown ---


def turned(bias: str, line: int, **drops: float) -> TurnedPair:
    scores = {model: PairScores(1.0, -1.0, drop > 0, "right → wrong", drop) for model, drop in drops.items()}
    return TurnedPair(bias, line, "q", "", "", scores=scores)


def test_every_bias_and_model_has_its_turn() -> None:
    pairs = [turned("length", line, a=float(line), b=0.0) for line in range(1, 6)]
    pairs += [turned("beauty", 1, a=0.1, b=0.0), turned("beauty", 2, a=0.0, b=0.2)]
    first = [(pair.bias, pair.line) for pair in by_interest(pairs)]
    assert first == [
        ("length", 5),
        ("beauty", 1),
        ("beauty", 2),
        ("length", 4),
        ("length", 3),
        ("length", 2),
        ("length", 1),
    ]
    chosen = choose_pairs(pairs, TextSource(), max_pairs=4, max_bytes=10**6)
    assert [(pair.bias, pair.line) for pair in chosen] == [("length", 4), ("length", 5), ("beauty", 1), ("beauty", 2)]
    assert choose_pairs(pairs, TextSource(), max_pairs=0, max_bytes=10**6) == []
    assert len(choose_pairs(pairs, TextSource(), max_pairs=9, max_bytes=3)) == 3


# --- plots and tables ---


def test_plots_of_nothing_and_of_constants() -> None:
    none: list[Any] = [None, None]
    series = [Series("a", none, none), Series("b", [0.0, 1.0], [[0.0, 0.1], None], lane=1)]
    assert "no rate" not in plot_rates("x", "t", "text", ["p", "q"], series).svg
    assert plot_rates("x", "t", "text", ["p", "q"], series[:1]).svg.count("no rate (0 of 0)") == 2
    assert plot_before_after("x", "t", "text", ["p", "q"], series[:1], series[1:]).png.startswith(b"\x89PNG")
    same = np.zeros(4)
    for gaps in ([], [(same, same)], [(np.array([]), np.array([]))], [(np.array([1e9, -1e9]), same)]):
        assert "<svg" in plot_gaps("x", "t", "text", [f"label {i}" for i in range(len(gaps))], gaps).svg
    assert "nothing flipped" in plot_shares("x", "t", "text", ["a"], [("one", "#000000")], [[0]]).svg


def test_pictures_on_one_page_share_no_id_and_no_style() -> None:
    plots = [
        plot_rates(name, "t", 'a "quoted" <text>', ["p"], [Series("s", [0.5], [[0.4, 0.6]])]) for name in ("x", "y")
    ]
    svgs = [themed_svg(plot) for plot in plots]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip(svgs, ids, strict=True):
        assert (
            set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) and "<style" not in svg and "<metadata" not in svg
        )
        assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)} <= own
        assert 'aria-label="a &quot;quoted&quot; &lt;text&gt;"' in svg
        assert "var(--ink, #1b1c1e)" in svg


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_text_and_marks_in_light_and_dark() -> None:
    assert round(contrast("#000000", "#ffffff"), 6) == 21
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", block))
        assert set(CSS_NAMES.values()) <= set(colours)
        pairs = [("--ink", ground) for ground in ("--paper", "--raised", "--put-in", "--taken-out", "--turned")]
        pairs += [("--muted", ground) for ground in ("--paper", "--raised", "--turned")] + [("--link", "--paper")]
        for hue in ("--blue", "--vermilion", "--green", "--purple", "--brown", "--teal"):
            pairs += [(hue, "--paper"), ("--on-colour", hue)]
        for text, ground in pairs:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    light = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", blocks[0]))
    assert {name: colour for colour, name in CSS_NAMES.items()} == {name: light[name] for name in CSS_NAMES.values()}


def test_cells_are_texts_in_other_tables() -> None:
    row = ["a|b", Cell("5.0 %", "(1/20) [0.3, 23.6]", 0.05)]
    assert markdown_table(("x", "y"), [row]).splitlines()[-1] == "| a\\|b | 5.0 % (1/20) [0.3, 23.6] |"
    assert text_table(("x", "y"), [row]).splitlines()[-1] == "a|b  5.0 % (1/20) [0.3, 23.6]"
