"""How large the house is, and through how many of its rooms one record and one pair go.

Counts files, lines, code lines (without comments, docstrings and blanks), functions by length, parameters, the launchers'
knobs, and the seconds of ``--help``. ``--trace`` trains one step on one record and evaluates one pair, and counts the modules
of ``codes/`` that ran and the steps between modules (caller -> callee). ``--repo`` names the checkout that is measured.

Run: ``python -m benchmarks.house --trace``
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]
HELP_MODULES = ("codes.train.train_reward_model", "codes.evaluate.eval_rm", "codes.construct.gptout")
LONG_FUNCTION = 60

# Runs in a process of its own, in the checkout that is measured: sys.setprofile sees every call of a function of ours.
TRACER = """
import contextlib, io, json, os, sys
from pathlib import Path
repo = Path.cwd() / "codes"
modules, steps = set(), set()

def room(frame):
    path = frame.f_code.co_filename
    return os.path.relpath(path, repo) if path.startswith(str(repo)) else None

def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>" and (here := room(frame)):
        modules.add(here)
        caller = frame.f_back
        while caller is not None and not (there := room(caller)):
            caller = caller.f_back
        if caller is not None and there != here:
            steps.add((there, here))

main = __import__(sys.argv[1], fromlist=["main"]).main
sys.setprofile(watch)
with contextlib.redirect_stdout(io.StringIO()):
    main(sys.argv[2:])
sys.setprofile(None)
print(json.dumps({"modules": sorted(modules), "steps": sorted(steps)}))
"""


def python_files(repo: Path, folder: str) -> list[Path]:
    """Every Python file of a folder."""
    return sorted(path for path in (repo / folder).rglob("*.py") if "__pycache__" not in path.parts)


def code_lines(source: str) -> int:
    """Lines that hold code: no comment, no docstring, no blank."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in skipped for n in range(token.start[0], token.end[0] + 1)}
    return len(lines - prose)


def functions(source: str, module: str) -> Iterator[tuple[str, int, int]]:
    """(name, lines, parameters) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args
            n_parameters = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            yield f"{module}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, n_parameters


def measure_folder(repo: Path, folder: str) -> dict[str, Any]:
    """Sizes of one folder."""
    sources = {
        path.relative_to(repo).as_posix(): path.read_text(encoding="utf-8") for path in python_files(repo, folder)
    }
    found = [function for name, source in sources.items() for function in functions(source, name)]
    lengths = [n_lines for _, n_lines, _ in found]
    longest, widest = max(found, key=lambda f: f[1]), max(found, key=lambda f: f[2])
    return {
        "files": len(sources),
        "lines": sum(source.count("\n") for source in sources.values()),
        "code_lines": sum(map(code_lines, sources.values())),
        "functions": len(found),
        "median_function_lines": statistics.median(lengths),
        "functions_over_60_lines": sum(length > LONG_FUNCTION for length in lengths),
        "longest_function": [longest[0], longest[1]],
        "most_parameters": [widest[0], widest[2]],
    }


def knobs(repo: Path) -> dict[str, int]:
    """How many settings stand in each launcher's block: lines like ``NAME="${NAME:-default}"``."""
    pattern = re.compile(r'^(?:export )?([A-Z][A-Z0-9_]*)="\$\{\1:-', re.MULTILINE)
    return {
        path.name: len(set(pattern.findall(path.read_text(encoding="utf-8")))) for path in sorted(repo.glob("run_*.sh"))
    }


def help_seconds(repo: Path, module: str) -> float:
    """The second of two calls: the first one may write byte code."""
    for _ in range(2):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, "--help"], cwd=repo, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    return round(seconds, 2)


def trace(repo: Path) -> dict[str, Any]:
    """Train one step on one record, evaluate one pair, with a two-layer model."""
    from tests.conftest import chatml_tokenizer, save_tiny, tiny_config

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        from transformers import LlamaForSequenceClassification

        tokenizer = chatml_tokenizer()
        model = LlamaForSequenceClassification(
            tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
        )
        base = save_tiny(scratch / "model", model, tokenizer)
        train_row: dict[str, Any] = {
            "id": "a",
            "question": "why",
            "chosen": "the cat sat",
            "rejected": ["the mat", "red"],
            "bias_type": [None, "length"],
        }
        pair = {
            "question": "why",
            "original_response1": "the cat sat",
            "original_response2": "red",
            "label": "response1",
        }
        pair |= {"rewritten_response1": "the cat", "rewritten_response2": "red, so red"}
        (scratch / "train.jsonl").write_text(json.dumps(train_row) + "\n", encoding="utf-8")
        (scratch / "length_bias.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
        training = [
            "--model_path",
            str(base),
            "--train_file",
            str(scratch / "train.jsonl"),
            "--output_dir",
            str(scratch / "out"),
        ]
        training += [
            "--max_steps",
            "1",
            "--precision",
            "fp32",
            "--cache_dir",
            str(scratch / "cache"),
            "--report_to",
            "none",
        ]
        evaluation = ["--model_path", str(base), "--data_dir", str(scratch), "--bias_type", "length"]
        evaluation += ["--results_dir", str(scratch / "results"), "--device", "cpu"]
        return {
            "record": traced(repo, "codes.train.train_reward_model", training),
            "pair": traced(repo, "codes.evaluate.eval_rm", evaluation),
        }


def traced(repo: Path, module: str, flags: list[str]) -> dict[str, Any]:
    """Which modules of ours ran."""
    command = [sys.executable, "-c", TRACER, module, *flags]
    done = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "n_modules": len(found["modules"]),
        "n_steps_between_modules": len(found["steps"]),
        "modules": found["modules"],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repo", type=Path, default=REPO_ROOT)
    parser.add_argument("--trace", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print one JSON object."""
    args = build_parser().parse_args(argv)
    repo = args.repo.resolve()
    folders = [path.name for path in sorted((repo / "codes").iterdir()) if (path / "__init__.py").is_file()]
    result: dict[str, Any] = {name: measure_folder(repo, name) for name in ("codes", *(f"codes/{f}" for f in folders))}
    result |= {name: measure_folder(repo, name) for name in ("benchmarks", "tests")}
    result["knobs"] = knobs(repo)
    result["help_seconds"] = {module: help_seconds(repo, module) for module in HELP_MODULES}
    if args.trace:
        result["trace"] = trace(repo)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
