"""What both evaluations share: flags, the scorer, the results folder, metadata.

Reads a reward model folder (or hub id). Writes, in the results folder, ``model.json``, which says whose results lie
there, and ``scores.sqlite``, the model's scores (``codes.common.score_store``). Used by
``python -m codes.evaluate.eval_rm`` and ``python -m codes.evaluate.eval_reward_bench``.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download

from codes.common.base_model import model_hash, resolve_model_path
from codes.common.chat import ChatFormatter, Conversation, RefusedTexts
from codes.common.cli import is_first_process, natural
from codes.common.errors import ContrastRMError
from codes.common.ranks import Ranks, join_launch, local_device
from codes.common.records import ReadReport, ensure_writable_folder, file_sha256, too_many_bad, write_json
from codes.common.reporting import run_metadata
from codes.common.score_store import STORE_FILE, ScoreStore
from codes.common.scoring import Invariance, Scorer, ScoreResult, count_tied
from codes.common.settings import OVERLENGTH_POLICIES, PACKINGS, TEMPLATE_HELP
from codes.evaluate.api import RemoteScorer, TextScorer
from codes.evaluate.baselines import BASELINES, BaselineScorer, baseline_of
from codes.train.reward_model import DTYPES, RewardModel, embedding_rows, load_reward_model, own_length_limit

MODEL_FILE = "model.json"
STORE_CHOICES = ("auto", "none")
# So many texts of every evaluation are scored again alone: the cheap part of codes.evaluate.doctor.
CHECKED_TEXTS = 8
# Where two runs of the same evaluation may differ: times, and what a killed run had already done.
RUN_FIELDS = ("created_utc", "wall_seconds", "n_computed_tokens", "n_from_store", "score_store", "n_processes")
# The modules that turn a text into a score. A change of one of them makes every stored score another one's.
SCORING_MODULES = (
    "codes.common.chat",
    "codes.common.packed_attention",
    "codes.common.packing",
    "codes.common.scoring",
    "codes.train.reward_model",
)


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer and what its results must say about it."""

    scorer: TextScorer
    model_path: str
    weight_hash: str
    description: dict[str, Any]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every evaluation of a local reward model."""
    parser.add_argument(
        "--model_path",
        required=True,
        help="folder or hub id of a trained reward model, or a baseline: baseline:shorter",
    )
    parser.add_argument("--results_dir", default="results", help="parent of the model's results folder")
    parser.add_argument("--chat_template", default="", help=TEMPLATE_HELP)
    parser.add_argument("--max_length", type=natural, default=0, help="most tokens of a text; 0: the model's own limit")
    parser.add_argument("--overlength", default="left", choices=OVERLENGTH_POLICIES, help="what happens beyond it")
    parser.add_argument(
        "--max_tokens_per_batch",
        type=natural,
        default=0,
        help="computed tokens of a batch; 0: what suits the device",
    )
    parser.add_argument("--packing", default="auto", choices=PACKINGS, help="auto: shared prefixes if the model can")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as the weights were saved")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=42, help="chooses the rows of a limited run")
    parser.add_argument("--max_bad_rows", type=natural, default=0, help="broken rows to leave out before stopping")
    parser.add_argument("--attn_implementation", default=None, help="as transformers names it, e.g. sdpa or eager")
    parser.add_argument(
        "--score_store",
        default="auto",
        help=f"file of scores that are computed once; auto: {STORE_FILE} in the model's results folder, and none for a server",
    )
    parser.add_argument("--reward_url", help="a reward server; --model_path is then its name, REWARD_API_KEY its key")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the model's own folder")


def scorer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the flags of ``add_model_arguments`` that ``load_scorer`` takes, as its keyword arguments."""
    return {name: getattr(args, name) for name in inspect.signature(load_scorer).parameters}


