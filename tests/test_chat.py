"""Token ids equal the tokenizer's own, no BOS is doubled, what is too long meets its policy and is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from codes.common.chat import ENCODE_CHUNK, ChatFormatter, Conversation, EncodedText, last_token_ids
from codes.common.errors import ContrastRMError
from tests.conftest import WORDS, chatml_tokenizer, llama_tokenizer, qwen_tokenizer

CHAT_TOKENIZERS = [chatml_tokenizer, qwen_tokenizer, llama_tokenizer]
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)

SINGLE = [{"role": "user", "content": "why is the cat on the mat"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SINGLE]
MULTI = [
    *SYSTEM,
    {"role": "assistant", "content": "it sat"},
    {"role": "user", "content": "and why 2 + 2 = 4?"},
]
ANSWER = "because it sat on a mat " * 8
POLICIES = ["left", "keep_end"]


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's shape: WordPiece, [CLS] a [SEP] b [SEP] with segment ids, no chat template."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Written down, not trained: the trainer breaks ties by chance, and another vocabulary is another model in every run.
    words = sorted(set(WORDS.lower().split()))
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    # Published encoders carry a truncation limit and padding in tokenizer.json: they must not act.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return BertTokenizerFast(tokenizer_object=tokenizer)


def encode_one(formatter: ChatFormatter, messages: list[dict[str, str]], answer: str) -> EncodedText:
    (encoded,) = formatter.encode([Conversation(messages, answer)])
    return encoded


def full_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], answer: str) -> list[int]:
    return list(encode_one(ChatFormatter(tokenizer), messages, answer).input_ids)


# --- ids


@pytest.mark.parametrize("make", CHAT_TOKENIZERS)
@pytest.mark.parametrize("messages", [SINGLE, SYSTEM, MULTI], ids=["single", "system", "multi"])
@pytest.mark.parametrize("answer", ["because", " two  spaces \n", "", "é 🙂 中", "<|im_end|> inside"])
def test_ids_equal_the_templates_own(
    make: Callable[[], PreTrainedTokenizerFast], messages: list[dict[str, str]], answer: str
) -> None:
    tokenizer = make()
    turns = [*messages, {"role": "assistant", "content": answer}]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert full_ids(tokenizer, messages, answer) == expected
    assert ChatFormatter(tokenizer).render(Conversation(messages, answer)) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )


def test_exactly_one_leading_bos() -> None:
    tokenizer = llama_tokenizer()
    rendered = ChatFormatter(tokenizer).render(Conversation(MULTI, "yes"))
    doubled = tokenizer(rendered)["input_ids"]
    assert doubled[:2] == [tokenizer.bos_token_id] * 2  # the trap is real for this tokenizer
    ids = full_ids(tokenizer, MULTI, "yes")
    assert ids == doubled[1:] and ids.count(tokenizer.bos_token_id) == 1


def test_order_is_kept_over_chunks() -> None:
    formatter = ChatFormatter(qwen_tokenizer())
    answers = [str(number) for number in range(ENCODE_CHUNK + 3)]
    encoded = formatter.encode([Conversation(SINGLE, answer) for answer in answers])
    assert [encode_one(formatter, SINGLE, answers[at]) for at in (0, 1023, 1024, 1026)] == [
        encoded[at] for at in (0, 1023, 1024, 1026)
    ]
    assert formatter.encode([]) == []


def test_closing_tokens_are_what_the_template_writes_after_the_answer() -> None:
    chatml, qwen, llama = chatml_tokenizer(), qwen_tokenizer(), llama_tokenizer()
    for tokenizer in (chatml, qwen):
        newline = tokenizer("\n")["input_ids"]
        assert ChatFormatter(tokenizer).closing_ids == (tokenizer.eos_token_id, *newline)
        assert last_token_ids(tokenizer) == set(newline)
    assert ChatFormatter(llama).closing_ids == (llama.eos_token_id,)
    assert last_token_ids(llama) == {llama.eos_token_id}
    encoder = encoder_tokenizer()
    assert ChatFormatter(encoder).closing_ids == () and last_token_ids(encoder) == {encoder.sep_token_id}
    plain = chatml_tokenizer()
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert last_token_ids(plain) == set()  # nothing closes a turn: any token can stand last


def test_template_hash_follows_the_template() -> None:
    assert ChatFormatter(chatml_tokenizer()).template_hash == ChatFormatter(qwen_tokenizer()).template_hash
    hashes = {ChatFormatter(make()).template_hash for make in (chatml_tokenizer, llama_tokenizer, encoder_tokenizer)}
    assert len(hashes) == 3


# --- over-length chats


@pytest.mark.parametrize("make", CHAT_TOKENIZERS)
@pytest.mark.parametrize("policy", ["drop", "left", "keep_end", "error"])
def test_what_fits_is_untouched(make: Callable[[], PreTrainedTokenizerFast], policy: str) -> None:
    tokenizer = make()
    ids = full_ids(tokenizer, SINGLE, ANSWER)
    formatter = ChatFormatter(tokenizer, max_length=len(ids), overlength=policy)
    assert encode_one(formatter, SINGLE, ANSWER) == EncodedText(tuple(ids))
    assert encode_one(formatter, SINGLE, ANSWER).n_cut == 0


@pytest.mark.parametrize("make", CHAT_TOKENIZERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_cut_chats_have_the_limit_bos_and_closing_tokens(
    make: Callable[[], PreTrainedTokenizerFast], policy: str
) -> None:
    tokenizer = make()
    ids = full_ids(tokenizer, SINGLE, ANSWER)
    smallest = len(ChatFormatter(tokenizer).closing_ids) + 2
    other = full_ids(tokenizer, SINGLE, "~")
    n_prompt = next(place for place, (mine, its) in enumerate(zip(ids, other, strict=False)) if mine != its)
    for limit in range(smallest, len(ids)):
        formatter = ChatFormatter(tokenizer, max_length=limit, overlength=policy)
        encoded = encode_one(formatter, SINGLE, ANSWER)
        if policy == "keep_end" and limit - len(formatter.closing_ids) <= n_prompt:
            assert encoded.dropped and encoded.n_cut == len(ids)  # the prompt alone fills the limit
            continue
        assert len(encoded.input_ids) == limit and encoded.n_cut == len(ids) - limit and not encoded.dropped
        assert encoded.input_ids[-len(formatter.closing_ids) :] == formatter.closing_ids
        if tokenizer.bos_token_id is not None:
            assert encoded.input_ids[0] == ids[0] == tokenizer.bos_token_id
            assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
        # left keeps the end, keep_end keeps the start.
        kept = list(encoded.input_ids)
        n_bos = int(tokenizer.bos_token_id is not None)
        n_closing = len(formatter.closing_ids)
        assert (
            kept[n_bos:] == ids[-(limit - n_bos) :]
            if policy == "left"
            else kept[:-n_closing] == ids[: limit - n_closing]
        )


@pytest.mark.parametrize("make", CHAT_TOKENIZERS)
def test_a_cut_answer_is_noticed_under_both_policies(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    ids = full_ids(tokenizer, SINGLE, ANSWER)
    prompt = tokenizer.apply_chat_template(SINGLE, tokenize=True, return_dict=False, add_generation_prompt=True)

    def cut(policy: str, limit: int) -> bool:
        return encode_one(ChatFormatter(tokenizer, max_length=limit, overlength=policy), SINGLE, ANSWER).answer_cut

    assert cut("keep_end", len(ids) - 1)
    assert not cut("left", len(ids) - 3)
    assert cut("left", len(ids) - len(prompt) - 10)


@pytest.mark.parametrize("make", CHAT_TOKENIZERS)
def test_an_answer_is_cut_with_its_first_token_and_not_before(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    ids = full_ids(tokenizer, SINGLE, ANSWER)
    prompt = tokenizer.apply_chat_template(SINGLE, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*SINGLE, {"role": "assistant", "content": ANSWER}], tokenize=False)
    opening = whole[len(tokenizer.apply_chat_template(SINGLE, tokenize=False)) :].partition("because")[0]
    n_prompt = len(prompt) + len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    n_bos = int(tokenizer.bos_token_id is not None)
    for n_lost, is_cut in ((n_prompt, False), (n_prompt + 1, True)):
        limit = len(ids) - n_lost + n_bos  # the leading BOS stays
        encoded = encode_one(ChatFormatter(tokenizer, max_length=limit, overlength="left"), SINGLE, ANSWER)
        assert list(encoded.input_ids[n_bos:]) == ids[n_lost:] and encoded.answer_cut is is_cut


def test_drop_empties_and_error_stops() -> None:
    tokenizer = qwen_tokenizer()
    short, long = Conversation(SINGLE, "because"), Conversation(SINGLE, ANSWER)
    limit = len(full_ids(tokenizer, SINGLE, "because"))
    length = len(full_ids(tokenizer, SINGLE, ANSWER))
    kept, dropped = ChatFormatter(tokenizer, max_length=limit, overlength="drop").encode([short, long])
    assert len(kept.input_ids) == limit and not kept.dropped
    assert dropped.dropped and dropped.input_ids == () and dropped.n_cut == length
    with pytest.raises(
        ContrastRMError,
        match=rf"of {length} tokens is longer than max_length {limit}; .*--overlength drop\|left\|keep_end$",
    ):
        ChatFormatter(tokenizer, max_length=limit).encode([short, long])


# --- text pairs


def test_pairs_equal_the_tokenizers_own() -> None:
    tokenizer = encoder_tokenizer()
    encoded = encode_one(ChatFormatter(tokenizer), SINGLE, ANSWER)
    expected = tokenizer(SINGLE[0]["content"], ANSWER, truncation=False, padding=False)
    assert list(encoded.input_ids) == expected["input_ids"] and len(encoded.input_ids) > 8
    assert list(encoded.token_type_ids or ()) == expected["token_type_ids"]
    assert set(expected["token_type_ids"]) == {0, 1}
    # Turns become one text.
    many = encode_one(ChatFormatter(tokenizer), MULTI, "yes")
    text = "System: Be brief.\nUser: why is the cat on the mat\nAssistant: it sat\nUser: and why 2 + 2 = 4?"
    assert list(many.input_ids) == tokenizer(text, "yes", padding=False)["input_ids"]


@pytest.mark.parametrize("policy", POLICIES)
def test_cut_pairs_keep_their_frame(policy: str) -> None:
    tokenizer = encoder_tokenizer()
    whole = encode_one(ChatFormatter(tokenizer), SINGLE, ANSWER)
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    first_sep = whole.input_ids.index(sep_id)
    prompt, answer = whole.input_ids[1:first_sep], whole.input_ids[first_sep + 1 : -1]
    for limit in range(4, len(whole.input_ids)):
        encoded = encode_one(ChatFormatter(tokenizer, max_length=limit, overlength=policy), SINGLE, ANSWER)
        n_cut = len(whole.input_ids) - limit
        if policy == "left":
            expected = [cls_id, *prompt[n_cut:], sep_id, *answer[max(0, n_cut - len(prompt)) :], sep_id]
        else:
            rest = prompt[: len(prompt) - max(0, n_cut - len(answer))]
            expected = [cls_id, *rest, sep_id, *answer[: max(0, len(answer) - n_cut)], sep_id]
        assert list(encoded.input_ids) == expected and len(expected) == limit
        assert len(encoded.token_type_ids or ()) == limit and encoded.n_cut == n_cut
        assert encoded.answer_cut == (policy == "keep_end" or n_cut > len(prompt))


def test_pairs_drop_and_error() -> None:
    tokenizer = encoder_tokenizer()
    assert encode_one(ChatFormatter(tokenizer, max_length=9, overlength="drop"), SINGLE, ANSWER).dropped
    with pytest.raises(ContrastRMError, match="longer than max_length 9"):
        encode_one(ChatFormatter(tokenizer, max_length=9, overlength="error"), SINGLE, ANSWER)


def test_pairs_of_a_tokenizer_without_segments_have_none() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    encoded = encode_one(ChatFormatter(tokenizer), SINGLE, "because")
    assert encoded.token_type_ids is None
    assert list(encoded.input_ids) == tokenizer(SINGLE[0]["content"], "because")["input_ids"]


# --- refusals


def test_a_template_that_refuses_a_system_turn_is_named() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    formatter = ChatFormatter(tokenizer)
    assert formatter.encode([Conversation(SINGLE, "yes")])
    with pytest.raises(
        ContrastRMError,
        match=r"refuses turns \['system', 'user', 'assistant'\]: System role not supp.*; drop",
    ):
        formatter.encode([Conversation(SYSTEM, "yes")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlength": "right"}, r"unknown over-length policy 'right'; known: drop, left, keep_end, error"),
        (
            {"max_length": 3, "overlength": "left"},
            "max_length 3 leaves no room for a single token of an answer",
        ),
        ({"max_length": 0, "overlength": "drop"}, "leaves no room"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ContrastRMError, match=words):
        ChatFormatter(chatml_tokenizer(), **options)


def test_a_pair_limit_without_room_for_a_token_is_refused() -> None:
    for policy in POLICIES:
        formatter = ChatFormatter(encoder_tokenizer(), max_length=3, overlength=policy)
        with pytest.raises(ContrastRMError, match="max_length 3 leaves no room"):
            encode_one(formatter, SINGLE, ANSWER)


def test_render_is_what_a_person_can_read() -> None:
    rendered = ChatFormatter(chatml_tokenizer()).render(Conversation(SINGLE, "yes"))
    assert rendered == "<|im_start|>user\nwhy is the cat on the mat<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def test_texts_are_equal_when_the_model_sees_the_same() -> None:
    # Cut to the same ids from different answers: one text, so one score and a tie, not rounding noise.
    formatter = ChatFormatter(qwen_tokenizer(), max_length=8, overlength="keep_end")
    first, second = formatter.encode([Conversation(SINGLE, "because"), Conversation(SINGLE, ANSWER)])
    assert first.n_cut < second.n_cut and first.answer_cut
    assert first == second and len({first, second}) == 1
