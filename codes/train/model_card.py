"""What a finished run says of itself: the summary and the model card.

Used by ``python -m codes.train.train_reward_model``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from codes.common.base_model import EMBEDDED_NAME, is_embedded
from codes.common.reporting import run_metadata
from codes.train.data_utils import EncodeReport
from codes.train.trainer import Trainer

# "/home/me/data/" of "/home/me/data/train.jsonl"; not of an address, and not of a relative path.
ABSOLUTE_FOLDERS = re.compile(r"(?<![\w.:/~-])~?/(?:[^,/\n]+/)*")
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_NAME}"


def training_summary(trainer: Trainer, report: EncodeReport, train_file_sha256: str, seconds: float) -> dict[str, Any]:
    """``train_summary.json``: steps, data, losses, rates and versions."""
    tokens = sum(entry["tokens"] for entry in trainer.log)
    step_seconds = sum(entry["seconds"] for entry in trainer.log)
    return {
        "steps": trainer.step,
        "groups": report.n_groups,
        "data": asdict(report),
        "train_file_sha256": train_file_sha256,
        "first_loss": trainer.log[0]["train/loss"] if trainer.log else None,
        "last_loss": trainer.log[-1]["train/loss"] if trainer.log else None,
        "last_accuracy": trainer.log[-1]["train/accuracy"] if trainer.log else None,
        "tokens": tokens,
        "tokens_per_second": tokens / step_seconds if step_seconds else None,
        "wall_seconds": seconds,
        "metadata": _metadata(trainer.seed),
    }


def _metadata(seed: int) -> dict[str, Any]:
    """As every result's, with the versions of what only training uses."""
    found = run_metadata()
    for name in ("deepspeed", "peft"):
        with suppress(PackageNotFoundError):  # one process needs no DeepSpeed
            found["versions"][name] = version(name)
    return found | {"seed": seed}


