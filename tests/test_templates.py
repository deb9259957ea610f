"""How a model's text is written: a template that is missing, one of several, dated; ids and positions that a model lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from codes.common.chat import ChatFormatter, Conversation, take_template
from codes.common.errors import ContrastRMError
from codes.evaluate import eval_reward_bench, eval_rm, health
from codes.evaluate.scorer_setup import load_scorer
from codes.evaluate.settings import ScorerSettings
from codes.train.reward_model import load_reward_model
from codes.train.train_reward_model import main as train
from tests.conftest import CHATML, chatml_tokenizer, llama_tokenizer, save_tiny, spread
from tests.test_chat import encoder_tokenizer

WriteRows = Callable[[str, Sequence[Any]], Path]
TURNS = [{"role": "user", "content": "what is 2 + 2"}, {"role": "assistant", "content": "4"}]
QUICK = [
    "--precision",
    "fp32",
    "--max_steps",
    "1",
    "--warmup_steps",
    "0",
    "--held_out_share",
    "0",
    "--report_to",
    "none",
]


@pytest.fixture
def train_file(write_rows: WriteRows, preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


@pytest.fixture
def bias_data(write_rows: WriteRows) -> Path:
    row = {
        "question": "what is 2 + 2",
        "original_response1": "4",
        "original_response2": "it is red",
        "label": "response1",
    }
    row |= {"rewritten_response1": "4 because", "rewritten_response2": "it is very red because it is red"}
    return write_rows("length_bias.jsonl", [row]).parent


@pytest.fixture
def bench_file(write_rows: WriteRows) -> Path:
    row = {"id": 1, "prompt": "what is 2 + 2", "chosen": "4", "rejected": "red", "subset": "alpacaeval-easy"}
    return write_rows("bench.jsonl", [row])


def edited(folder: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a model whose tokenizer was changed; its weights are not."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("chat_template.jinja", "additional_chat_templates"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(target)
    return target


def without_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None


def trained(model: Path, data: Path, out: Path, *extra: str) -> Path:
    places = ["--model_path", model, "--train_file", data, "--output_dir", out, "--cache_dir", out.parent / "cache"]
    assert train([*map(str, places), *QUICK, *extra]) == 0
    return out


# --- a decoder without chat template


def test_a_decoder_without_chat_template_is_refused_everywhere(
    tiny_base_dir: Path, tiny_llama_dir: Path, train_file: Path, bias_data: Path, bench_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    base = edited(tiny_base_dir, tmp_path / "base", without_template)
    model = edited(tiny_llama_dir, tmp_path / "rm", without_template)
    words = r"has no chat template.*--chat_template \(CHAT_TEMPLATE\): a Jinja file, or chatml"
    results = ["--results_dir", str(tmp_path / "results"), "--model_path", str(model), "--device", "cpu"]
    for extra in ([], ["--estimate", "1"]):
        with pytest.raises(ContrastRMError, match=words):
            trained(base, train_file, tmp_path / "out", *extra)
    with pytest.raises(ContrastRMError, match=words):
        eval_rm.main([*results, "--data_dir", str(bias_data), "--bias_type", "length"])
    with pytest.raises(ContrastRMError, match=words):
        eval_reward_bench.main([*results, "--data_file", str(bench_file)])
    [finding] = health.examine(str(model), device="cpu")
    assert finding.status == health.FAIL and "has no chat template" in finding.found
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("wanted", ["chatml", "file"])
def test_a_template_that_is_named_is_used_saved_and_recorded(
    wanted: str, tiny_base_dir: Path, train_file: Path, bias_data: Path, bench_file: Path, tmp_path: Path
) -> None:
    base = edited(tiny_base_dir, tmp_path / "base", without_template)
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    wanted = str(tmp_path / "own.jinja") if wanted == "file" else wanted
    out = trained(base, train_file, tmp_path / "out", "--chat_template", wanted)
    assert json.loads((out / "train_args.json").read_text())["chat_template"] == wanted
    assert f"| chat_template | {Path(wanted).name} |" in (out / "README.md").read_text()  # a card names no folders
    saved = AutoTokenizer.from_pretrained(out)
    expected = {
        "chatml": "<|im_start|>user\nwhat is 2 + 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
        str(tmp_path / "own.jinja"): "user: what is 2 + 2<|im_end|>assistant: 4<|im_end|>",
    }
    assert saved.apply_chat_template(TURNS, tokenize=False) == expected[wanted]
    # From now on the folder has a template of its own, and its scores need no flag; another one can still be asked for.
    results = ["--results_dir", str(tmp_path / "results"), "--model_path", str(out), "--device", "cpu"]
    eval_rm.main([*results, "--data_dir", str(bias_data), "--bias_type", "length"])
    eval_reward_bench.main([*results, "--data_file", str(bench_file), "--chat_template", "chatml"])
    metadata = [
        json.loads((tmp_path / "results" / "out" / name).read_text())["metadata"]
        for name in ("bias_summary.json", "reward_bench_summary.json")
    ]
    assert [one["chat_template"] for one in metadata] == [None, "chatml"]


def test_the_doctor_says_whose_template_it_used(tiny_llama_dir: Path, tmp_path: Path) -> None:
    bare = edited(tiny_llama_dir, tmp_path / "bare", without_template)
    found = [
        next(one for one in health.examine(str(folder), device="cpu", **options) if one.check == "chat template")
        for folder, options in ((tiny_llama_dir, {}), (bare, {"chat_template": "chatml"}))
    ]
    assert [one.status for one in found] == [health.PASS, health.FAIL] and "the files have none" in found[1].found


def test_the_doctor_survives_a_template_that_refuses(
    tiny_llama_dir: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    one_question = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(one_question + FAILS)
    data = write_rows("length_bias.jsonl", [bias_row("boom", "4", "red", "4 b", "red b")]).parent
    options = {"chat_template": str(tmp_path / "own.jinja"), "data_dir": str(data)}
    found = {one.check: one for one in health.examine(str(tiny_llama_dir), device="cpu", **options)}
    assert found["generation prompt"].status == health.WARN and "one question only" in found["generation prompt"].found
    assert found["truncation"].status == health.FAIL and "4 of 4 texts of" in found["truncation"].found


def test_what_cannot_be_a_template_is_refused(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m['content'] }}")
    (tmp_path / "fails.jinja").write_text("{{ 1 + 'a' }}")
    (tmp_path / "empty.jinja").write_text("")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for name, words in {
        "nowhere": "no such file; known names: chatml",
        "broken.jinja": "endfor",
        "fails.jinja": "TypeError",
        "empty.jinja": "is empty",
        "latin.jinja": "in UTF-8",
    }.items():
        path = str(tmp_path / name) if "." in name else name
        with pytest.raises(ContrastRMError, match=words):
            trained(tiny_base_dir, train_file, tmp_path / "out", "--chat_template", path)
    with pytest.raises(ContrastRMError, match="can have no effect"):
        load_scorer(ScorerSettings(model_path="baseline:shorter", chat_template="chatml"))


def test_a_known_template_begins_with_bos_where_the_tokenizer_does() -> None:
    for make, begins in ((llama_tokenizer, True), (chatml_tokenizer, False)):
        tokenizer = make()
        take_template(tokenizer, "chatml")
        [text] = ChatFormatter(tokenizer).encode([Conversation(TURNS[:1], "4")])
        assert (text.input_ids[0] == tokenizer.bos_token_id) is begins
        assert not begins or text.input_ids.count(tokenizer.bos_token_id) == 1


def test_an_encoder_keeps_its_text_pairs_and_its_card_says_so(train_file: Path, tmp_path: Path) -> None:
    out = trained(roberta_folder(tmp_path / "roberta"), train_file, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "chat template" not in card and "apply_chat" not in card and 'tokenizer("question", "answer"' in card


# --- several templates, and dates


def test_several_templates(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def several(tokenizer: Any) -> None:
        tokenizer.chat_template = {"rag": "{{ 'RAG ' }}" + CHATML, "tool_use": CHATML}

    folder = edited(tiny_llama_dir, tmp_path / "several", several)
    with pytest.raises(
        ContrastRMError, match=r"several chat templates and no default: .*--chat_template \(rag, tool_use\)"
    ):
        load_reward_model(str(folder))
    _, tokenizer = load_reward_model(str(folder), chat_template="rag")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith("RAG <|im_start|>user")


def test_a_date_in_one_of_several_templates_is_pinned(tiny_llama_dir: Path, tmp_path: Path) -> None:
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"

    def several(tokenizer: Any) -> None:
        tokenizer.chat_template = {"default": dated + CHATML, "tool_use": CHATML}

    _, tokenizer = load_reward_model(str(edited(tiny_llama_dir, tmp_path / "several", several)))
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith("26 Jul 2024<|im_start|>")


# --- ids without an embedding


def with_pad(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_pad_token_without_embedding_gets_one(
    packing: str, tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    base = edited(tiny_base_dir, tmp_path / "base", with_pad)
    assert train(["--estimate", "1", "--model_path", str(base), "--train_file", str(train_file), "--output_dir",
                  str(tmp_path / "estimate"), "--cache_dir", str(tmp_path / "cache")]) == 0  # fmt: skip
    out = trained(base, train_file, tmp_path / "out", "--packing", packing)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == model.config.pad_token_id < model.get_input_embeddings().num_embeddings
    texts = [
        tokenizer.apply_chat_template([{**TURNS[0], "content": some}, TURNS[1]], tokenize=False)
        for some in ("a", "a b c d")
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert torch.isfinite(model(**batch).logits).all()
    found = {
        one.check: one for one in health.examine(str(edited(out, tmp_path / "again", lambda _: None)), device="cpu")
    }
    assert found["vocabulary"].status == health.PASS


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_tokenised(
    tiny_base_dir: Path, train_file: Path, tmp_path: Path
) -> None:
    base = edited(tiny_base_dir, tmp_path / "base", lambda tokenizer: tokenizer.add_tokens(["wordy"]))
    for extra in ([], ["--estimate", "1"]):
        with pytest.raises(ContrastRMError, match="no embedding for .'wordy' is .*resize_token_embeddings"):
            trained(base, train_file, tmp_path / "out", *extra)
    assert not (tmp_path / "cache").exists()


def test_a_special_token_without_embedding_is_refused_where_a_text_holds_it(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    # Gemma 3 of 1B has one for images.
    image = {"additional_special_tokens": ["<image>"]}
    folder = edited(tiny_llama_dir, tmp_path / "rm", lambda tokenizer: tokenizer.add_special_tokens(image))
    scorer = load_scorer(ScorerSettings(model_path=str(folder), device="cpu")).scorer
    assert scorer.score([Conversation(TURNS[:1], "4")]).n_texts == 1
    with pytest.raises(ContrastRMError, match="holds the token '<image>', whose id .* is beyond the model's"):
        scorer.score([Conversation(TURNS[:1], "see <image>")])


# --- positions


def roberta_folder(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    tokenizer = tokenizer or encoder_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        type_vocab_size=2,
        max_position_embeddings=162,
        pad_token_id=1,
        num_labels=1,
        problem_type="regression",
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    return save_tiny(folder, spread(RobertaForSequenceClassification(config)), tokenizer)


def test_a_model_that_counts_positions_behind_the_padding_takes_two_tokens_less(
    write_rows: WriteRows, bias_data: Path, tmp_path: Path
) -> None:
    folder = roberta_folder(tmp_path / "roberta")
    scorer = load_scorer(ScorerSettings(model_path=str(folder), device="cpu"))
    assert scorer.description["max_length"] == 160
    long = Conversation([{"role": "user", "content": "why is the cat on the mat " * 30}], "because")
    assert scorer.scorer.score([long]).n_truncated == 1
    rows = [{"question": "why " * n, "chosen": "red", "rejected": ["cat"]} for n in (5, 155, 156, 157, 180)]
    out = trained(folder, write_rows("long.jsonl", rows), tmp_path / "out", "--overlength", "left", "--packing", "off")
    assert json.loads((out / "train_summary.json").read_text())["max_length"] == 160
    assert {one.status for one in health.examine(str(folder), device="cpu")} <= {health.PASS, health.WARN}


# --- rows that the template refuses

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
FAILS = "{% for m in messages %}{% if m['content'] == 'boom' %}{{ 1 + m['content'] }}{% endif %}{% endfor %}" + CHATML
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
CURES = [
    (
        NO_SYSTEM,
        {"system": "be brief", "question": "why"},
        "System role not supported; drop the system turn, put its text",
    ),
    (FAILS, {"question": "boom"}, "TypeError: .*; mend the template"),
    (
        ALTERNATE,
        {"messages": [{"role": "user", "content": "why"}, {"role": "user", "content": "red"}]},
        "roles must alternate; let user and assistant take turns",
    ),
]


@pytest.mark.parametrize("held_out", ["0", "0.5"])
@pytest.mark.parametrize(("template", "prompt", "words"), CURES)
def test_a_row_that_the_template_refuses_is_a_bad_row_of_training(
    template: str, prompt: dict[str, Any], words: str, held_out: str, tiny_base_dir: Path, write_rows: WriteRows,
    preference_rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused = {**prompt, "chosen": "because", "rejected": ["red", "cat"]}
    data = write_rows("a.jsonl", [*preference_rows[:3], refused, *preference_rows[3:], {"question": "no answers"}])
    (tmp_path / "own.jinja").write_text(template)
    options = ["--chat_template", str(tmp_path / "own.jinja"), "--held_out_share", held_out]
    for extra in ([], ["--estimate", "1"]):
        with pytest.raises(
            ContrastRMError, match=rf"a\.jsonl:(4: the chat template refuses turns .*{words}|11: field).*--max_bad_rows"
        ):
            trained(tiny_base_dir, data, tmp_path / "out", *options, "--max_bad_rows", "1", *extra)
    out = trained(tiny_base_dir, data, tmp_path / "out", *options, "--max_bad_rows", "2")
    assert "bad row left out: " in (printed := capsys.readouterr().out) and "a.jsonl:4: the chat template" in printed
    summary = json.loads((out / "train_summary.json").read_text())
    [source] = summary["sources"]
    assert summary["n_bad_rows"] == 2
    assert source["n_rows"] == 12 == 2 + source["n_aside"] + source["n_records"]


def test_a_held_out_row_that_the_template_refuses_is_a_bad_row(
    tiny_base_dir: Path, train_file: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(FAILS)
    rows = [{"question": q, "chosen": "because", "rejected": ["red"]} for q in ("of France", "boom", "of Paris")]
    given = ["--chat_template", str(tmp_path / "own.jinja"), "--eval_file", str(write_rows("eval.jsonl", rows))]
    given += ["--held_out_share", "auto"]
    with pytest.raises(ContrastRMError, match=r"eval\.jsonl:2: the chat template refuses .*--max_bad_rows"):
        trained(tiny_base_dir, train_file, tmp_path / "out", *given)
    trained(tiny_base_dir, train_file, tmp_path / "out", *given, "--max_bad_rows", "1")
    printed = capsys.readouterr().out
    assert "eval.jsonl:2: the chat template" in printed and "held out: 2 groups" in printed


def bias_row(question: str, *texts: str) -> dict[str, str]:
    names = ("original_response1", "original_response2", "rewritten_response1", "rewritten_response2")
    return {"question": question, "label": "response1", **dict(zip(names, texts, strict=True))}


def test_a_row_that_the_template_refuses_is_a_bad_row_of_an_evaluation(
    tiny_llama_dir: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(FAILS)
    common = ["--model_path", str(tiny_llama_dir), "--results_dir", str(tmp_path / "results"), "--device", "cpu"]
    common += ["--chat_template", str(tmp_path / "own.jinja")]
    bias = [bias_row(question, "4", "red", "4 because", "red cat") for question in ("why", "boom", "of")]
    write_rows("length_bias.jsonl", bias)
    bench = [
        {"id": n, "prompt": p, "chosen": "4", "rejected": "red", "subset": "alpacaeval-easy"}
        for n, p in enumerate(("why", "boom", "of"))
    ]
    second = [
        {"id": n, "prompt": p, "chosen": ["4"], "rejected": ["red"], "subset": "Focus"}
        for n, p in enumerate(("why", "boom"))
    ]
    for main, options, results in (
        (eval_rm.main, ["--data_dir", str(tmp_path), "--bias_type", "length"], "bias_summary.json"),
        (eval_reward_bench.main, ["--data_file", str(write_rows("bench.jsonl", bench))], "reward_bench_summary.json"),
        (
            eval_reward_bench.main,
            ["--data_file", str(write_rows("two.jsonl", second)), "--format", "reward_bench_2"],
            "reward_bench_2_summary.json",
        ),
    ):
        with pytest.raises(
            ContrastRMError, match=r"jsonl:2: the chat template refuses turns .*TypeError.*--max_bad_rows"
        ):
            main([*common, *options])
        assert main([*common, *options, "--max_bad_rows", "1"]) == 0
        assert "jsonl:2: the chat template refuses" in capsys.readouterr().out
        metadata = json.loads((tmp_path / "results" / tiny_llama_dir.name / results).read_text())["metadata"]
        assert len(metadata["refused_rows"]) == 1 and metadata["n_dropped_texts"] == 0


# --- answers that become one

# As templates of reasoning models do it.
NO_THINKING = CHATML.replace("m['content']", "(m['content'].split('</think>') | last)")


def test_answers_that_become_one_are_left_out_of_training_and_counted(
    tiny_base_dir: Path, write_rows: WriteRows, preference_rows: list[dict[str, Any]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "own.jinja").write_text(NO_THINKING)
    both = {"question": "q", "chosen": "<think>a</think>4", "rejected": ["<think>b</think>4"]}
    one = {
        "question": "r",
        "chosen": "<think>a</think>4",
        "rejected": ["4", "5", "6"],
        "bias_type": ["length", None, "beauty"],
    }
    data = write_rows("a.jsonl", [*preference_rows, both, one])
    out = trained(tiny_base_dir, data, tmp_path / "out", "--chat_template", str(tmp_path / "own.jinja"))
    report = json.loads((out / "train_summary.json").read_text())["data"]
    assert (report["n_equal_groups"], report["n_equal_texts"]) == (1, 2)
    assert report["n_records"] == 12 == report["n_groups"] + 1
    assert report["n_texts"] == sum(1 + len(row["rejected"]) for row in preference_rows) + 3
    assert "1 groups and 2 rejected answers that are the chosen one" in capsys.readouterr().out
    # The names of the answers that stay are theirs.
    biases = json.loads((out / "train_summary.json").read_text())["rejected_per_bias"]
    expected = [bias or "original" for row in preference_rows for bias in row["bias_type"]] + ["original", "beauty"]
    assert biases == {name: expected.count(name) for name in sorted(set(expected))}
    with pytest.raises(
        ContrastRMError, match="no training group is left of 1 records .*1 whose rejected answers are the chosen"
    ):
        trained(
            tiny_base_dir, write_rows("b.jsonl", [both]), tmp_path / "b", "--chat_template", str(tmp_path / "own.jinja")
        )


def test_a_cut_that_makes_answers_one_leaves_them_out(
    tiny_base_dir: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"question": "q", "chosen": "red " * 60 + "cat", "rejected": ["red " * 60 + "mat", "red"]}]
    rows.append({"question": "r", "chosen": "cat", "rejected": ["mat"]})
    limits = ["--max_length", "30", "--overlength", "keep_end"]
    out = trained(tiny_base_dir, write_rows("a.jsonl", rows), tmp_path / "out", *limits)
    report = json.loads((out / "train_summary.json").read_text())["data"]
    assert (report["n_groups"], report["n_equal_groups"], report["n_equal_texts"], report["n_texts"]) == (2, 0, 1, 4)


def test_held_out_answers_that_become_one_are_no_comparison(
    tiny_base_dir: Path, train_file: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(NO_THINKING)
    rows = [
        {"question": "of France", "chosen": "<think>a</think>4", "rejected": ["4"]},
        {"question": "of Paris", "chosen": "4", "rejected": ["5", "<think>b</think>4"], "bias_type": [None, "length"]},
    ]
    given = ["--chat_template", str(tmp_path / "own.jinja"), "--eval_file", str(write_rows("eval.jsonl", rows))]
    trained(tiny_base_dir, train_file, tmp_path / "out", *given, "--held_out_share", "auto")
    printed = capsys.readouterr().out
    assert "held out: 1 groups; 0 pairs" in printed and "(2 rejected answers are the chosen one" in printed


def test_answers_that_become_one_are_named_in_evaluations(
    tiny_llama_dir: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(NO_THINKING)
    common = ["--model_path", str(tiny_llama_dir), "--results_dir", str(tmp_path / "results"), "--device", "cpu"]
    common += ["--chat_template", str(tmp_path / "own.jinja")]
    same = ("<think>a</think>4", "4")
    write_rows(
        "length_bias.jsonl", [bias_row("why", "4", "red", "4 b", "red b"), bias_row("of", *same, "4 b", "red b")]
    )
    bench = [
        {"id": n, "prompt": "why", "chosen": chosen, "rejected": rejected, "subset": "alpacaeval-easy"}
        for n, (chosen, rejected) in enumerate([("4", "red"), same, ("4", "4")])
    ]
    two = [{"id": 1, "prompt": "why", "chosen": ["4"], "rejected": ["red", same[0]], "subset": "Focus"}]
    results = tmp_path / "results" / tiny_llama_dir.name
    for main, options, name, line in (
        (eval_rm.main, ["--data_dir", str(tmp_path), "--bias_type", "length"], "bias_summary.json", 2),
        (
            eval_reward_bench.main,
            ["--data_file", str(write_rows("bench.jsonl", bench))],
            "reward_bench_summary.json",
            2,
        ),
        (
            eval_reward_bench.main,
            ["--data_file", str(write_rows("two.jsonl", two)), "--format", "reward_bench_2"],
            "reward_bench_2_summary.json",
            1,
        ),
    ):
        assert main([*common, *options]) == 0
        assert "1 rows compare answers that are the same to the model" in capsys.readouterr().out
        [place] = json.loads((results / name).read_text())["metadata"]["equal_rows"]
        assert place.endswith(f"jsonl:{line}")
    # They are ties, and stay in the denominator.
    summary = json.loads((results / "bias_summary.json").read_text())["biases"]["length"]
    assert summary["original_pair_accuracy_total"] == 2
