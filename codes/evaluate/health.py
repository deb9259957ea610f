"""The checks of a reward model's health, each with the cure of what it finds.

Reads a reward model folder (or hub id) and, for the length check, ``<bias>_bias.jsonl`` files. Writes nothing. Used by
``python -m codes.evaluate.doctor MODEL``.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from codes.common.base_model import resolve_model_path
from codes.common.biases import PAIRWISE, eval_file_name
from codes.common.chat import (
    ChatFormatter,
    Conversation,
    EncodedText,
    RefusedTexts,
    last_token_ids,
)
from codes.common.errors import ContrastRMError
from codes.common.records import read_bias_file
from codes.common.scoring import ROUNDING_OF_FLOAT32, ROUNDING_OF_HALF, Scorer, collate_texts
from codes.evaluate.scorer_setup import choose_device, snapshot_folder
from codes.train.reward_model import (
    PINNED_DATE,
    RewardModel,
    embedding_rows,
    load_reward_model,
    own_length_limit,
    save_reward_model,
)

PASS, WARN, FAIL = "pass", "warn", "fail"
# So many pairs may change sides between float32 and bfloat16 before the model is called unfit for bfloat16.
MOST_CHANGED_VERDICTS = 0.1
# So many texts may lose a part of their answer before a length limit is called wrong.
MOST_CUT_ANSWERS = 0.01
LONGEST_TEXT = 1024
SAVE_AGAIN = "load it with load_reward_model and save it with save_reward_model (codes.train.reward_model)"

# A question, a better and a worse answer, of many lengths.
PAIRS = (
    ("What is 2 + 2?", "4", "5"),
    ("Is Paris the capital of France?", "Yes.", "No, it is Lyon."),
    ("Name a fruit.", "An apple is a fruit.", "A carrot."),
    ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because it mirrors the sea."),
    ("Translate 'good night' into German.", "Gute Nacht.", "Guten Morgen!"),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it.", "Fry it in a pan with oil."),
    ("Give me three colours.", "Red, green and blue.", "Red and green."),
    ("Who wrote Hamlet?", "William Shakespeare wrote it around 1600.", "It was written by Charles Dickens in 1859."),
    ("What does HTTP 404 mean?", "The server found nothing at that address.", "The server is on fire and must be replaced."),
    ("Write a haiku about rain.", "Rain on the tin roof,\na drum that no hand has struck.\nThe tea grows cold.", "It rains."),
    ("Is the earth flat?", "No. It is very nearly a sphere, a little flattened at the poles.", "Yes, completely."),
    ("How many legs has a spider?", "Eight.", "Spiders are insects, and insects have six legs."),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: ``pass``, ``warn`` (look at it) or ``fail`` (scores are wrong, here or in another tool).
        cure: What to do; empty where the check passed.
    """

    check: str
    status: str
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Patient:
    """A model as this project loads it, and its files as they stand.

    Attributes:
        config, tokenizer: As plain transformers loads them, unmended.
        folder: Its files.
    """

    model: RewardModel
    formatter: ChatFormatter
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    trust_remote_code: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as they were loaded for this examination."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @cached_property
    def texts(self) -> list[EncodedText]:
        """Distinct texts within the length limit, short ones and one as long as the limit allows.

        Raises:
            ContrastRMError: The limit cuts nearly all of them.
        """
        conversations = [conversation for pair in _pairs() for conversation in pair]
        sentence = "The mat is red because the cat that sat on it was red. "
        prompt = [{"role": "user", "content": "Tell me about the mat."}]
        conversations += [Conversation(prompt, sentence * 2**power) for power in range(8)]
        limit = min(self.formatter.max_length or LONGEST_TEXT, LONGEST_TEXT)
        encoded = dict.fromkeys(ChatFormatter(self.formatter.tokenizer).encode(conversations))
        whole = [text for text in encoded if len(text.input_ids) <= limit]
        if len(whole) < 4:
            raise ContrastRMError(f"a limit of {limit} tokens cuts nearly every short text; raise --max_length")
        return whole

    @cached_property
    def alone(self) -> np.ndarray:
        """The scores of the texts, each computed alone."""
        return np.array([_score(self.model, [text], self.formatter)[0] for text in self.texts])

    @property
    def tolerance(self) -> float:
        """A difference of a score that rounding explains."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        rounding = (ROUNDING_OF_HALF if half else ROUNDING_OF_FLOAT32) * float(self.alone.std())
        return max(rounding, 1e-6 * float(np.abs(self.alone).max()))

    def difference(self, scores: np.ndarray) -> str:
        """The largest difference from the scores alone, in words."""
        largest, spread = float(np.abs(scores - self.alone).max()), float(self.alone.std())
        return f"largest difference {largest:.1e}" + (f" ({largest / spread:.1e} of the SD)" if spread else "")

    def agrees(self, scores: np.ndarray) -> bool:
        """Whether scores are those of the texts alone."""
        return bool(np.abs(scores - self.alone).max() <= self.tolerance)


def admit(
    model_path: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    max_length: int = 0,
    overlength: str = "left",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str = "",
) -> Patient:
    """Load a model for its examination.

    Raises:
        ContrastRMError: It cannot be loaded as a reward model, or there is no such device.
    """
    path = resolve_model_path(model_path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ContrastRMError(
            f"{model_path} holds an adapter alone, which plain transformers does not load as a model: examine the merged model "
            "(load_reward_model and save_reward_model of codes.train.reward_model make one, as does MERGE_LORA=1)"
        )
    model, tokenizer = load_reward_model(
        model_path,
        dtype=dtype,
        device=choose_device(device),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
    )
    limit = max_length or own_length_limit(model.classifier, tokenizer)
    folder = snapshot_folder(path)
    return Patient(
        model,
        ChatFormatter(tokenizer, max_length=limit, overlength=overlength),
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
        folder,
        trust_remote_code,
    )


def examine(model_path: str, *, data_dir: str | None = None, **options: Any) -> list[Finding]:
    """Run every check.

    Args:
        data_dir: Evaluation files whose texts are held against the length limit.
        options: Of ``admit``.
    """
    try:
        patient = admit(model_path, **options)
    except ContrastRMError as error:
        return [Finding("loads, with a head", FAIL, str(error), "see the message")]
    findings = [check_head(patient), check_vocabulary(patient)]
    if any(finding.status == FAIL for finding in findings):
        return findings  # nothing can be scored
    checks: tuple[Callable[[Patient], Finding], ...] = (
        check_head_precision,
        check_pad,
        check_eos,
        check_template,
        check_bos,
        check_date,
        check_generation_prompt,
        check_pooled_token,
        check_padding_side,
        check_batch,
        check_packing,
        check_dropout,
    )
    findings += [check(patient) for check in checks]
    # The last one converts the model's weights.
    return [*findings, check_length(patient, data_dir), check_save(patient), check_dtype(patient)]


def _pairs() -> list[tuple[Conversation, Conversation]]:
    prompts = [[{"role": "user", "content": question}] for question, _, _ in PAIRS]
    return [
        (Conversation(prompt, better), Conversation(prompt, worse))
        for prompt, (_, better, worse) in zip(prompts, PAIRS, strict=True)
    ]


def _batch(texts: Sequence[EncodedText], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    batch = collate_texts(texts, pad_id)
    if side == "left":
        width = batch["input_ids"].shape[1]
        shifts = [width - len(text.input_ids) for text in texts]
        batch = {
            key: torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
            for key, rows in batch.items()
        }
    return batch


def _score(
    model: RewardModel, texts: Sequence[EncodedText], formatter: ChatFormatter, side: str = "right"
) -> np.ndarray:
    """Our scores of one padded batch."""
    batch = _batch(texts, formatter.tokenizer.pad_token_id or 0, side)
    device = next(model.parameters()).device
    with torch.inference_mode():
        scores: np.ndarray = model(**{key: value.to(device) for key, value in batch.items()}).double().cpu().numpy()
    return scores


def _plain_score(patient: Patient, texts: Sequence[EncodedText], side: str = "right") -> np.ndarray:
    """What plain transformers reads from the same weights under the pad ids that stand in the files.

    Raises:
        ValueError: It refuses the batch.
    """
    classifier = patient.model.classifier
    device = next(classifier.parameters()).device
    batch = _batch(texts, patient.tokenizer.pad_token_id or 0, side)
    with _pad_id(classifier.config, patient.config.get_text_config().pad_token_id), torch.inference_mode():
        logits = classifier(**{key: value.to(device) for key, value in batch.items()}).logits
    scores: np.ndarray = logits.squeeze(-1).double().cpu().numpy()
    return scores


@contextmanager
def _pad_id(config: PretrainedConfig, pad_id: int | None) -> Iterator[None]:
    places = [config] if config is config.get_text_config() else [config, config.get_text_config()]
    before = [place.pad_token_id for place in places]
    for place in places:
        place.pad_token_id = pad_id
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.pad_token_id = value


# --- the files


def check_head(patient: Patient) -> Finding:
    """One label, finite weights, a head that tells texts apart, and no sigmoid in a bare pipeline."""
    check, model, config = "loads, with a head", patient.model, patient.config
    broken = [name for name, weight in model.classifier.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        return Finding(
            check, FAIL, f"weights that are not finite: {', '.join(broken[:3])}", "take an earlier checkpoint"
        )
    backbone = f"{model.classifier.base_model_prefix}."
    head = [(n, p) for n, p in model.classifier.named_parameters() if not n.startswith(backbone) and p.ndim > 1]
    empty = [name for name, weight in head if not weight.any()]
    if empty:
        return Finding(check, FAIL, f"{', '.join(empty)} is zero: every text gets the same score", "train the model")
    if getattr(config, "problem_type", None) != "regression":
        found = (
            f"problem_type is {getattr(config, 'problem_type', None)}: a bare pipeline puts the score through a sigmoid"
        )
        return Finding(check, WARN, found, 'set "problem_type": "regression" in config.json')
    return Finding(check, PASS, "one label, finite weights, raw scores in a pipeline")


def check_vocabulary(patient: Patient) -> Finding:
    """Every id of the tokenizer has an embedding, in the files as they stand."""
    n_rows = int(getattr(patient.config.get_text_config(), "vocab_size", 0)) or embedding_rows(
        patient.model.classifier, patient.formatter.tokenizer
    )
    vocabulary = patient.tokenizer.get_vocab()
    beyond = {token: place for token, place in vocabulary.items() if place >= n_rows}
    if patient.tokenizer.pad_token in beyond:
        found = f"the pad token {patient.tokenizer.pad_token!r} has the id {beyond[patient.tokenizer.pad_token]}, the model has"
        return Finding(
            "vocabulary", FAIL, f"{found} {n_rows} embeddings: plain transformers cannot load it", SAVE_AGAIN
        )
    if beyond:
        found = f"{', '.join(map(repr, sorted(beyond)[:3]))} beyond the model's {n_rows} embeddings"
        return Finding("vocabulary", WARN, found, "keep them out of the texts: one that holds them is refused")
    return Finding("vocabulary", PASS, f"ids up to {max(vocabulary.values())} of {n_rows} embeddings")


def _file_tensor(folder: Path, name: str) -> torch.Tensor | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # it is no dict
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    return None


def check_head_precision(patient: Patient) -> Finding:
    """The head that is loaded with dtype ``auto`` is the head that was saved."""
    check = "head precision"
    backbone = f"{patient.model.classifier.base_model_prefix}."
    names = [name for name, _ in patient.model.classifier.named_parameters() if not name.startswith(backbone)]
    saved = {name: tensor for name in names if (tensor := _file_tensor(patient.folder, name)) is not None}
    dtype = getattr(patient.config, "dtype", None) or torch.float32
    rounded = [name for name, tensor in saved.items() if not torch.equal(tensor.to(dtype).double(), tensor.double())]
    if rounded:
        kind = str(saved[rounded[0]].dtype).removeprefix("torch.")
        found = f"{', '.join(rounded)} is saved as {kind}, but config.json makes it {dtype} on loading"
        return Finding(check, FAIL, found, f'set "dtype": "{kind}" in config.json, or always load with dtype {kind}')
    if not saved:
        return Finding(check, WARN, "no head in *.safetensors to compare with", SAVE_AGAIN)
    return Finding(check, PASS, f"{', '.join(saved)} is loaded as it was saved")


def check_pad(patient: Patient) -> Finding:
    """A pad token that plain transformers can tell from the end of a conversation."""
    config_id, own_id = patient.config.get_text_config().pad_token_id, patient.tokenizer.pad_token_id
    if own_id is None:
        return Finding("pad token", FAIL, "the tokenizer has none: plain transformers refuses batches", SAVE_AGAIN)
    name = f"{own_id} ({patient.tokenizer.pad_token})"
    if not patient.model.pools_last_token:
        return Finding("pad token", PASS, f"{name}; the model pools by itself")
    if own_id in last_token_ids(patient.formatter.tokenizer):
        found = f"{name} also ends a conversation: plain transformers takes the last token for padding"
        return Finding("pad token", FAIL, found, SAVE_AGAIN)
    if config_id != own_id:
        found = (
            f"the tokenizer pads with {name}, config.json says {config_id}: plain transformers reads scores at padding"
        )
        return Finding("pad token", FAIL, found, f'set "pad_token_id": {own_id} in config.json')
    return Finding("pad token", PASS, f"{name} in tokenizer and config, never last in a conversation")


def check_eos(patient: Patient) -> Finding:
    """The end-of-sequence token exists, in tokenizer and configuration alike, and the template closes a turn."""
    own_id, text_config = patient.tokenizer.eos_token_id, patient.config.get_text_config()
    stated = getattr(text_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    if own_id is None:
        if not patient.model.pools_last_token:
            return Finding("eos token", PASS, "none; the model needs none")
        return Finding("eos token", WARN, "the tokenizer has none", "set eos_token in tokenizer_config.json")
    name = f"{own_id} ({patient.tokenizer.eos_token})"
    n_rows = int(patient.model.backbone.get_input_embeddings().weight.shape[0])
    outside = [number for number in ids if number is not None and not 0 <= number < n_rows]
    if outside:
        found = f"config.json names {outside[0]}, beyond the {n_rows} embeddings"
        return Finding("eos token", FAIL, found, f'set "eos_token_id": {own_id} in config.json')
    if stated is not None and own_id not in ids:
        found = f"the tokenizer says {name}, config.json {stated}"
        return Finding("eos token", WARN, found, f'set "eos_token_id": {own_id} in config.json')
    if patient.formatter.has_template and not patient.formatter.closing_ids:
        cure = "end the assistant's turn with a token of its own in the chat template, and train with it"
        return Finding("eos token", WARN, "the template closes a turn with nothing: the score is read at a word", cure)
    return Finding("eos token", PASS, name)


# --- the template


def _template_of_the_files(patient: Patient) -> str | None:
    """The template that plain transformers renders with."""
    own: Any = patient.tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def check_template(patient: Patient) -> Finding:
    """The conversation is rendered with a template, and other tools find the same one."""
    check = "chat template"
    if not patient.formatter.has_template:
        return Finding(check, PASS, "none: question and answer are a pair of texts")
    own, ours = _template_of_the_files(patient), str(patient.formatter.tokenizer.chat_template)
    if own is None:
        found = "the files have none that plain transformers would take: it scores nothing, or something else"
        return Finding(check, FAIL, found, f"{SAVE_AGAIN}, with the same chat_template")
    if ours.removeprefix(PINNED_DATE) != own.removeprefix(PINNED_DATE):
        found = "another one than in the files, as was asked: other tools score something else"
        return Finding(check, WARN, found, f"{SAVE_AGAIN}, with the same chat_template")
    return Finding(check, PASS, "that of the files")


def check_bos(patient: Patient) -> Finding:
    """One BOS, not two."""
    bos = patient.tokenizer.bos_token_id
    if bos is None:
        return Finding("BOS", PASS, "the tokenizer has none")
    starts = [text.input_ids[:2] for text in patient.texts]
    if any(start == (bos, bos) for start in starts):
        cure = "take the BOS out of the chat template or out of the tokenizer's own additions, and train again"
        return Finding("BOS", FAIL, f"every text begins with {bos} twice", cure)
    if not patient.formatter.has_template:
        return Finding("BOS", PASS, "no template; the tokenizer's own rule")
    has_one = all(start[0] == bos for start in starts)
    adds_one = list(patient.tokenizer("a")["input_ids"])[:1] == [bos]
    if adds_one and not has_one:
        cure = "begin the chat template with {{ bos_token }}, if the base model was trained with it"
        return Finding("BOS", WARN, "the tokenizer begins plain texts with BOS, the chat template does not", cure)
    remark = "; a tool that tokenises the rendered text must pass add_special_tokens=False" if adds_one else ""
    return Finding("BOS", PASS, ("written once by the template" if has_one else "not used by the template") + remark)


def _renders_a_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    # A macro of the template goes before the function of the same name that templates are given.
    rendered = {
        tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            chat_template="{%- macro strftime_now(format) -%}"
            + day
            + "{%- endmacro -%}"
            + tokenizer.get_chat_template(),
        )
        for day in ("01 Jan 2020", "31 Dec 2030")
    }
    return len(rendered) > 1


def check_date(patient: Patient) -> Finding:
    """The template writes the same today and tomorrow."""
    if not patient.formatter.has_template:
        return Finding("date in the template", PASS, "no template")
    if _renders_a_date(patient.formatter.tokenizer):
        cure = "take strftime_now out of the chat template"
        return Finding("date in the template", FAIL, "the template writes today's date: scores change daily", cure)
    if _template_of_the_files(patient) is not None and _renders_a_date(patient.tokenizer):
        found = "plain transformers writes today's date; this project pins it when it loads the model"
        return Finding("date in the template", WARN, found, SAVE_AGAIN)
    return Finding("date in the template", PASS, "none")


def check_generation_prompt(patient: Patient) -> Finding:
    """Nothing opens another turn of the assistant after the answer."""
    check, formatter = "generation prompt", patient.formatter
    if not formatter.has_template:
        return Finding(check, PASS, "no template")
    question, answer = "qqQUESTIONqq", "aaANSWERaa"
    prompt = [{"role": "user", "content": question}]
    text = formatter.render(Conversation(prompt, answer))
    go_on = [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": "uuMOREuu"}]
    try:
        longer = formatter.render(Conversation(go_on, "xxENDxx"))
    except RefusedTexts as refusal:
        return Finding(check, WARN, str(refusal), "with this template, give it conversations of one question only")
    opening = text.partition(question)[2].partition(answer)[0]
    tail, between = text.partition(answer)[2], longer.partition(answer)[2].partition("uuMOREuu")[0]
    n_common = next((at for at, pair in enumerate(zip(tail, between, strict=False)) if pair[0] != pair[1]), len(tail))
    # What follows the answer only when nothing else does, and stands before an answer, too.
    extra = tail[min(n_common, len(between)) :].strip()
    if extra and opening.rstrip().endswith(extra):
        cure = "write the last header of the chat template under {% if add_generation_prompt %}, and train again"
        return Finding(check, FAIL, f"the template opens another turn after the answer: {tail[-60:]!r}", cure)
    return Finding(check, PASS, f"a conversation ends with {tail[-40:]!r}")


# --- the scores


def check_pooled_token(patient: Patient) -> Finding:
    """Plain transformers reads the same score: alone, and in a batch padded at the right."""
    check = "pooled token"
    try:
        alone = np.concatenate([_plain_score(patient, [text]) for text in patient.texts])
        if not patient.agrees(alone):
            found = f"plain transformers reads another token of a lone text; {patient.difference(alone)}"
            return Finding(check, FAIL, found, SAVE_AGAIN)
        together = _plain_score(patient, patient.texts)
    except ValueError as error:
        return Finding(check, FAIL, f"plain transformers refuses: {str(error).splitlines()[0]}", SAVE_AGAIN)
    if not patient.agrees(together):
        found = f"plain transformers reads another token in a padded batch; {patient.difference(together)}"
        return Finding(check, FAIL, found, SAVE_AGAIN)
    return Finding(check, PASS, f"plain transformers gives the same scores; {patient.difference(together)}")


def check_padding_side(patient: Patient) -> Finding:
    """Padding at the left changes nothing, or the tokenizer pads at the right."""
    check = "padding side"
    side = patient.tokenizer.padding_side
    ours = _score(patient.model, patient.texts, patient.formatter, "left")
    if patient.model.pools_last_token and not patient.agrees(ours):
        found = f"a text padded at the left scores differently; {patient.difference(ours)}"
        return Finding(check, FAIL, found, "report it: this project's scores should not depend on padding")
    try:
        plain = _plain_score(patient, patient.texts, "left")
    except ValueError:
        return Finding(check, WARN, "plain transformers refuses batches, see the pad token", SAVE_AGAIN)
    if patient.agrees(plain):
        return Finding(check, PASS, f"{side}; the other side gives the same")
    found = f"plain transformers scores differently when padded at the left; {patient.difference(plain)}"
    if side == "left":
        return Finding(
            check, FAIL, f"{found}; the tokenizer pads there", 'set "padding_side": "right" in tokenizer_config.json'
        )
    return Finding(check, PASS, f"right; {found}")


def check_batch(patient: Patient) -> Finding:
    """A text's score is the same alone and in a padded batch."""
    scores = _score(patient.model, patient.texts, patient.formatter)
    if not patient.agrees(scores):
        found = f"scores depend on the batch; {patient.difference(scores)}"
        cure = "score texts one by one (--packing off --max_tokens_per_batch 1), or use --attn_implementation eager"
        return Finding("batch invariance", FAIL, found, cure)
    return Finding("batch invariance", PASS, patient.difference(scores))