def base_of(model_path: str) -> tuple[str, str | None]:
    """Name and licence of the base model; the licence is what its own card says, None where it says nothing."""
    if is_embedded(model_path):
        return EMBEDDED_HUB_ID, "apache-2.0"
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        return model_path, None
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2] if card.is_file() else []
    licence = re.search(r"^license:\s*(\S+)\s*$", head[0], re.M) if head else None
    return folder.resolve().name, licence.group(1) if licence else None


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be looked up on the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def model_card(arguments: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """``README.md`` of the model's folder: data, arguments, metrics, versions, and how to load it.

    Args:
        arguments: Of the run, as in ``train_args.json``.
        summary: Of the run (``training_summary``); ``groups_per_source``, ``rejected_per_bias``, ``reward_mean``,
            ``reward_std`` (of ``reward_n`` texts), ``max_length`` and ``metrics`` are shown
            where they are there; ``text_pairs``: the model has no chat template.
    """
    base, licence = base_of(str(arguments["model_path"]))
    arguments = {name: _without_folders(value) for name, value in arguments.items()}
    lora = int(arguments.get("lora_rank") or 0)
    merged = bool(arguments.get("merge_lora", True))
    header = ModelCardData(
        library_name="peft" if lora and not merged else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "contrastrm"],
        base_model=base if is_hub_id(base) else None,
        license=licence,
    ).to_yaml()
    adapter_only = bool(lora) and not merged
    parts = [
        f"---\n{header}\n---\n# Reward model trained with ContrastRM",
        _opening(arguments, summary, base, licence, lora, adapter_only=adapter_only),
        _how_to_load(arguments, summary, adapter_only=adapter_only),
        _data(arguments, summary),
        _metrics(summary),
        "## Arguments\n\n" + _table(("argument", "value"), sorted(arguments.items())),
        "## Versions\n\n" + _table(("what", "version"), _versions(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(
    arguments: Mapping[str, Any],
    summary: Mapping[str, Any],
    base: str,
    licence: str | None,
    lora: int,
    *,
    adapter_only: bool,
) -> str:
    mean, std = summary.get("reward_mean"), summary.get("reward_std")
    saved_step = summary.get("held_out", {}).get("step_of_saved_weights", summary["steps"])
    is_last = saved_step == summary["steps"]
    where = "`train_summary.json`" if adapter_only else "`config.json`"
    scale = (
        f"On {summary['reward_n']} texts of its {'training' if is_last else 'held-out'} data the raw score has mean {mean:.4g} "
        f"and standard deviation {std:.4g} (`reward_mean` and `reward_std` in {where}); no score is scaled by them."
        if mean is not None and std is not None
        else "Its scores have no fixed scale."
    )
    weights = (
        ""
        if is_last
        else f" The weights are those after step {saved_step}, the best by held-out {arguments['metric_for_best']}."
    )
    whole = "`adapter/`" if adapter_only else "The folder"
    tokenizer = "tokenizer" if summary.get("text_pairs") else "tokenizer, chat template"
    how = f"a LoRA adapter of rank {lora} and the score head were trained" if lora else "all weights were trained"
    return (
        f"One label, a raw score: higher is better; only differences between answers to one question mean something. {scale}\n\n"
        f"Base model: {base} (licence: {licence or 'see its own card'}). Trained {summary['steps']} steps on "
        f"{summary['groups']} groups of one chosen and one or more rejected answers ({arguments['mode']} loss; {how}).{weights} "
        f"{whole} is complete: {tokenizer} and pad id are those of the training."
    )


def _how_to_load(arguments: Mapping[str, Any], summary: Mapping[str, Any], *, adapter_only: bool) -> str:
    length = summary.get("max_length") or arguments.get("max_length") or "the model's own limit"
    if adapter_only:
        return f"""## How to load it

This folder holds the adapter alone, in `adapter/`. `load_reward_model("FOLDER/adapter")` of this project merges it; with peft:

```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
model = AutoPeftModelForSequenceClassification.from_pretrained("FOLDER/adapter", num_labels=1).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained("FOLDER/adapter")
model.config.pad_token_id = tokenizer.pad_token_id
```

Texts longer than {length} tokens were not trained on."""
    text = (
        'batch = tokenizer("question", "answer", return_tensors="pt")'
        if summary.get("text_pairs")
        else """turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
batch = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)"""
    )
    return f"""## How to load it

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
{text}
score = model(**batch).logits[0, 0].item()
```

* transformers: `pipeline("text-classification", model="FOLDER")` gives the raw score (no sigmoid).
* TRL: `RewardTrainer(model="FOLDER", ...)`, or `AutoModelForSequenceClassification.from_pretrained("FOLDER", num_labels=1)`.
* RewardBench: `rewardbench --model=FOLDER --not_quantized --torch_dtype=bfloat16 --max_length=4096`. Without `--not_quantized` it
  loads in 8 bits.
* vLLM (not tried here): `vllm serve FOLDER --runner pooling --convert classify`; scores from `/classify`. `problem_type` is
  `regression`, so no sigmoid belongs there.
* A template that is rendered to text already holds the special tokens: tokenise it with `add_special_tokens=False`.

Texts longer than {length} tokens were not trained on."""


def _data(arguments: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    lines.append(f"`{arguments['train_file']}`, SHA-256 `{summary['train_file_sha256']}`.")
    for field, what in (("groups_per_source", "groups"), ("rejected_per_bias", "rejected answers")):
        counts = summary.get(field)
        if counts:
            name = field.rpartition("_")[2]
            lines += ["", _table((name, what), [(_without_folders(key), count) for key, count in counts.items()])]
    return "\n".join(lines)


def _metrics(summary: Mapping[str, Any]) -> str:
    named = {
        "loss of the first step": summary.get("first_loss"),
        "loss of the last step": summary.get("last_loss"),
        "accuracy of the last step (training data)": summary.get("last_accuracy"),
        **(summary.get("metrics") or {}),
    }
    rows = [
        (name, f"{value:.4f}" if isinstance(value, float) else value)
        for name, value in named.items()
        if value is not None
    ]
    return "## Metrics\n\n" + _table(("metric", "value"), rows) if rows else ""


def _versions(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    metadata = summary.get("metadata") or {}
    commit = metadata.get("git_commit")
    changed = " with uncommitted changes" if metadata.get("git_uncommitted_changes") else ""
    rows = [("ContrastRM commit", f"{commit}{changed}")] if commit else []
    return [*rows, *sorted((metadata.get("versions") or {}).items())]


def _table(header: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _without_folders(value: Any) -> Any:
    """Absolute paths by their last part: cards are published, and where things lay on a machine is nobody's business."""
    return ABSOLUTE_FOLDERS.sub("", value) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    """A value that cannot break the table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