def load_scorer(
    *,
    model_path: str,
    chat_template: str = "",
    max_length: int = 0,
    overlength: str = "left",
    max_tokens_per_batch: int = 0,
    packing: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    reward_url: str | None = None,
    score_store: str = "none",
    results_dir: str | Path = "results",
    seed: int = 42,
) -> LoadedScorer:
    """Load a trained reward model as a scorer, connect to a reward server, or make a baseline.

    Of several processes of one launch only the first returns: the others compute batches for it and exit when it has ended.

    Args:
        score_store: A file, ``none``, or ``auto``: in the model's folder under ``results_dir``; a server's scores are then not
            kept, since what answers behind an address can change.

    Raises:
        ContrastRMError: No such model, no trained head, no such device, a limit beyond the model's own, or a score store that
            cannot be used.
    """
    baseline = baseline_of(model_path) if reward_url is None else None
    if chat_template and (reward_url is not None or baseline is not None):
        raise ContrastRMError(
            f"--chat_template {chat_template} can have no effect: no text of {model_path} is rendered here; leave it out"
        )
    if reward_url is not None:
        _leave_to_the_first_process()
        return _remote_scorer(reward_url, model_path, score_store)
    if baseline is not None:
        _leave_to_the_first_process()
        return _baseline_scorer(BaselineScorer(baseline, seed))
    launch = join_launch()
    place = choose_device(device, in_launch=launch is not None)
    if place.type == "cuda" and place.index is not None:
        # Kernels of other packages are launched on the current device, wherever their tensors lie.
        torch.cuda.set_device(place)
    model, tokenizer = load_reward_model(
        model_path,
        dtype=dtype,
        device=place,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
    )
    limit = _length_limit(model, tokenizer, max_length)
    formatter = ChatFormatter(
        tokenizer, max_length=limit, overlength=overlength, n_embeddings=embedding_rows(model.classifier, tokenizer)
    )
    scorer = Scorer(
        model, formatter, max_tokens_per_batch=max_tokens_per_batch, packing=packing, checked_texts=CHECKED_TEXTS
    )
    if launch is not None:
        scorer.ranks = Ranks(scorer.compute, launch)
        if scorer.ranks.index > 0:
            scorer.ranks.serve()
            sys.exit(0)
    weight_hash = _weight_hash(model_path)
    description = {
        "model_path": model_path,
        "weight_hash": weight_hash,
        "architecture": type(model.classifier).__name__,
        "chat_template": chat_template or None,
        "template_hash": formatter.template_hash,
        "max_length": limit,
        "overlength": overlength,
        "max_tokens_per_batch": scorer.max_tokens_per_batch,
        "packing": scorer.packing,
        "dtype": str(next(model.classifier.base_model.parameters()).dtype).removeprefix("torch."),
        "device": _device_name(place),
        "attn_implementation": getattr(model.classifier.config, "_attn_implementation", None),
        "n_processes": 1 if launch is None else int(launch.num_processes),
    }
    if score_store != "none":
        auto = score_store == "auto"
        path = model_results_folder(results_dir, model_path, weight_hash) / STORE_FILE if auto else Path(score_store)
        scorer.store = ScoreStore(path, making_of_scores(model, description))
    description["score_store"] = None if scorer.store is None else str(scorer.store.path)
    return LoadedScorer(scorer, model_path, weight_hash, description)


def making_of_scores(model: RewardModel, description: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the text that can change a score: the key of the score store.

    Not the token budget, nor the number of processes: they change the company of a text, and so at most its last bits.
    """
    config = model.config.to_dict()
    # Where the files lie, and who wrote them, is no part of the model.
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    own_code = [sys.modules[name].__file__ for name in SCORING_MODULES]
    model_code = [inspect.getfile(type(part)) for part in (model.classifier, model.backbone)]
    names = ("template_hash", "max_length", "overlength", "packing", "dtype", "attn_implementation")
    device = torch.device(str(description["device"]).split()[0])
    return {
        "weights": loaded_weights_hash(model),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        **{name: description[name] for name in names},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "code": [file_sha256(path) for path in own_code + model_code if path],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def loaded_weights_hash(model: torch.nn.Module) -> str:
    """Hex SHA-256 over the weights in memory: adapters, a head and a conversion to another dtype count, file names do not."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + hashlib.sha256(raw).digest()
        ).digest()

    # hashlib lets go of the interpreter while it works.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, sorted(model.state_dict().items())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


