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
from codes.common.records import ensure_writable_folder, write_json
from codes.common.reporting import run_metadata
from codes.train.batches import count_micro_steps
from codes.train.contamination import describe
from codes.train.settings import ORIGINAL, TrainSettings
from codes.train.training_data import TrainingData, find_contamination, split_training_data, stop_on_contamination

ESTIMATE_FILE = "data_estimate.json"
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# What a padded trainer computes is given for batches of so many groups in the order of training.
PADDED_GROUPS = 8


def estimate(settings: TrainSettings) -> dict[str, Any]:
    """Report on the data of a run.

    Returns:
        What ``data_estimate.json`` holds.

    Raises:
        ContrastRMError: Unusable data, or contamination where that is to stop.
    """
    folder = ensure_writable_folder(settings.output_dir)
    # What training would hold out is no part of its epochs.
    data, _ = split_training_data(settings)
    contamination = find_contamination(settings, data)
    draws = data.draws
    result = {
        "model_path": settings.model.model_path,
        "max_length": data.max_length,
        "overlength": settings.data.overlength,
        "negatives": settings.data.negatives,
        "sources": data.source_rows(),
        "lengths": length_table(data),
        "epoch": draws.epoch_counts(),
        "computed_tokens": computed_tokens(data),
        "steps": {
            "steps_per_epoch": draws.steps_per_epoch,
            "total_steps": draws.total_steps,
            "global_batch_size": settings.optimizer.global_batch_size,
            "n_tokens": int(sum(draws.n_tokens[step.start : step.stop].sum() for step in draws.plan)),
            "micro_steps": _micro_steps(data, settings.compute.max_tokens_per_batch, settings.compute.micro_batch_size),
        },
        "contamination": contamination,
        "metadata": run_metadata(),
    }
    write_json(folder / ESTIMATE_FILE, result)
    left_out = [f"bad row left out: {message}" for message in data.bad]
    idle = [f"no effect: {setting}" for setting in data.without_effect]
    print("\n".join([*left_out, *idle, *report_lines(result)]), flush=True)
    stop_on_contamination(contamination, settings.data.fail_on_contamination)
    return result


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


# Column of the table of sources -> field of its row in the result.
SOURCE_COLUMNS = {
    "rows": "n_rows",
    "bad": "n_bad_rows",
    "held out": "n_aside",
    "records": "n_records",
    "groups": "n_groups",
    "an epoch": "groups_an_epoch",
    "texts": "n_texts",
    "tokens": "n_tokens",
    "groups too long": "n_dropped_groups",
    "texts cut": "n_truncated_texts",
    "no negative": "n_without_negatives",
    "same as chosen": "n_equal_texts",
}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The estimate as a person reads it."""
    return [*_source_lines(result["sources"]), *_length_lines(result), *_computation_lines(result)]


def _source_lines(sources: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "sources"]
    rows = [[row["location"], *(f"{row[key]:,}" for key in SOURCE_COLUMNS.values())] for row in sources]
    lines += _table(["", *SOURCE_COLUMNS], rows)
    names = [name for name in (ORIGINAL, *INJECTABLE) if any(name in row["biases"] for row in sources)]
    lines += ["", "rejected answers by injected bias"]
    rows = [[row["location"], *(f"{row['biases'].get(name, 0):,}" for name in names)] for row in sources]
    lines += _table(["", *names], rows)
    for row in sources:
        verdicts = ", ".join(f"{name} {count:,}" for name, count in row["verdicts"].items())
        margins = f"; margins on {row['n_margins']:,} answers of {row['n_with_margin']:,} groups"
        turns = f"; {row['n_multi_turn']:,} of several turns, {row['n_system']:,} with a system prompt"
        lines.append(f"{row['location']}: verdicts {verdicts}{turns}{margins if row['n_margins'] else ''}")
    return lines


def _length_lines(result: dict[str, Any]) -> list[str]:
    lengths, sources = result["lengths"], result["sources"]
    titles = {
        "texts_before_the_limit": "text",
        "groups": "group",
        "shared_prefix_of_a_group": "shared prefix",
        "rejected_of_a_group": "rejected a group",
    }
    heads = ["mean", *(f"p{share}" for share in PERCENTILES)]
    rows = [[title, *(f"{lengths[key].get(head, 0):,}" for head in heads)] for key, title in titles.items()]
    limit = "no limit" if result["max_length"] is None else f"limit {result['max_length']} ({result['overlength']})"
    return [
        "",
        "lengths in tokens",
        *_table(["", *heads], rows),
        f"{limit}: {lengths['n_texts_over_the_limit']:,} of {lengths['n_texts_before_the_limit']:,} texts are longer; "
        f"{sum(row['n_dropped_texts'] for row in sources):,} texts and "
        f"{sum(row['n_dropped_groups'] for row in sources):,} groups dropped, "
        f"{sum(row['n_truncated_texts'] for row in sources):,} texts cut "
        f"({sum(row['n_answer_cut'] for row in sources):,} in the answer)",
    ]


def _computation_lines(result: dict[str, Any]) -> list[str]:
    tokens, steps, epoch = result["computed_tokens"], result["steps"], result["epoch"]
    padded = tokens[f"padded_in_batches_of_{PADDED_GROUPS}_groups"]
    return [
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in [head, *rows])
    ]
