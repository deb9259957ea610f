"""Words about the writing task: found in every kind, in gates and audit alike, and never in an answer that was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from codes.common.leaks import find_leak
from codes.common.records import BiasRecord
from codes.construct.gate_rates import HELD_OUT, SET_ON, innocent_rate, leak_figures
from codes.construct.gates import answer_defect
from codes.evaluate.data_checks import audit, lines_by_kind

FOLDER = os.environ.get("CONTRASTRM_EXTERNAL_DATA")
QUESTION = "Why is the sky blue?"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Here's the beautified version of the assistant's response:\n\n## Sky\n\n* Light", "preamble"),
        (
            "Okay, here's an extended and more elaborated version of the assistant's response, designed to be more verbose.",
            "preamble",
        ),
        ("Certainly! Here is the revised response, focusing on politeness:\n\nLight is scattered.", "preamble"),
        ("Okay, I'm ready. Here is the revised text, removing elements that create authority:\n\nLight.", "preamble"),
        ("Okay, I will rewrite the ASSISTANT's response according to the guidelines.\n\nLight.", "preamble"),
        ("Okay, here's a polished and more complete explanation of it:\n\nLight is scattered.", "preamble"),
        ("**Rewritten answer:** Light is scattered.", "preamble"),
        ("There is no #ASSISTANT# response to beautify.", "meta_talk"),
        ("I cannot provide a rewritten answer. The USER did not provide any text.", "meta_talk"),
        ("The user's question is about the colour of the sky.", "meta_talk"),
        ("Light is scattered.\n\nNote: I kept the errors of the original answer.", "meta_talk"),
        ("Light is scattered.\n\nThis is far more engaging than the original response.", "meta_talk"),
    ],
)
def test_every_kind_is_found_by_gate_and_audit(text: str, kind: str) -> None:
    found = find_leak(text, question=QUESTION)
    assert found is not None and found.kind == kind
    assert answer_defect(text, question=QUESTION) == kind
    record = BiasRecord(1, QUESTION, ("Light is scattered.", "Paint."), (text, "Blue paint."), 0)
    assert lines_by_kind(audit({"beauty": [record]})["beauty"]) == {f"suspected_{kind}": [1]}


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("Improve this email: pls send money", "Here is a revised version of your email:\n\nPlease send the money."),
        ("Correct this text: he go home", "Sure, here is the corrected and improved text: He goes home."),
        ("Please make this paragraph clearer: …", "I have rewritten the paragraph so that each sentence stands alone."),
        ("润色：Then Emperor Wu decided", "## Polished Answer:\n\nEmperor Wu then decided."),
        ("Rephrase: I am glad.", "Reworded version:\n\nI am happy."),
        ("How does OAuth work?", "The user is authenticated by a token that the server signs."),
        ("How does a login work?", "The user's request is sent to the server, which redirects it."),
        ("Give me the original text of the poem.", "Here is the original text of the poem:\n\nTiger, tiger"),
        ("Write a reply to my boss.", "Sure! Here is a response that you could send:\n\nDear Walt"),
        ("Name ten flowers.", "As requested, here are ten flowers: rose, lily"),
        ("Did the law change?", "Yes, in 2010.\n\nNote: the act was revised again in 2014."),
        (QUESTION, "Here's why: the air scatters blue light."),
        (QUESTION, "Sure, here's the answer to your question: light is scattered."),
    ],
)
def test_what_the_question_asks_for_is_no_leak(question: str, text: str) -> None:
    assert find_leak(text, question=question) is None
    assert answer_defect(text, question=question) is None


def test_what_the_source_had_already_is_no_leak_of_the_rewriting() -> None:
    text = "Here is the revised version of the plan:\n\nBuy bread."
    assert find_leak(text, question="A plan?") is not None
    assert find_leak(f"{text} And butter!", question="A plan?", source=text) is None


@pytest.mark.skipif(not FOLDER, reason="CONTRASTRM_EXTERNAL_DATA is not set: no public files to measure on")
def test_precision_and_recall_on_public_files() -> None:
    for half in (HELD_OUT, SET_ON):
        figures = leak_figures(Path(str(FOLDER)) / "judgebias_dev", half)
        assert figures.recall.total >= 30
        assert (figures.recall.rate or 0) >= 0.9, figures.missed
        assert (figures.precision.rate or 0) >= 0.95, figures.wrongly_found
    assert (innocent_rate(Path(str(FOLDER)) / "train_pool.jsonl").rate or 0) <= 0.002