def check_packing(patient: Patient) -> Finding:
    """A text's score is the same alone and in a pack, with shared prefixes and without."""
    check = "packing invariance"
    reason = patient.model.enable_packing()
    if reason is not None:
        cure = "nothing to do: padded batches are used, which are slower"
        return Finding(check, WARN, f"the model takes no packs: {reason}", cure)
    found = []
    for packing in ("shared", "packed"):
        scorer = Scorer(patient.model, patient.formatter, packing=packing, progress=False)
        scores = np.array(scorer.compute(patient.texts)[0])
        if not patient.agrees(scores):
            return Finding(check, FAIL, f"--packing {packing}: {patient.difference(scores)}", "use --packing off")
        found.append(f"{packing}: {patient.difference(scores)}")
    return Finding(check, PASS, "; ".join(found))


def check_dropout(patient: Patient) -> Finding:
    """Training mode gives the same scores, again and again."""
    patient.model.train()
    try:
        passes = [_score(patient.model, patient.texts, patient.formatter) for _ in range(2)]
    finally:
        patient.model.eval()
    if not all(patient.agrees(scores) for scores in passes):
        found = f"scores change from pass to pass in training mode; {patient.difference(passes[0])}"
        return Finding("dropout off", FAIL, found, "set the dropout rates of the model's own code to 0")
    return Finding("dropout off", PASS, "training mode scores like evaluation mode")


