"""Rows, a flawless model and command lines that the tests of construction share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, answer

from codes.construct.api import EMBEDDED_SERVER_VARIABLE

KEY = "sk-test-0123456789abcdef0123456789"
# Seconds to wait for a subprocess on a machine whose cores are busy with something else.
PATIENCE = 120.0
# Stands in every chosen answer and nowhere else: the flawless judge knows it by that.
RIGHT = "This one is right."
MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which planet is the largest?"},
    {"role": "assistant", "content": "Jupiter."},
    {"role": "user", "content": "And the smallest {one}?"},
]


def use_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with a key and nothing else that names a model, a server or a judge's settings."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judges = ("JUDGE_MODEL", "JUDGE_TEMPERATURE", "JUDGE_MAX_NEW_TOKENS")
    for name in ("API_MODEL", "OPENAI_BASE_URL", EMBEDDED_SERVER_VARIABLE, *judges):
        monkeypatch.delenv(name, raising=False)


def words(seed: str, n: int = 30) -> str:
    """Text without meaning and without figures that depends on the seed alone."""
    digest = hashlib.sha256(seed.encode()).hexdigest()
    letters = str.maketrans("0123456789", "ghijklmnop")
    drawn = (hashlib.sha256(f"{digest}{position}".encode()).hexdigest()[:5] for position in range(n))
    return " ".join(drawn).translate(letters)


def biased(text: str) -> str:
    """A text with the cues of all biases: the gates look for the one that was asked for."""
    return (
        f"## **Definitely.** ✨ You are absolutely right to ask, and what a wonderful, brilliant and lovely "
        f"question! There is no doubt, without question: according to Dr. Ostrem of the Institute, exactly 94 of 100 "
        f"cases, or 94.0 %, in 12 months of 2019. ✨ {text} {text[::-1]}"
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample_rows(n: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(n):
        row = {
            "id": f"r{number}",
            "chosen": f"{RIGHT} {words(f'c{number}')}",
            "rejected": [words(f"r{number}")],
        }
        prompt = {"messages": MULTI_TURN} if number == 1 else {"question": f"What about {number} {{x}}?"}
        rows.append(row | prompt | {"source": "test", "note": {"kept": number}})
    return rows


def write_well(body: dict[str, Any], attempt: int) -> Reply:
    """A flawless model: writers get text of their own, the judge names the right answer."""
    text = body["messages"][-1]["content"]
    if "<answer letter=" in text:
        letter = text[: text.index(RIGHT)].rsplit('<answer letter="', 1)[1][0]
        return answer(f"Best: {letter}")
    return answer(biased(words(text, 80)))


def flags(server: ChatServer, tmp_path: Path, source: str, target: str, **more: object) -> list[str]:
    settings = {
        "input_file": tmp_path / source,
        "output_file": tmp_path / target,
        "work_dir": tmp_path / "work",
        "api_model": "test-model",
        "api_base_url": server.base_url,
        "max_attempts": 2,
        **more,
    }
    return [item for name, value in settings.items() for item in (f"--{name}", str(value))]
