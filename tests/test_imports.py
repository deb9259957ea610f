"""Imports go one way, scripts are not imported, and no module edits ``sys.path``.

Reads every Python file of the repository with ``ast``; nothing is imported.
Run: ``python -m pytest tests/test_imports.py``
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
STAGES = ("common", "construct", "train", "evaluate")
# What a module of each stage may import of ours, besides its own stage.
ALLOWED = {
    "common": (),
    "construct": ("codes.common",),
    "train": ("codes.common",),
    "evaluate": ("codes.common", "codes.train.reward_model"),
}
SCRIPT_FOLDERS = ("data", "scripts", "benchmarks")
# The benchmarks are a package of their own: its modules, and the test of it, import each other. Nothing else imports them.
BENCHMARKS_TESTS = ("tests.test_benchmarks",)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def imported_names(source: str, module: str) -> Iterator[str]:
    """Yield the absolute dotted names that a module imports; ``from a import b`` yields ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__", "run_module"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def stage_violations(source: str, module: str) -> list[str]:
    stage = module.split(".")[1]
    allowed = (f"codes.{stage}", *ALLOWED[stage])
    ours = [name for name in imported_names(source, module) if is_within(name, "codes")]
    return [name for name in ours if not any(is_within(name, package) for package in allowed)]


def script_imports(source: str, module: str, script_names: set[str]) -> list[str]:
    return [
        name
        for name in imported_names(source, module)
        if (name.split(".")[0] in SCRIPT_FOLDERS or name.split(".")[0] in script_names)
        and not (is_within(name, "benchmarks") and (is_within(module, "benchmarks") or module in BENCHMARKS_TESTS))
    ]


def search_path_edits(source: str) -> list[int]:
    """Return the lines that touch ``sys.path`` or add a site folder."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_attribute and (node.value.id, node.attr) in {("sys", "path"), ("site", "addsitedir")}:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            lines.extend(node.lineno for alias in node.names if alias.name == "path")
    return lines


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("stage", STAGES)
def test_imports_go_one_way(stage: str) -> None:
    files = [path for path in python_files(f"codes/{stage}") if path.name != "__init__.py"]
    assert files, f"codes/{stage} holds no module"
    wrong = {str(path.relative_to(REPO)): stage_violations(path.read_text(), module_name(path)) for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_every_module_belongs_to_a_stage() -> None:
    folders = {path.relative_to(REPO / "codes").parts[0] for path in python_files("codes")}
    assert folders - {"__init__.py"} == set(STAGES)


def test_no_script_is_imported() -> None:
    # Modules with these names exist elsewhere too: only the scripts' own, unusual ones can be told apart.
    script_names = {path.stem for path in python_files(*SCRIPT_FOLDERS)}
    files = python_files("codes", "tests", *SCRIPT_FOLDERS)
    wrong = {
        str(path.relative_to(REPO)): script_imports(path.read_text(), module_name(path), script_names) for path in files
    }
    assert not {path: names for path, names in wrong.items() if names}


def test_no_search_path_edits() -> None:
    files = python_files("codes", "tests", *SCRIPT_FOLDERS)
    wrong = {str(path.relative_to(REPO)): search_path_edits(path.read_text()) for path in files}
    assert not {path: lines for path, lines in wrong.items() if lines}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codes.common.chat", "from codes.train import losses"),
        ("codes.common.chat", "import codes.evaluate.metrics as m"),
        ("codes.common.chat", "from ..construct.api import ask"),
        ("codes.construct.api", "from codes.evaluate import metrics"),
        ("codes.train.losses", "def f():\n    import codes.construct.api"),
        ("codes.evaluate.eval_rm", "from codes.train.losses import contrastive_loss"),
        ("codes.evaluate.eval_rm", "from codes import construct"),
        ("codes.evaluate.eval_rm", "import importlib\nimportlib.import_module('codes.construct.api')"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert stage_violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("codes.common.chat", "from codes.common import records\nfrom .errors import ContrastRMError"),
        ("codes.construct.api", "from codes.common.llm import ask\nfrom codes.construct import gptout"),
        ("codes.evaluate.eval_rm", "from codes.train.reward_model import load_reward_model"),
        ("codes.evaluate.eval_rm", "from codes.train import reward_model\nimport torch"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert not stage_violations(source, module)


def test_script_imports_and_path_edits_are_found() -> None:
    assert script_imports("from data.train import loader", "codes.train.x", set())
    assert script_imports("import fetch_public", "codes.train.x", {"fetch_public"})
    assert not script_imports("import datasets", "codes.train.x", {"fetch_public"})
    assert script_imports("from benchmarks.common import now", "codes.train.x", set())
    assert script_imports("from benchmarks.common import now", "tests.test_chat", set())
    assert script_imports("from data.train import loader", "benchmarks.rows", set())
    assert not script_imports("from benchmarks.common import now", "benchmarks.rows", set())
    assert search_path_edits("import sys\n\nsys.path.insert(0, '.')") == [3]
    assert search_path_edits("from sys import path") == [1]
    assert search_path_edits("import os, sys\nos.path.join(sys.prefix)") == []