def check_length(patient: Patient, data_dir: str | None) -> Finding:
    """The length limit leaves the answers whole: those of the evaluation files, or the built-in ones."""
    check, limit = "truncation", patient.formatter.max_length
    conversations = [conversation for pair in _pairs() for conversation in pair]
    where = "built-in texts"
    files = [Path(data_dir) / eval_file_name(name) for name in PAIRWISE] if data_dir else []
    files = [path for path in files if path.is_file()]
    if files:
        where = f"texts of {data_dir}"
        records = [record for path in files for record in read_bias_file(path)[0]]
        conversations = [
            Conversation([{"role": "user", "content": record.question}], answer)
            for record in records
            for answer in (*record.original, *record.rewritten)
        ]
    if limit is None:
        return Finding(check, PASS, "no limit")
    try:
        whole = ChatFormatter(patient.formatter.tokenizer).encode(conversations)
    except RefusedTexts as refusal:
        found = f"{len(refusal.reasons)} of {len(conversations)} {where} are refused: {refusal}"
        return Finding(check, FAIL, found, "take these rows out, or mend the chat template")
    longest, n = max(len(text.input_ids) for text in whole), len(whole)
    over = [text for text, full in zip(conversations, whole, strict=True) if len(full.input_ids) > limit]
    if not over:
        return Finding(check, PASS, f"limit {limit}; the longest of {n} {where} has {longest} tokens")
    cure = (
        f"raise --max_length (the longest text has {longest} tokens) or report the texts as dropped (--overlength drop)"
    )
    try:
        cut = patient.formatter.encode(over)
    except ContrastRMError as error:
        return Finding(check, FAIL, str(error), cure)
    n_answers = sum(text.answer_cut for text in cut)
    found = f"limit {limit}, --overlength {patient.formatter.overlength}: {len(over)} of {n} {where} are longer, {n_answers} lose"
    found += " a part of the answer or are dropped"
    return Finding(check, FAIL if n_answers > MOST_CUT_ANSWERS * n else WARN, found, cure)


