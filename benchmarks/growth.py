"""How the cost of a group grows with its answers, its prompt and the number of groups: our packs beside padded rows.

Random token ids through one model in one process; all answers of a series have the same length, so that the padded rows hold
next to no padding: what is seen is the prompt that is computed once, and what a larger batch gains. The padded rows run
through the same model, length-sorted under a token budget.
Run: ``python -m benchmarks.growth --precision bfloat16``
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import add_run_arguments, model_fields, now, resolve_device, write_line
from codes.common.chat import EncodedText
from codes.common.cli import positive, run
from codes.common.errors import ContrastRMError
from codes.common.packed_attention import FLEX_BLOCK
from codes.common.packing import build_pack, plan_packs
from codes.common.scoring import collate_texts, default_token_budget, plan_batches
from codes.train.reward_model import RewardModel, load_reward_model

PADDED_TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """``n_groups`` groups of ``answers`` answers of ``answer_tokens`` tokens behind a prompt of ``prompt_tokens``."""

    series: str
    n_groups: int
    answers: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def ceiling(self) -> float:
        """How many times fewer tokens remain when every prompt is computed once."""
        together = self.prompt_tokens + self.answers * self.answer_tokens
        return self.answers * (self.prompt_tokens + self.answer_tokens) / together

    def sequences(self, vocabulary: int) -> list[list[int]]:
        """Random token ids, group after group; the same on every call."""
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, length: int) -> list[list[int]]:
            return torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()

        prompts = draw(self.n_groups, self.prompt_tokens)
        return [prompt + answer for prompt in prompts for answer in draw(self.answers, self.answer_tokens)]


def points(
    *,
    group_sizes: Sequence[int],
    prompts: Sequence[int],
    n_groups: Sequence[int],
    prompt_tokens: int,
    answer_tokens: int,
) -> list[Point]:
    """The three series: answers of a group, tokens of its prompt, number of groups of four."""
    return [
        *(Point("answers of a group", 1, size, prompt_tokens, answer_tokens) for size in group_sizes),
        *(Point("tokens of the prompt", 1, 4, prompt, answer_tokens) for prompt in prompts),
        *(Point("groups of four", n, 4, prompt_tokens, answer_tokens) for n in n_groups),
    ]


def packed_scores(
    model: RewardModel, sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[torch.Tensor]:
    """The scores of each pack with shared prefixes, under the budget that suits the device."""
    for indices in plan_packs(sequences, default_token_budget(device)):
        multiple_of = FLEX_BLOCK if device.type == "cuda" else 1
        pack = build_pack([sequences[index] for index in indices], multiple_of=multiple_of).to(device)
        yield model(pack.input_ids, layout=pack.layout, ends=pack.ends)


def padded_scores(
    model: RewardModel, sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[torch.Tensor]:
    """The scores of each batch of rows of similar length, under ``PADDED_TOKENS``."""
    texts = [EncodedText(tuple(ids)) for ids in sequences]
    for batch in plan_batches([len(text.input_ids) for text in texts], PADDED_TOKENS):
        inputs = collate_texts([texts[index] for index in batch], pad_id=0)
        yield model(**{name: tensor.to(device) for name, tensor in inputs.items()})


def seconds_of(
    compute: Callable[..., Iterator[torch.Tensor]],
    model: RewardModel,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    *,
    backward: bool,
) -> float:
    """Seconds of one pass over the sequences; with ``backward`` the gradients of the sum of their scores too."""
    begin = now(device)
    with torch.set_grad_enabled(backward):
        for scores in compute(model, sequences, device):
            if backward:
                scores.sum().backward()
    seconds = now(device) - begin
    model.zero_grad(set_to_none=True)
    return seconds


def measure(
    model: RewardModel, device: torch.device, series: Sequence[Point], *, backward: bool, repeats: int
) -> list[dict[str, Any]]:
    """One entry a point: median seconds of a group, packed and padded, the two in turn."""
    ways = {"packed": packed_scores, "padded": padded_scores}
    vocabulary = model.backbone.get_input_embeddings().num_embeddings
    entries = []
    for point in series:
        sequences = point.sequences(vocabulary)
        for compute in ways.values():
            seconds_of(compute, model, sequences[: point.answers], device, backward=backward)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, compute in ways.items():
                found[name].append(seconds_of(compute, model, sequences, device, backward=backward))
        entries.append(
            {
                "series": point.series,
                "n_groups": point.n_groups,
                "answers": point.answers,
                "prompt_tokens": point.prompt_tokens,
                "answer_tokens": point.answer_tokens,
                "ceiling": point.ceiling,
                **{
                    f"{name}_seconds_per_group": statistics.median(values) / point.n_groups
                    for name, values in found.items()
                },
            }
        )
    return entries


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Cost of a group as it grows, packed and padded.")
    add_run_arguments(parser)
    parser.add_argument("--group_sizes", type=positive, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prompts", type=positive, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--n_groups", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt_tokens", type=positive, default=256, help="where the prompt is not what grows")
    parser.add_argument("--answer_tokens", type=positive, default=64)
    parser.add_argument("--backward", type=int, choices=(0, 1), default=0, help="gradients too")
    parser.add_argument("--repeats", type=positive, default=3)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure and print the JSON line."""
    args = build_parser().parse_args(argv)
    if args.precision == "autocast":
        raise ContrastRMError("growth is measured without autocast; use --precision bfloat16 or float32")
    device = resolve_device(args.device)
    model, _ = load_reward_model(args.model_path, dtype=args.precision, device=device)
    reason = model.enable_packing()
    if reason is not None:
        raise ContrastRMError(f"this model takes no packs: {reason}")
    series = points(
        group_sizes=args.group_sizes,
        prompts=args.prompts,
        n_groups=args.n_groups,
        prompt_tokens=args.prompt_tokens,
        answer_tokens=args.answer_tokens,
    )
    fields = {
        "task": "growth",
        "precision": args.precision,
        "device": str(device),
        "backward": bool(args.backward),
        "repeats": args.repeats,
        "padded_tokens": PADDED_TOKENS,
        "points": measure(model, device, series, backward=bool(args.backward), repeats=args.repeats),
    }
    write_line(fields | model_fields(args.model_path), args.output_file)
    return 0


if __name__ == "__main__":
    run(main)
