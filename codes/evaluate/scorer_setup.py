"""Scorers from settings: a local reward model, a reward server, or a baseline.

Reads a reward model folder (or hub id). Writes ``scores.sqlite``, the model's scores (``codes.common.score_store``), in its
results folder. Used by ``python -m codes.evaluate.eval_rm`` and ``python -m codes.evaluate.eval_reward_bench``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from codes.common.base_model import model_hash, resolve_model_path
from codes.common.chat import ChatFormatter
from codes.common.cli import is_first_process
from codes.common.errors import ContrastRMError
from codes.common.ranks import Ranks, join_launch, local_device
from codes.common.records import file_sha256
from codes.common.score_store import STORE_FILE, ScoreStore
from codes.common.scoring import Scorer
from codes.evaluate.api import LoadedScorer, RemoteScorer, StoredScorer, TextScorer
from codes.evaluate.baselines import BASELINES, BaselineScorer, baseline_of
from codes.evaluate.results import model_results_folder
from codes.evaluate.settings import ScorerSettings
from codes.train.reward_model import RewardModel, embedding_rows, load_reward_model, own_length_limit

STORE_CHOICES = ("auto", "none")
# So many texts of every evaluation are scored again alone: the cheap part of codes.evaluate.doctor.
CHECKED_TEXTS = 8
# The modules that turn a text into a score. A change of one of them makes every stored score another one's.
SCORING_MODULES = (
    "codes.common.chat",
    "codes.common.packed_attention",
    "codes.common.packing",
    "codes.common.scoring",
    "codes.train.reward_model",
)


def load_scorer(settings: ScorerSettings) -> LoadedScorer:
    """Load a trained reward model as a scorer, connect to a reward server, or make a baseline.

    Of several processes of one launch only the first returns: the others compute batches for it and exit when it has ended.
    ``score_store`` is a file, ``none``, or ``auto``: in the model's results folder; a server's scores are then not kept, since
    what answers behind an address can change.

    Raises:
        ContrastRMError: No such model, no trained head, no such device, a limit beyond the model's own, or a score store that
            cannot be used.
    """
    baseline = baseline_of(settings.model_path) if settings.reward_url is None else None
    is_model = settings.reward_url is None and baseline is None
    if settings.chat_template and not is_model:
        raise ContrastRMError(
            f"--chat_template {settings.chat_template} can have no effect: no text of {settings.model_path} is rendered here; "
            "leave it out"
        )
    if is_model:
        return _local_scorer(settings)
    if not is_first_process():
        sys.exit(0)  # there is nothing to share out
    if settings.reward_url is not None:
        return _remote_scorer(settings.reward_url, settings.model_path, settings.score_store)
    return _baseline_scorer(BaselineScorer(str(baseline), settings.seed))


def _local_scorer(settings: ScorerSettings) -> LoadedScorer:
    """A reward model on its device, with its score store."""
    launch = join_launch()
    place = choose_device(settings.device, in_launch=launch is not None)
    if place.type == "cuda" and place.index is not None:
        # Kernels of other packages are launched on the current device, wherever their tensors lie.
        torch.cuda.set_device(place)
    model, tokenizer = load_reward_model(
        settings.model_path,
        dtype=settings.dtype,
        device=place,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
    )
    formatter = ChatFormatter(
        tokenizer,
        max_length=_length_limit(model, tokenizer, settings.max_length),
        overlength=settings.overlength,
        n_embeddings=embedding_rows(model.classifier, tokenizer),
    )
    scorer = Scorer(
        model,
        formatter,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        packing=settings.packing,
        checked_texts=CHECKED_TEXTS,
    )
    if launch is not None:
        scorer.ranks = Ranks(scorer.compute, launch)
        if scorer.ranks.index > 0:
            scorer.ranks.serve()
            sys.exit(0)
    weight_hash = str(model_hash(snapshot_folder(resolve_model_path(settings.model_path))))
    description = {
        "model_path": settings.model_path,
        "weight_hash": weight_hash,
        **_described(model, scorer, place),
        "n_processes": 1 if launch is None else int(launch.num_processes),
        "chat_template": settings.chat_template or None,
    }
    if settings.score_store != "none":
        folder = model_results_folder(settings.results_dir, settings.model_path, weight_hash)
        path = folder / STORE_FILE if settings.score_store == "auto" else Path(settings.score_store)
        scorer.store = ScoreStore(path, making_of_scores(model, description))
    description["score_store"] = None if scorer.store is None else str(scorer.store.path)
    return LoadedScorer(scorer, settings.model_path, weight_hash, description)


def _described(model: RewardModel, scorer: Scorer, device: torch.device) -> dict[str, Any]:
    """What the results say of how a model scores."""
    return {
        "architecture": type(model.classifier).__name__,
        "template_hash": scorer.formatter.template_hash,
        "max_length": scorer.formatter.max_length,
        "overlength": scorer.formatter.overlength,
        "max_tokens_per_batch": scorer.max_tokens_per_batch,
        "packing": scorer.packing,
        "dtype": str(next(model.classifier.base_model.parameters()).dtype).removeprefix("torch."),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        "attn_implementation": getattr(model.classifier.config, "_attn_implementation", None),
    }


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


def _length_limit(model: RewardModel, tokenizer: Any, max_length: int) -> int | None:
    own = own_length_limit(model.classifier, tokenizer)
    if max_length and own and max_length > own:
        raise ContrastRMError(f"--max_length {max_length} is beyond the model's own limit of {own} tokens")
    return max_length or own


def snapshot_folder(model_path: str) -> Path:
    """The folder of a model that was loaded a moment ago: for a hub id, where it lies in the cache."""
    folder = Path(model_path)
    return folder if folder.is_dir() else Path(snapshot_download(model_path, local_files_only=True))
