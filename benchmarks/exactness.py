"""Are the scores of packs the scores of the texts alone? On real groups, with the real model.

Scores: every group packed with shared prefixes by the project's scorer in float32, and its texts one by one through plain
transformers. Gradients of some groups, packed and one by one. Verdicts in bfloat16 (is the chosen answer above the rejected
one?): packed, one by one, and in padded batches of eight; packs may not change more of them than padding does.
Reads: preference records (``train_pool.jsonl`` of the folder that ``CONTRASTRM_EXTERNAL_DATA`` names, or any file). Writes:
``output/benchmarks/exactness.jsonl`` (one line a chunk of groups: a run that was stopped goes on where it was) and
``benchmarks/results/exactness.md`` and ``.jsonl``.
Run: ``python -m benchmarks.exactness --groups 500`` (over an hour on two cores; ``--first`` and ``--groups`` cut it in parts).
The exit code is 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import MODEL_DIR, OUTPUT_DIR, machine, model_fields, prepare_model, resolve_device
from benchmarks.padded import load_plain_model
from benchmarks.rows import choose_groups, external_data, fits_in
from benchmarks.speed import RESULTS_DIR, append_line, read_lines
from codes.common.base_model import model_hash
from codes.common.chat import ChatFormatter, Conversation, EncodedText
from codes.common.cli import natural, positive, run
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import build_pack
from codes.common.records import PreferenceRecord, file_sha256, read_preference_file, write_jsonl, write_text
from codes.common.reporting import Section, render_markdown, run_metadata
from codes.common.scoring import Scorer, collate_texts
from codes.train.data_utils import Group, encode_groups
from codes.train.losses import contrastive_loss
from codes.train.reward_model import RewardModel, load_reward_model

SIZES = (2, 3, 4, 5, 6)
SCORE_LIMIT = 1e-5  # times the scores' standard deviation where that is above 1
GRADIENT_LIMIT = 1e-4  # ‖difference‖ / ‖gradient‖ of every tensor
PADDED_ROWS = 8
# Ways of scoring: precision, and how the texts stand together.
FLOAT32 = ("float32/alone", "float32/packed")
BFLOAT16 = ("bfloat16/alone", "bfloat16/packed", "bfloat16/padded")


def choose_mixed_groups(
    records: Sequence[PreferenceRecord], n: int, formatter: ChatFormatter, *, max_length: int, seed: int
) -> list[PreferenceRecord]:
    """``n`` groups of 2 to 6 answers, the sizes in turn."""
    fits = fits_in(formatter, max_length)
    per_size = [
        choose_groups(records, size, len(range(position, n, len(SIZES))), seed=seed, fits=fits)[0]
        for position, size in enumerate(SIZES)
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*per_size))
    return [group for group in in_turn if group is not None]


def alone_scores(model: RewardModel, groups: Sequence[Group]) -> list[list[float]]:
    """Every text by itself, as a padded batch of one."""
    return [[_padded(model, [text])[0] for text in group.texts] for group in groups]


def padded_scores(model: RewardModel, groups: Sequence[Group], pad_id: int) -> list[list[float]]:
    """Texts in their order, ``PADDED_ROWS`` at a time, padded to the longest."""
    texts = [text for group in groups for text in group.texts]
    found: list[float] = []
    for start in range(0, len(texts), PADDED_ROWS):
        found += _padded(model, texts[start : start + PADDED_ROWS], pad_id)
    return by_group(found, groups)


def _padded(model: RewardModel, texts: Sequence[EncodedText], pad_id: int = 0) -> list[float]:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate_texts(texts, pad_id).items()}
    with torch.inference_mode():
        return model(**batch).float().tolist()


def by_group(values: Sequence[float], groups: Sequence[Group]) -> list[list[float]]:
    """Scores of all texts, cut into the groups."""
    rest = iter(values)
    return [[next(rest) for _ in group.texts] for group in groups]


class Ways:
    """The models that score, loaded when they are first needed."""

    def __init__(self, model_path: Path, device: torch.device, max_tokens_per_batch: int) -> None:
        self.model_path, self.device, self.max_tokens_per_batch = model_path, device, max_tokens_per_batch
        self._models: dict[str, tuple[RewardModel, Any]] = {}
        self._plain: Any = None

    def model(self, dtype: str) -> tuple[RewardModel, Any]:
        """Our model and its tokenizer."""
        if dtype not in self._models:
            self._models[dtype] = load_reward_model(str(self.model_path), dtype=dtype, device=self.device)
        return self._models[dtype]

    def score(self, way: str, records: Sequence[PreferenceRecord]) -> list[list[float]]:
        """Scores of every group, rejected answers first, the chosen one last."""
        dtype, _, company = way.partition("/")
        model, tokenizer = self.model(dtype)
        formatter = ChatFormatter(tokenizer)
        groups = encode_groups(records, formatter)[0]
        if company == "packed":
            scorer = Scorer(
                model,
                formatter,
                packing="shared",
                max_tokens_per_batch=self.max_tokens_per_batch,
                progress=False,
            )
            conversations = [text for record in records for text in conversations_of(record)]
            return by_group(scorer.score(conversations).scores.tolist(), groups)
        if company == "padded":
            return padded_scores(model, groups, tokenizer.pad_token_id)
        # In float32 the reference is plain transformers. Its bfloat16 head makes ties: there it is our own model.
        return self._plain_scores(groups) if dtype == "float32" else alone_scores(model, groups)

    def _plain_scores(self, groups: Sequence[Group]) -> list[list[float]]:
        self._plain = self._plain or load_plain_model(self.model_path, precision="float32", device=str(self.device))
        found = []
        with torch.inference_mode():
            for group in groups:
                rows = [self._plain.pad([list(text.input_ids)]) for text in group.texts]
                found.append([self._plain.scores(row).item() for row in rows])
        return found


def conversations_of(record: PreferenceRecord) -> list[Conversation]:
    """The texts of a group in the order of ``encode_groups``."""
    return [Conversation(record.messages, answer) for answer in [*record.rejected, record.chosen]]


def score_chunks(
    ways: Ways, records: Sequence[PreferenceRecord], plan: Sequence[tuple[int, int, tuple[str, ...]]]
) -> Iterator[dict[str, Any]]:
    """One line a chunk: the scores of its groups in every way.

    Args:
        plan: (first group, end, ways) of every chunk.
    """
    with tqdm(total=sum(stop - first for first, stop, _ in plan), desc="exactness", unit="group") as bar:
        for first, stop, names in plan:
            chunk = records[first:stop]
            scores = {name: ways.score(name, chunk) for name in names}
            yield {"first": first, "stop": stop, "ids": [record.id for record in chunk], "scores": scores}
            bar.update(stop - first)


def gradient_errors(model: RewardModel, groups: Sequence[Group]) -> list[float]:
    """Per group the largest relative error of a tensor's gradient, the group packed against its texts one by one."""
    reason = model.enable_packing()
    assert reason is None, reason
    device = next(model.parameters()).device
    errors = []
    for group in tqdm(groups, desc="gradients", unit="group"):
        sizes = torch.tensor([len(group.texts)])
        multiple_of = FLEX_BLOCK if device.type == "cuda" else 1
        pack = build_pack([text.input_ids for text in group.texts], multiple_of=multiple_of).to(device)
        packed = gradients(
            model, contrastive_loss(model(pack.input_ids, layout=pack.layout, ends=pack.ends), sizes, 0.5)
        )
        alone_rows = [
            model(**{name: tensor.to(device) for name, tensor in collate_texts([text], 0).items()})
            for text in group.texts
        ]
        alone = gradients(model, contrastive_loss(torch.cat(alone_rows), sizes, 0.5))
        errors.append(max(relative_error(packed[name], alone[name]) for name in alone))
    return errors