def check_save(patient: Patient) -> Finding:
    """Saved and loaded again, the model gives the same scores to the last bit."""
    check = "save and load"
    size = sum(weight.numel() * weight.element_size() for weight in patient.model.state_dict().values())
    cure = "set TMPDIR to a folder with more space"
    try:
        scratch = tempfile.TemporaryDirectory()
    except OSError as error:  # "no usable temporary directory" among them
        return Finding(check, WARN, f"not examined: {error.strerror}", cure)
    with scratch as folder:
        if shutil.disk_usage(folder).free < 1.5 * size:
            return Finding(
                check, WARN, f"not examined: {size / 1e9:.1f} GB do not fit into {Path(folder).parent}", cure
            )
        try:
            saved = save_reward_model(patient.model, patient.formatter.tokenizer, Path(folder) / "model")
        except ContrastRMError as error:
            return Finding(check, FAIL, f"no copy can be saved: {error}", cure)
        try:
            model, tokenizer = load_reward_model(
                str(saved),
                dtype=str(patient.dtype).removeprefix("torch."),
                device=next(patient.model.parameters()).device,
                trust_remote_code=patient.trust_remote_code,
            )
        except ContrastRMError as error:
            message = str(error).replace(str(saved), "the saved copy")
            return Finding(check, FAIL, f"a saved copy does not load: {message}", "mend the model's own code")
        formatter = ChatFormatter(tokenizer, max_length=patient.formatter.max_length)
        scores = np.array([_score(model, [text], formatter)[0] for text in patient.texts])
    if not np.array_equal(scores, patient.alone):
        found = f"a saved copy scores differently; {patient.difference(scores)}"
        return Finding(check, FAIL, found, "look for weights that save_pretrained leaves out (tied or ignored keys)")
    return Finding(check, PASS, "a saved copy gives the same scores to the last bit")


def check_dtype(patient: Patient) -> Finding:
    """The built-in pairs have the same winner in bfloat16 as in float32. Converts the model."""
    formatter = ChatFormatter(patient.formatter.tokenizer)
    limit = patient.formatter.max_length or LONGEST_TEXT
    encoded = [formatter.encode(pair) for pair in _pairs()]
    pairs = [pair for pair in encoded if all(len(text.input_ids) <= limit for text in pair)]
    verdicts = []
    for dtype in (torch.float32, torch.bfloat16):
        patient.model.to(dtype)
        gaps = [np.subtract(*[_score(patient.model, [text], patient.formatter)[0] for text in pair]) for pair in pairs]
        verdicts.append(np.sign(gaps))
    n_changed, n_ties = int((verdicts[0] != verdicts[1]).sum()), int((verdicts[1] == 0).sum())
    found = f"{n_changed} of {len(pairs)} built-in pairs have another winner in bfloat16 than in float32, {n_ties} ties"
    if not n_changed:
        return Finding("dtype", PASS, found)
    status = FAIL if n_changed > math.ceil(MOST_CHANGED_VERDICTS * len(pairs)) else WARN
    return Finding("dtype", status, found, "evaluate with --dtype float32")
