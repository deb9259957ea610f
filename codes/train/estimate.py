"""What a training run would see and compute, without the model's weights and without training.

Reads: the training sources, the model's configuration and tokenizer, evaluation files.
Writes: ``<output_dir>/data_estimate.json`` and, where training questions meet evaluation ones, ``contamination.jsonl``.
Run: ``python -m codes.train.train_reward_model --estimate 1 --train_file data/train/own_train.jsonl``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from codes.common.biases import INJECTABLE
from codes.common.errors import ContrastRMError
from codes.common.records import ensure_writable_folder, write_json
from codes.common.reporting import run_metadata
from codes.train.batches import count_micro_steps
from codes.train.contamination import CONTAMINATION_FILE, check_contamination, describe, expand_files
from codes.train.held_out import aside_of, split_questions
from codes.train.objective import ORIGINAL, Objective
from codes.train.sources import parse_sources
from codes.train.training_data import TrainingData, open_training_data

ESTIMATE_FILE = "data_estimate.json"
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# What a padded trainer computes is given for batches of so many groups in the order of training.
PADDED_GROUPS = 8


def estimate(
    *,
    output_dir: str,
    objective: Objective,
    contamination_files: str,
    fail_on_contamination: bool,
    max_tokens_per_batch: int,
    micro_batch_size: int,
    train_file: str,
    seed: int,
    limit: int,
    max_bad_rows: int,
    held_out_share: float | str,
    eval_file: str,
    bias_eval_dir: str,
    **options: Any,
) -> dict[str, Any]:
    """Report on the data of a run; the arguments are the command line's.

    Args:
        options: The other arguments of ``open_training_data``.

    Returns:
        What ``data_estimate.json`` holds.

    Raises:
        ContrastRMError: Unusable data, or contamination where that is to stop.
    """
    folder = ensure_writable_folder(output_dir)
    rows: dict[str, Any] = {"seed": seed, "limit": limit, "max_bad_rows": max_bad_rows}
    # What training would hold out is no part of its epochs.
    split = split_questions(
        parse_sources(train_file), share=held_out_share, eval_file=eval_file, bias_eval_dir=bias_eval_dir, **rows
    )
    data = open_training_data(train_file=train_file, objective=objective, aside=aside_of(split), **rows, **options)
    found = check_contamination(
        data.sources,
        expand_files(contamination_files),
        folder / CONTAMINATION_FILE,
        max_bad_rows=max_bad_rows,
        limit=limit,
    )
    result = {
        "model_path": options["model_path"],
        "max_length": data.max_length,
        "overlength": options["overlength"],
        "negatives": options["negatives"],
        "sources": data.source_rows(),
        "lengths": length_table(data),
        "epoch": data.draws.epoch_counts(),
        "computed_tokens": computed_tokens(data),
        "steps": {
            "steps_per_epoch": data.draws.steps_per_epoch,
            "total_steps": data.draws.total_steps,
            "global_batch_size": options["global_batch_size"],
            "n_tokens": int(sum(data.draws.n_tokens[step.start : step.stop].sum() for step in data.draws.plan)),
            "micro_steps": _micro_steps(data, max_tokens_per_batch, micro_batch_size),
        },
        "contamination": found,
        "metadata": run_metadata(),
    }
    write_json(folder / ESTIMATE_FILE, result)
    left_out = [f"bad row left out: {message}" for message in data.bad]
    idle = [f"no effect: {setting}" for setting in data.without_effect]
    print("\n".join([*left_out, *idle, *report_lines(result)]), flush=True)
    stop_on_contamination(found, fail_on_contamination)
    return result


def stop_on_contamination(found: dict[str, Any], fail: bool) -> None:
    """Raise a ``ContrastRMError`` where evaluation questions were met and that is to stop the run."""
    if fail and found["n_contaminated_records"]:
        raise ContrastRMError(
            f"contaminated: {describe(found)}; take these records out of the training data, or set "
            "--fail_on_contamination 0"
        )


def _micro_steps(data: TrainingData, max_tokens: int, micro_batch_size: int) -> dict[str, int] | None:
    """Micro-steps of a step in one process; the budget must be given: the automatic one follows from the model's weights."""
    if not max_tokens:
        return None
    return {
        packing: count_micro_steps(
            data.draws.plan,
            data.draws.costs(packing),
            max_tokens=max_tokens,
            world_size=1,
            micro_batch_size=micro_batch_size,
            by_length=packing == "off",
        )
        for packing in ("shared", "packed", "off")
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Mean and percentiles; empty without values."""
    if not len(values):
        return {}
    points = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    return {"mean": round(float(np.mean(values)), 2)} | {
        f"p{share}": int(point) for share, point in zip(PERCENTILES, points, strict=True)
    }


def length_table(data: TrainingData) -> dict[str, Any]:
    """Percentiles in tokens: texts before the over-length policy (all, and by source); groups and prompts after it."""
    raw = data.cache.array("raw_lengths")
    stops = np.cumsum([counts.n_raw_texts for counts in data.cache.source_counts])
    by_source = {
        source.location: percentiles(raw[stop - counts.n_raw_texts : stop])
        for source, counts, stop in zip(data.sources, data.cache.source_counts, stops, strict=True)
    }
    offsets = data.cache.text_offsets[data.cache.group_offsets]
    return {
        "texts_before_the_limit": percentiles(raw),
        "n_texts_before_the_limit": len(raw),
        "n_texts_over_the_limit": int((raw > data.max_length).sum()) if data.max_length else 0,
        "by_source": by_source,
        "groups": percentiles(np.diff(offsets)),
        "shared_prefix_of_a_group": percentiles(data.cache.group_prefixes),
        "rejected_of_a_group": percentiles(np.diff(data.cache.group_offsets) - 1),
    }


def computed_tokens(data: TrainingData) -> dict[str, Any]:
    """Tokens that a model computes in the first epoch, by way of batching, and what padding wastes and sharing gains.

    ``padding_waste`` = 1 - tokens / padded. ``sharing_gain`` = tokens / shared: how many times fewer tokens are computed
    when each group's common prefixes are computed once.
    """
    draws = data.draws
    size = min(draws.epoch_size, len(draws))
    texts = int(draws.n_tokens[:size].sum())
    starts = np.arange(0, size, PADDED_GROUPS)
    longest = np.maximum.reduceat(draws.longest[:size], starts)
    rows = np.add.reduceat(draws.n_texts[:size], starts, dtype=np.int64)
    padded = int((longest.astype(np.int64) * rows).sum())
    shared = int(draws.costs("shared")[:size].sum())
    return {
        "texts": texts,
        f"padded_in_batches_of_{PADDED_GROUPS}_groups": padded,
        "padded_group_by_group": int(draws.costs("off")[:size].sum()),
        "packed": texts,
        "shared": shared,
        "padding_waste": round(1 - texts / padded, 4),
        "sharing_gain": round(texts / shared, 4),
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """The estimate as a person reads it."""
    lines = ["", "sources"]
    columns = (
        "rows",
        "bad",
        "held out",
        "records",
        "groups",
        "an epoch",
        "texts",
        "tokens",
        "groups too long",
        "texts cut",
        "no negative",
        "same as chosen",
    )
    keys = (
        "n_rows", "n_bad_rows", "n_aside", "n_records", "n_groups", "groups_an_epoch", "n_texts", "n_tokens", "n_dropped_groups",
        "n_truncated_texts", "n_without_negatives", "n_equal_texts",
    )  # fmt: skip
    rows = [[row["location"], *(f"{row[key]:,}" for key in keys)] for row in result["sources"]]
    lines += _table(["", *columns], rows)
    names = [name for name in (ORIGINAL, *INJECTABLE) if any(name in row["biases"] for row in result["sources"])]
    lines += ["", "rejected answers by injected bias"]
    lines += _table(
        ["", *names],
        [[row["location"], *(f"{row['biases'].get(name, 0):,}" for name in names)] for row in result["sources"]],
    )
    for row in result["sources"]:
        verdicts = ", ".join(f"{name} {count:,}" for name, count in row["verdicts"].items())
        margins = f"; margins on {row['n_margins']:,} answers of {row['n_with_margin']:,} groups"
        turns = f"; {row['n_multi_turn']:,} of several turns, {row['n_system']:,} with a system prompt"
        lines.append(f"{row['location']}: verdicts {verdicts}{turns}{margins if row['n_margins'] else ''}")
    lengths = result["lengths"]
    titles = {
        "texts_before_the_limit": "text",
        "groups": "group",
        "shared_prefix_of_a_group": "shared prefix",
        "rejected_of_a_group": "rejected a group",
    }
    heads = ["mean", *(f"p{share}" for share in PERCENTILES)]
    lines += ["", "lengths in tokens"]
    lines += _table(
        ["", *heads], [[title, *(f"{lengths[key].get(head, 0):,}" for head in heads)] for key, title in titles.items()]
    )
    limit = "no limit" if result["max_length"] is None else f"limit {result['max_length']} ({result['overlength']})"
    lines.append(
        f"{limit}: {lengths['n_texts_over_the_limit']:,} of {lengths['n_texts_before_the_limit']:,} texts are longer; "
        f"{sum(row['n_dropped_texts'] for row in result['sources']):,} texts and "
        f"{sum(row['n_dropped_groups'] for row in result['sources']):,} groups dropped, "
        f"{sum(row['n_truncated_texts'] for row in result['sources']):,} texts cut "
        f"({sum(row['n_answer_cut'] for row in result['sources']):,} in the answer)"
    )
    tokens, steps, epoch = result["computed_tokens"], result["steps"], result["epoch"]
    padded = tokens[f"padded_in_batches_of_{PADDED_GROUPS}_groups"]
    lines += [
        "",
        f"an epoch: {epoch['n_groups']:,} groups ({epoch['n_repeated_groups']:,} again, {epoch['n_groups_left_out']:,} left "
        f"out), {epoch['n_texts']:,} texts, {epoch['n_not_drawn']:,} rejected answers not drawn",
        f"computed tokens: padded in batches of {PADDED_GROUPS} groups {padded:,} ({tokens['padding_waste']:.1%} padding), "
        f"packed {tokens['packed']:,}, with shared prefixes {tokens['shared']:,} ({tokens['sharing_gain']:.2f} times fewer)",
        f"steps: {steps['total_steps']:,} ({steps['steps_per_epoch']:,} an epoch, {steps['global_batch_size']:,} groups each), "
        f"{steps['n_tokens']:,} tokens of texts"
        + ("" if steps["micro_steps"] is None else f"; micro-steps in one process {steps['micro_steps']}"),
        f"{'WARNING: ' if result['contamination']['n_contaminated_records'] else ''}contamination: "
        f"{describe(result['contamination'])}",
    ]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in [head, *rows])
    ]