def gradients(model: RewardModel, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of the sum of losses in every tensor; the model's own are cleared."""
    model.zero_grad(set_to_none=True)
    losses.sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; 0 where both are 0."""
    norm, difference = expected.double().norm().item(), (found.double() - expected.double()).norm().item()
    return difference / norm if norm else float(difference > 0)


def verdicts(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """For every pair of a group's chosen and one rejected answer: 1 above, -1 below, 0 tied."""
    return np.array([np.sign(group[-1] - rejected) for group in scores for rejected in group[:-1]])


def summarise(lines: Sequence[dict[str, Any]], errors: Sequence[float]) -> dict[str, Any]:
    """All figures, and whether the limits hold."""
    scores = {
        way: [group for line in lines if way in line["scores"] for group in line["scores"][way]]
        for way in (*FLOAT32, *BFLOAT16)
    }
    alone, packed = (np.concatenate([np.array(group) for group in scores[way]]) for way in FLOAT32)
    score_sd = float(alone.std())
    limit = SCORE_LIMIT * max(1.0, score_sd)
    max_difference = float(np.abs(alone - packed).max())
    found: dict[str, Any] = {
        "task": "exactness",
        "n_groups": len(scores[FLOAT32[0]]),
        "n_texts": len(alone),
        "score_sd": score_sd,
        "max_difference": max_difference,
        "limit": limit,
        "scores_pass": max_difference <= limit,
        "float32_verdict_changes": int((verdicts(scores[FLOAT32[0]]) != verdicts(scores[FLOAT32[1]])).sum()),
        "n_gradient_groups": len(errors),
        "max_gradient_error": max(errors, default=None),
        "gradient_limit": GRADIENT_LIMIT,
        "gradients_pass": max(errors) <= GRADIENT_LIMIT if errors else None,
    }
    if scores[BFLOAT16[0]]:
        # The float32 verdicts of the same groups: those lines that hold bfloat16 scores too.
        reference = [group for line in lines if BFLOAT16[0] in line["scores"] for group in line["scores"][FLOAT32[0]]]
        exact, single, together, batched = (verdicts(one) for one in (reference, *(scores[way] for way in BFLOAT16)))
        found |= {
            "n_bfloat16_groups": len(reference),
            "n_bfloat16_pairs": len(single),
            "packed_differs_from_alone": int((together != single).sum()),
            "padded_differs_from_alone": int((batched != single).sum()),
            "alone_differs_from_float32": int((single != exact).sum()),
            "packed_differs_from_float32": int((together != exact).sum()),
            "padded_differs_from_float32": int((batched != exact).sum()),
        }
        found["bfloat16_pass"] = found["packed_differs_from_alone"] <= found["padded_differs_from_alone"]
    return found


def render(found: dict[str, Any]) -> str:
    """The figures as a page."""
    versions = found["versions"]
    changed = " with uncommitted changes" if found["git_uncommitted_changes"] else ""
    about = (
        f"Groups {found['first']} to {found['first'] + found['n_groups'] - 1} of the seeded choice of {found['rows_of']} "
        f"(2 to 6 answers); {found['machine']['cpu']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"commit {found['git_commit']}{changed}; {found['created_utc']}."
    )
    rows = [
        [
            "scores in float32, packed and shared, against plain transformers one by one",
            f"{found['n_texts']} texts of {found['n_groups']} groups",
            f"max difference {found['max_difference']:.2e} (SD of the scores {found['score_sd']:.3f})",
            f"{found['limit']:.1e}",
            passed(found["scores_pass"]),
        ]
    ]
    if found["max_gradient_error"] is not None:
        rows.append(
            [
                "gradients in float32, every tensor",
                f"{found['n_gradient_groups']} groups",
                f"largest relative error {found['max_gradient_error']:.2e}",
                f"{found['gradient_limit']:.0e}",
                passed(found["gradients_pass"]),
            ]
        )
    if "n_bfloat16_pairs" in found:
        rows.append(
            [
                "verdicts in bfloat16, packed against one by one",
                f"{found['n_bfloat16_pairs']} pairs of {found['n_bfloat16_groups']} groups",
                f"{found['packed_differs_from_alone']} differ",
                f"{found['padded_differs_from_alone']} (padded batches of {PADDED_ROWS})",
                passed(found["bfloat16_pass"]),
            ]
        )
    sections = [Section("Packed and alone", [about], ["what", "over", "found", "limit", "holds"], rows)]
    if "n_bfloat16_pairs" in found:
        against = [[way, str(found[f"{way}_differs_from_float32"])] for way in ("alone", "packed", "padded")]
        note = f"Of {found['n_bfloat16_pairs']} pairs. The scores of a head that was never trained lie close together."
        sections.append(
            Section("Verdicts that bfloat16 itself changes, against float32", [note], ["bfloat16", "differ"], against)
        )
    return render_markdown("Exactness of packs", sections)


def passed(value: bool | None) -> str:
    """Yes, no, or a dash."""
    return "–" if value is None else "yes" if value else "NO"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Scores, gradients and verdicts of packs against texts alone.")
    parser.add_argument("--input_file", default=None, help="preference records; default: the public training pool")
    parser.add_argument("--model_path", type=Path, default=MODEL_DIR, help="a reward model's folder; made if missing")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--groups", type=positive, default=500, help="groups whose float32 scores are compared")
    parser.add_argument("--first", type=natural, default=0, help="the first of them, in the seeded order")
    parser.add_argument("--gradient_groups", type=natural, default=5, help="groups whose gradients are compared")
    parser.add_argument("--bfloat16_groups", type=natural, default=200, help="groups whose verdicts are compared")
    parser.add_argument("--chunk", type=positive, default=10, help="groups that are packed together, and a line")
    parser.add_argument(
        "--max_tokens_per_batch", type=natural, default=0, help="computed tokens of a pack; 0: as scored"
    )
    parser.add_argument("--max_length", type=positive, default=1024, help="most tokens of a text")
    parser.add_argument("--seed", type=int, default=42, help="chooses the groups")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="the chunks' lines")
    parser.add_argument("--results_dir", type=Path, default=RESULTS_DIR, help="the figures")
    parser.add_argument("--restart", action="store_true", help="score again what is there already")
    return parser


