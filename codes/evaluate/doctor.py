"""Is a reward model healthy: does it give a text the score that it deserves, here and in every other tool?

Reads a reward model folder (or hub id) and, for the length check, the ``<bias>_bias.jsonl`` files of ``--data_dir``. Writes
nothing. Prints a table of checks with the cure of each that did not pass (``--json``: the same as one JSON object).
Exit code 1 where any check fails.

    python -m codes.evaluate.doctor output/contrastive
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from codes.common.cli import natural, run
from codes.common.settings import DTYPES, OVERLENGTH_POLICIES, TEMPLATE_HELP

if TYPE_CHECKING:
    from codes.evaluate.health import Finding


def report_lines(findings: Sequence[Finding]) -> list[str]:
    """The table on the console: a line a check, its cure below."""
    from codes.evaluate.health import FAIL, PASS, WARN

    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        shown = finding.status if finding.status == PASS else finding.status.upper()
        lines.append(f"{shown:4}  {finding.check:{width}}  {finding.found}")
        if finding.cure:
            lines.append(f"{'':{width + 6}}  cure: {finding.cure}")
    counts = [f"{sum(f.status == status for f in findings)} {status}" for status in (PASS, WARN, FAIL)]
    return [*lines, "", ", ".join(counts)]


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Check the health of a reward model.")
    parser.add_argument("model_path", help="folder or hub id of a trained reward model")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all checks but those about dtypes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--chat_template", default="", help=TEMPLATE_HELP)
    parser.add_argument("--max_length", type=natural, default=0, help="the limit to check; 0: the model's own")
    parser.add_argument("--overlength", default="left", choices=OVERLENGTH_POLICIES, help="what happens beyond it")
    parser.add_argument("--attn_implementation", default=None, help="as transformers names it, e.g. sdpa or eager")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the model's own folder")
    parser.add_argument("--data_dir", default="data/eval", help="its texts are held against the length limit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Examine and print; 1 where a check fails."""
    args = build_parser().parse_args(argv)
    from codes.evaluate.health import FAIL, examine  # torch is loaded after the command line is known to be right

    options: dict[str, Any] = vars(args).copy()
    as_json = options.pop("json")
    findings = examine(**options)
    if as_json:
        checks = [asdict(finding) for finding in findings]
        print(json.dumps({"model_path": args.model_path, "checks": checks}, ensure_ascii=False, indent=2))
    else:
        print("\n".join(report_lines(findings)))
    return int(any(finding.status == FAIL for finding in findings))


if __name__ == "__main__":
    run(main)
