"""Settings: flags, help and checks derive from one dataclass. Run: ``python -m pytest tests/test_settings.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from codes.common.cli import positive_float
from codes.common.settings import add_settings, flag_values, part, setting, settings_from


def pair_numbers(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (pair.split("=") for pair in text.split(",") if pair)}


@dataclass(frozen=True)
class LossSettings:
    temperature: float = setting(0.5, check=positive_float, help="of the contrastive loss")
    weights: Mapping[str, float] = setting({}, check=pair_numbers, help="length=2")


@dataclass(frozen=True)
class TrainSettings:
    train_file: str = setting(help="preference records")
    output_dir: str = setting("output/model", help="5 % of the disk")
    mode: str = setting("contrastive", choices=("contrastive", "pairwise"), help="the loss")
    steps: int = setting(3, help="optimizer steps")
    merge: bool = setting(True, help="save the merged weights")
    loss: LossSettings = part(LossSettings)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_settings(parser, TrainSettings)
    return parser


def parsed(*flags: str) -> TrainSettings:
    return settings_from(build_parser().parse_args(["--train_file", "a.jsonl", *flags]), TrainSettings)


def test_without_flags_every_setting_has_its_default() -> None:
    assert parsed() == TrainSettings("a.jsonl")


def test_flags_become_values_of_their_types_in_their_part() -> None:
    settings = parsed("--steps", "7", "--merge", "0", "--temperature", "2", "--weights", "length=2,original=0.5")
    assert settings == TrainSettings(
        "a.jsonl", steps=7, merge=False, loss=LossSettings(2.0, {"length": 2.0, "original": 0.5})
    )
    assert isinstance(settings.loss.temperature, float)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mode", "other"), "invalid choice: 'other'"),
        (("--merge", "yes"), "'yes' is neither 0 nor 1"),
        (("--temperature", "0"), "0.0 is not a positive number"),
        (("--steps", "many"), "invalid int value: 'many'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag(
    flags: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parsed(*flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert flags[0] in error and said in error


def test_a_setting_without_a_default_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([])
    assert "--train_file" in capsys.readouterr().err


def test_help_names_flags_groups_choices_and_defaults() -> None:
    text = " ".join(build_parser().format_help().split())
    for said in (
        "--output_dir OUTPUT_DIR 5 % of the disk (default: output/model)",
        "--mode {contrastive,pairwise} the loss (default: contrastive)",
        "--merge {0,1} save the merged weights (default: 1)",
        "loss: --temperature TEMPERATURE of the contrastive loss (default: 0.5)",
        "--weights WEIGHTS length=2",
    ):
        assert said in text
    assert "length=2 (default" not in text


def test_flag_values_name_every_flag_once_and_give_the_same_settings_back() -> None:
    settings = parsed("--mode", "pairwise", "--weights", "length=3")
    values = flag_values(settings)
    assert values == {
        "train_file": "a.jsonl",
        "output_dir": "output/model",
        "mode": "pairwise",
        "steps": 3,
        "merge": True,
        "temperature": 0.5,
        "weights": {"length": 3.0},
    }
    assert settings_from(argparse.Namespace(**values, other="not a setting"), TrainSettings) == settings


def test_instances_do_not_share_a_changeable_default() -> None:
    assert LossSettings().weights is not LossSettings().weights


def test_a_type_that_argparse_cannot_read_needs_a_check() -> None:
    @dataclass
    class Wrong:
        when: complex = setting(1j, help="a number of two parts")

    with pytest.raises(TypeError, match=r"Wrong\.when .* needs a check"):
        add_settings(argparse.ArgumentParser(), Wrong)


def test_paths_literals_and_functions_need_no_more_than_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Step:
        folder: Path = setting(Path("a"), help="a folder")
        judge: Literal["model", "none"] = setting("model", help="who judges")
        model: str = setting(lambda: os.environ["STEP_MODEL"], help="default: $STEP_MODEL")

    monkeypatch.setenv("STEP_MODEL", "small")
    parser = argparse.ArgumentParser()
    add_settings(parser, Step)
    assert settings_from(parser.parse_args(["--judge", "none"]), Step) == Step(Path("a"), "none", "small")
    with pytest.raises(SystemExit):
        parser.parse_args(["--judge", "nobody"])