class StoredScorer:
    """A scorer of another kind (a reward server) before a score store.

    Texts are handed on in the caller's order, ``TEXTS_AT_ONCE`` at a time, and stored together.
    """

    TEXTS_AT_ONCE = 256

    def __init__(self, inner: TextScorer, store: ScoreStore) -> None:
        self.inner = inner
        self.store = store

    def score(self, conversations: Sequence[Conversation], description: str = "scoring") -> ScoreResult:
        """Score what the store does not hold.

        Raises:
            ContrastRMError: That of the inner scorer or of the store.
        """
        started = time.perf_counter()
        keys = [self.store.key(json.dumps(text.turns(), sort_keys=True).encode()) for text in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        order = list(distinct)
        values = self.store.look_up(order)
        n_from_store = len(values)
        results = []
        for start in range(0, len(order), self.TEXTS_AT_ONCE):
            part = order[start : start + self.TEXTS_AT_ONCE]
            if any(key not in values for key in part):
                results.append(self.inner.score([distinct[key] for key in part], description))
                scores = results[-1].scores.tolist()
                # A text that was left out for its length has no score.
                found = {key: score for key, score in zip(part, scores, strict=True) if score == score}
                values |= self.store.add(found)
        missing = [key for key in keys if key not in values]
        return ScoreResult(
            scores=np.array([values.get(key, np.nan) for key in keys], dtype=np.float32),
            n_texts=len(keys),
            n_distinct=len(order) - len(set(missing)),
            n_truncated=sum(result.n_truncated for result in results),
            n_answer_cut=sum(result.n_answer_cut for result in results),
            n_dropped=len(missing),
            n_tokens=sum(result.n_tokens for result in results),
            n_computed_tokens=sum(result.n_computed_tokens for result in results),
            seconds=time.perf_counter() - started,
            n_from_store=n_from_store,
            n_tied_texts=count_tied(list(values.values())),
        )


def _leave_to_the_first_process() -> None:
    """End the other processes of a launch where there is nothing to share out."""
    if not is_first_process():
        sys.exit(0)


def _remote_scorer(reward_url: str, name: str, score_store: str) -> LoadedScorer:
    # The weights of a server cannot be seen: its address and name tell its results from another's.
    identity = hashlib.sha256(f"{reward_url}\n{name}".encode()).hexdigest()
    description = {"model_path": name, "reward_url": reward_url, "weight_hash": None}
    scorer: TextScorer = RemoteScorer(reward_url, model=name)
    if score_store not in STORE_CHOICES:
        scorer = StoredScorer(scorer, ScoreStore(score_store, {"reward_url": reward_url, "model": name}))
        description["score_store"] = score_store
    return LoadedScorer(scorer, name, identity, description)


def _baseline_scorer(scorer: BaselineScorer) -> LoadedScorer:
    # No colon in the name of a folder: copying tools take what stands before it for a host.
    name = f"baseline-{scorer.name}"
    description = {"model_path": f"{name}: {BASELINES[scorer.name]}", "weight_hash": None}
    return LoadedScorer(scorer, name, scorer.identity, description)


def choose_device(name: str, in_launch: bool = False) -> torch.device:
    """The device of a name, or for ``auto`` the first GPU (of several processes in a launch: one each), else the CPU.

    Raises:
        ContrastRMError: There is no such device.
    """
    if name == "auto":
        return local_device() if in_launch else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if in_launch and name != "cpu":
        raise ContrastRMError(f"--device {name} would put every process of this launch on one device; use auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ContrastRMError(f"cannot use --device {name}: {reason}; use auto or cpu") from error
    return device


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _length_limit(model: RewardModel, tokenizer: Any, max_length: int) -> int | None:
    own = own_length_limit(model.classifier, tokenizer)
    if max_length and own and max_length > own:
        raise ContrastRMError(f"--max_length {max_length} is beyond the model's own limit of {own} tokens")
    return max_length or own


def snapshot_folder(model_path: str) -> Path:
    """The folder of a model that was loaded a moment ago: for a hub id, where it lies in the cache."""
    folder = Path(model_path)
    return folder if folder.is_dir() else Path(snapshot_download(model_path, local_files_only=True))


def _weight_hash(model_path: str) -> str:
    return str(model_hash(snapshot_folder(resolve_model_path(model_path))))


def model_results_folder(results_dir: str | Path, model_path: str, weight_hash: str) -> Path:
    """The results folder of one model: ``<results_dir>/<name of the model folder>``.

    Where that folder holds the results of other weights (its ``model.json`` says whose), the first eight
    digits of the weight hash are added. ``model.json`` is written.

    Raises:
        ContrastRMError: The folder cannot be made or written, or its ``model.json`` cannot be read.
    """
    name = Path(model_path).resolve().name if Path(model_path).exists() else Path(model_path).name
    folder, owner = Path(results_dir) / name, {"model_path": model_path, "weight_hash": weight_hash}
    if not folder.exists():
        _make_claimed(folder, owner)
    if not _is_free_for(folder, weight_hash):
        folder = Path(results_dir) / f"{name}-{weight_hash[:8]}"
    ensure_writable_folder(folder)
    write_json(folder / MODEL_FILE, owner)
    return folder


def _make_claimed(folder: Path, owner: Mapping[str, str]) -> None:
    """Make a folder that says whose it is from its first moment on: two evaluations of a model may begin at once.

    Where another process was faster, its folder stays.
    """
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        made.mkdir(parents=True)
        write_json(made / MODEL_FILE, owner)
        made.rename(folder)
    except (OSError, ContrastRMError):
        # What cannot be written is said where the folder is needed.
        shutil.rmtree(made, ignore_errors=True)


def _is_free_for(folder: Path, weight_hash: str) -> bool:
    owner = folder / MODEL_FILE
    if not owner.exists():
        # Results that do not say whose they are are somebody else's.
        return not folder.is_dir() or not any(folder.iterdir())
    try:
        return bool(json.loads(owner.read_text(encoding="utf-8"))["weight_hash"] == weight_hash)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContrastRMError(
            f"cannot read {owner}: {error}; move {folder} away or choose another --results_dir"
        ) from error


@dataclass(frozen=True)
class ScoredRow:
    """The texts of one row of a file, and which of them are compared with each other (by their places)."""

    file: str
    line: int
    texts: Sequence[Conversation]
    compared: Sequence[tuple[int, int]]

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


def score_rows(
    scorer: TextScorer, rows: Sequence[ScoredRow], reports: Iterable[ReadReport] = (), max_bad_rows: int = 0
) -> tuple[list[list[float]], ScoreResult]:
    """Score the texts of all rows in one call.

    A row with a text that the model's template refuses is a bad row of its file: it has no scores.

    Args:
        reports: Of the files, with the bad rows that they have already.

    Returns:
        The scores of each row, and what the scoring took.

    Raises:
        ContrastRMError: A file has more bad rows than allowed, or what the scorer raises.
    """
    texts = [text for row in rows for text in row.texts]
    owners = [number for number, row in enumerate(rows) for _ in row.texts]
    refused: dict[int, str] = {}
    try:
        result = scorer.score(texts, "scoring")
    except RefusedTexts as refusal:
        for place, reason in refusal.reasons.items():
            refused.setdefault(owners[place], f"{rows[owners[place]].place}: {reason}")
        _check_bad_rows(rows, refused, reports, max_bad_rows)
        accepted = [place for place, owner in enumerate(owners) if owner not in refused]
        part = scorer.score([texts[place] for place in accepted], "scoring")
        scores, seen_as = np.full(len(texts), np.nan, dtype=np.float32), np.full(len(texts), -1)
        scores[accepted] = part.scores
        seen_as[accepted] = part.seen_as
        result = replace(
            part, scores=scores, seen_as=tuple(seen_as.tolist()), n_texts=len(texts), refused=tuple(refused.values())
        )
    every = iter(result.scores.tolist())
    found = [[next(every) for _ in row.texts] for row in rows]
    return found, replace(result, equal_rows=tuple(_equal_rows(rows, result.seen_as)))


def _check_bad_rows(
    rows: Sequence[ScoredRow], refused: Mapping[int, str], reports: Iterable[ReadReport], max_bad_rows: int
) -> None:
    n_bad = Counter({report.path: len(report.bad) for report in reports})
    for number, message in refused.items():
        file = rows[number].file
        n_bad[file] += 1
        if n_bad[file] > max_bad_rows:
            raise too_many_bad(message, n_bad[file], max_bad_rows)


def _equal_rows(rows: Sequence[ScoredRow], seen_as: Sequence[int] | None) -> Iterator[str]:
    """Places of rows that compare two different texts which have become one to the model."""
    if seen_as is None:
        return
    start = 0
    for row in rows:
        numbers = seen_as[start : start + len(row.texts)]
        start += len(row.texts)
        if any(numbers[a] == numbers[b] != -1 and row.texts[a] != row.texts[b] for a, b in row.compared):
            yield row.place


def result_metadata(
    loaded: LoadedScorer, result: ScoreResult, reports: Iterable[ReadReport], seed: int
) -> dict[str, Any]:
    """What a summary says of its making (DESIGN: model, data, versions, cost)."""
    return {
        **loaded.description,
        "data_files": [
            {
                "path": report.path,
                "sha256": file_sha256(report.path),
                "n_rows": report.n_rows,
                "n_bad_rows": len(report.bad),
                "bad_rows": report.bad,
            }
            for report in reports
        ],
        "seed": seed,
        "wall_seconds": result.seconds,
        "n_texts": result.n_texts,
        "n_distinct_texts": result.n_distinct,
        "n_truncated_texts": result.n_truncated,
        "n_answer_cut_texts": result.n_answer_cut,
        "n_dropped_texts": result.n_dropped,
        "n_tokens": result.n_tokens,
        "n_computed_tokens": result.n_computed_tokens,
        "n_from_store": result.n_from_store,
        "n_tied_texts": result.n_tied_texts,
        "refused_rows": list(result.refused),
        "equal_rows": list(result.equal_rows),
        "invariance": None if result.invariance is None else asdict(result.invariance),
        **run_metadata(),
    }


def scoring_notes(result: ScoreResult) -> list[str]:
    """Sentences for the console: what came from the store, ties, cut texts, and whether a text's company matters."""
    notes = []
    if result.n_from_store is not None:
        n_computed = result.n_distinct - result.n_from_store
        notes.append(
            f"score store: {result.n_from_store} of {result.n_distinct} distinct texts found, {n_computed} computed"
        )
    if result.n_tied_texts:
        notes.append(f"{result.n_tied_texts} of {result.n_distinct} distinct texts share their score with another one")
    if result.n_truncated:
        notes.append(f"{result.n_truncated} of {result.n_texts} texts were cut, {result.n_answer_cut} in the answer")
    notes += [f"bad row left out: {message}" for message in result.refused]
    if result.equal_rows:
        shown = ", ".join(result.equal_rows[:5]) + (", ..." if len(result.equal_rows) > 5 else "")
        notes.append(
            f"{len(result.equal_rows)} rows compare answers that are the same to the model once they are rendered and cut, and "
            f"count as ties: {shown}; look at the chat template and --max_length"
        )
    if result.n_dropped:
        notes.append(f"{result.n_dropped} of {result.n_texts} texts were dropped; their pairs are excluded")
    return notes + _invariance_notes(result.invariance)


def _invariance_notes(found: Invariance | None) -> list[str]:
    if found is None:
        return []
    spread = f" ({found.max_difference / found.score_sd:.1e} of the scores' SD)" if found.score_sd else ""
    note = f"{found.n_texts} texts scored again alone differ by at most {found.max_difference:.1e}{spread}"
    if found.is_rounding:
        return [note]
    cure = "look at python -m codes.evaluate.doctor, or use --packing off --score_store none"
    return [f"WARNING: {note}, more than rounding explains: scores depend on their batch; {cure}"]


def json_score(score: float) -> float | None:
    """A score as JSON has it: None where the text was dropped (JSON knows no NaN)."""
    return None if score != score else float(score)