def chunks(first: int, end: int, size: int, bfloat16_end: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """(first group, end, ways of scoring) of every chunk.

    Example: 0, 5, 2, 2 -> (0, 2, float32 and bfloat16), (2, 4, float32), (4, 5, float32).
    """
    return [
        (start, min(start + size, end), FLOAT32 + (BFLOAT16 if start < bfloat16_end else ()))
        for start in range(first, end, size)
    ]


def score_all(
    ways: Ways,
    records: Sequence[PreferenceRecord],
    plan: Sequence[tuple[int, int, tuple[str, ...]]],
    *,
    lines_file: Path,
    session: str,
    restart: bool,
) -> list[dict[str, Any]]:
    """The lines of all chunks: those of an earlier run of the same session, and new ones, written as they are made."""
    earlier = [] if restart else read_lines(lines_file)
    there = {(line["first"], line["stop"]): line for line in earlier if line["session"] == session}
    todo = []
    for first, stop, names in plan:
        line = there.get((first, stop))
        if line is None or not set(names) <= set(line["scores"]):
            todo.append((first, stop, names))
    for line in score_chunks(ways, records, todo):
        append_line(lines_file, {"session": session, **line})
        there[line["first"], line["stop"]] = line
    return [there[first, stop] for first, stop, _ in plan]


def main(argv: list[str] | None = None) -> int:
    """Compare and write the figures; 1 where a float32 limit is broken."""
    args = build_parser().parse_args(argv)
    if not (args.model_path / "config.json").is_file():
        prepare_model(folder=args.model_path)
    source = Path(args.input_file) if args.input_file else external_data() / "train_pool.jsonl"
    ways = Ways(args.model_path, resolve_device(args.device), args.max_tokens_per_batch)
    model, tokenizer = ways.model("float32")
    formatter, end = ChatFormatter(tokenizer), args.first + args.groups
    records = choose_mixed_groups(
        read_preference_file(source)[0], end, formatter, max_length=args.max_length, seed=args.seed
    )
    about = run_metadata()
    inputs = [file_sha256(source), model_hash(args.model_path), about["git_commit"], str(ways.device)]
    lines = score_all(
        ways,
        records,
        chunks(args.first, end, args.chunk, args.first + args.bfloat16_groups),
        lines_file=args.output_dir / "exactness.jsonl",
        session=json.dumps([args.max_tokens_per_batch, args.max_length, args.seed, *inputs]),
        restart=args.restart,
    )
    errors = []
    if args.gradient_groups:
        few = records[args.first : args.first + args.gradient_groups]
        errors = gradient_errors(model, encode_groups(few, formatter)[0])
    found = summarise(lines, errors) | {"first": args.first, "rows_of": source.name, "device": str(ways.device)}
    found |= {**model_fields(args.model_path), "machine": machine(), **about}
    write_jsonl(args.results_dir / "exactness.jsonl", [found])
    write_text(args.results_dir / "exactness.md", render(found))
    print(json.dumps(found, ensure_ascii=False))
    return 0 if found["scores_pass"] and found["gradients_pass"] is not False else 1


if __name__ == "__main__":
    run(main)
