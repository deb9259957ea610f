"""Fetch the ten public bias-evaluation files (JudgeBiasBench format).

Reads ``<base_url>/<bias>_bias.jsonl`` (network needed). Writes them to ``--output_dir``, unchanged, with
``source.json`` beside them: where they came from and their hashes. All ten are read and checked before the
first one is written.

    PYTHONPATH=. python data/eval/fetch_public.py
    DATA_DIR=data/eval/public bash run_evaluation_rm.sh
"""

from __future__ import annotations

import argparse
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from codes.common.biases import EVALUABLE, eval_file_name, get_bias
from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.records import (
    ensure_writable_folder,
    file_sha256,
    read_bias_file,
    read_refinement_file,
    write_json,
    write_text,
)

# Pinned, so that two people who fetch evaluate on the same rows.
DEFAULT_BASE_URL = (
    "https://raw.githubusercontent.com/HuihuiChyan/ContrastRM/1dbb1639976020aed5ad700952f88e9af4984c30/data/eval"
)
TIMEOUT_SECONDS = 60


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Fetch the ten public bias-evaluation files.")
    parser.add_argument("--base_url", default=DEFAULT_BASE_URL, help="folder of the files (GitHub raw, hub resolve)")
    parser.add_argument("--output_dir", default="data/eval/public", help="where to put them")
    return parser


def fetch(url: str) -> str:
    """Download one text file.

    Raises:
        ContrastRMError: No network, no such file, or no UTF-8 text.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ContrastRMError(f"--base_url must begin with https:// or http://, not {url!r}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode("utf-8"))
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ContrastRMError(
            f"cannot fetch {url}: {reason}; check the network, or give another place with --base_url"
        ) from error


def check_file(name: str, path: Path) -> int:
    """Read a fetched file as the evaluation will and return its rows.

    Raises:
        RecordError: A field is missing or malformed.
    """
    read = read_refinement_file if get_bias(name).kind == "refinement" else read_bias_file
    return read(path)[1].n_rows


def main(argv: list[str] | None = None) -> int:
    """Fetch all, check all, then write all."""
    args = build_parser().parse_args(argv)
    output_dir = ensure_writable_folder(args.output_dir)
    base_url = args.base_url.rstrip("/")
    texts = {}
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".fetch-") as scratch:
        files = []
        for name in EVALUABLE:
            file = eval_file_name(name)
            texts[file] = fetch(f"{base_url}/{file}")
            path = Path(scratch) / file
            path.write_bytes(texts[file].encode("utf-8"))
            files.append({"file": file, "n_rows": check_file(name, path), "sha256": file_sha256(path)})
    for file, text in texts.items():
        write_text(output_dir / file, text)
    write_json(output_dir / "source.json", {"base_url": base_url, "files": files})
    for entry in files:
        print(f"{output_dir / str(entry['file'])}: {entry['n_rows']} rows")
    return 0


if __name__ == "__main__":
    run(main)
