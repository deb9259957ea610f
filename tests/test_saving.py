"""The finished model is never lost: it is saved first, into the checked folder, and what fails afterwards is a warning.

Every cause is a real one: full disks, things that stand in a file's place, packages that are not installed, killed processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from codes.common.errors import ContrastRMError
from codes.train.reward_model import load_reward_model, save_reward_model
from codes.train.train_reward_model import main
from tests.conftest import REPO_ROOT

MODULE = "codes.train.train_reward_model"
QUICK = ["--precision", "fp32", "--epochs", "1", "--global_batch_size", "5", "--seed", "7", "--packing", "off"]
LOGS = ("train_log.jsonl", "train_args.json")


@pytest.fixture
def train_file(write_rows: Callable[..., Path], preference_rows: list[dict[str, Any]]) -> Path:
    return write_rows("train.jsonl", preference_rows)


@pytest.fixture
def flags(tiny_base_dir: Path, train_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a run of two steps."""

    def make(out: Path, *extra: str) -> list[str]:
        places = ["--train_file", str(train_file), "--output_dir", str(out), "--cache_dir", str(tmp_path / "cache")]
        return ["--model_path", str(tiny_base_dir), *places, *QUICK, *extra]

    return make


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Put a file system of its own on a folder."""
    mounted: list[Path] = []

    def put(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no small disk could be mounted: {done.stderr.strip()}")
        mounted.append(folder)

    yield put
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def score(folder: Path) -> float:
    """As a stranger does it: plain transformers, no code of ours."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "why is the cat red"}, {"role": "assistant", "content": "because it sat"}]
    batch = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        return float(model(input_ids=batch["input_ids"]).logits[0, 0])


def hidden(folder: Path) -> list[str]:
    """What a save has left behind."""
    return [path.name for path in folder.iterdir() if path.name.startswith((".model", "unsaved"))]


# --- where the model goes


def test_only_the_output_folder_needs_to_be_writable(
    flags: Callable[..., list[str]], tmp_path: Path, mount: Callable[..., None]
) -> None:
    """It may be a mount, or a link to one, in a folder that nobody can write."""
    parent, link = tmp_path / "parent", tmp_path / "link"
    mount(parent, "size=16m")
    mount(parent / "out", "size=16m")
    subprocess.run(["mount", "-o", "remount,ro", str(parent)], check=True)
    link.symlink_to(parent / "out")
    # The second time a finished model is replaced.
    for out, rate in ((parent / "out", "1e-3"), (link, "1e-2")):
        assert main(flags(out, "--learning_rate", rate)) == 0
        score(parent / "out")
    assert not hidden(parent / "out")


def test_a_full_disk_is_told_of_before_the_training(
    flags: Callable[..., list[str]], tmp_path: Path, mount: Callable[..., None]
) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=100k")
    with pytest.raises(ContrastRMError, match=r"the finished model takes 0.\d MB, and .* has 0.\d MB free"):
        main(flags(disk / "out"))
    with pytest.raises(OSError, match="No space left"):
        (disk / "filling").write_bytes(bytes(2**20))
    with pytest.raises(ContrastRMError, match="cannot write in .*No space left on device"):
        main(flags(disk / "out"))


# --- what comes after the save


@pytest.mark.parametrize(
    ("in_the_way", "extra", "words"),
    [
        ("README.md", (), "the model card"),
        ("training_curves.svg", (), "the learning curves"),
        ("training_curves.png", (), "the learning curves"),
        ("train_summary.json", (), "train_summary.json"),
        ("eval_log.jsonl", ("--held_out_share", "0.3", "--eval_steps", "0"), "eval_log.jsonl"),
    ],
)
def test_what_cannot_be_written_afterwards_is_a_warning(
    in_the_way: str,
    extra: tuple[str, ...],
    words: str,
    flags: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    (out / in_the_way).mkdir(parents=True)
    assert main(flags(out, *extra)) == 0
    assert f"warning: {words} failed: " in capsys.readouterr().err
    score(out)
    others = {"README.md", "training_curves.svg", "train_summary.json"} - {in_the_way}
    assert all((out / name).is_file() for name in others if words != "the learning curves" or "curves" not in name)


def test_a_disk_that_is_full_after_the_weights(
    flags: Callable[..., list[str]], tmp_path: Path, mount: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path / "plain", "--report_to", "none")) == 0
    first = (*(tmp_path / "plain").glob("*token*"), *(tmp_path / "plain").glob("*.jinja"))
    files = (*first, *(tmp_path / "plain" / name for name in ("config.json", "model.safetensors", *LOGS)))
    pages = sum(-(-path.stat().st_size // 4096) for path in files)
    # Room for the lock and for one temporary file; not for curves.
    mount(tmp_path / "disk", f"size={4 * (pages + 6)}k")
    assert main(flags(tmp_path / "disk", "--report_to", "none")) == 0
    assert "warning: the learning curves failed: " in capsys.readouterr().err
    assert score(tmp_path / "disk") == score(tmp_path / "plain")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_tracker_that_fails_ends_no_run(
    flags: Callable[..., list[str]], tmp_path: Path, mount: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    mount(out / "tensorboard", "size=4k")
    assert main(flags(out, "--global_batch_size", "1", "--epochs", "4", "--report_to", "tensorboard")) == 0
    assert "warning: --report_to tensorboard failed: " in capsys.readouterr().err
    score(out)
    assert (out / "train_summary.json").is_file()


BROKEN_CODE = """
from transformers import LlamaForSequenceClassification, LlamaModel

class BrokenModel(LlamaModel):
    def forward(self, *args, **kwargs):
        if not self.training:
            raise RuntimeError("no evaluation without training")
        return super().forward(*args, **kwargs)

class Broken(LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.model = BrokenModel(config)
        self.post_init()
"""


@pytest.mark.parametrize(
    ("extra", "words"),
    [((), "reward_mean and reward_std"), (("--held_out_share", "0.3", "--eval_steps", "0"), "the last evaluation")],
)
def test_a_model_that_fails_when_it_is_evaluated(
    extra: tuple[str, ...],
    words: str,
    tiny_base_dir: Path,
    flags: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base_dir, base)
    (base / "broken_code.py").write_text(BROKEN_CODE)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "broken_code.Broken"}
    (base / "config.json").write_text(json.dumps(config))
    own = ("--model_path", str(base), "--trust_remote_code", "1", "--max_tokens_per_batch", "512")
    assert main(flags(out, *own, *extra)) == 0
    assert f"warning: {words} failed: RuntimeError: no evaluation without training" in capsys.readouterr().err
    LlamaForSequenceClassification.from_pretrained(out)
    assert (out / "README.md").is_file() and (out / "train_summary.json").is_file()


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages without DeepSpeed, and torch with the metadata of a wheel that does not name its build."""
    folder = tmp_path_factory.mktemp("packages")
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.lower().startswith("deepspeed"):
            (folder / package.name).symlink_to(package)
    [metadata] = folder.glob("torch-*.dist-info")
    text = (metadata / "METADATA").read_text()
    metadata.unlink()
    plain = torch.__version__.partition("+")[0]
    (folder / f"torch-{plain}.dist-info").mkdir()
    changed = re.sub(r"^Version: .*$", f"Version: {plain}", text, count=1, flags=re.M)
    (folder / f"torch-{plain}.dist-info" / "METADATA").write_text(changed)
    return folder


def test_one_process_needs_no_deepspeed_and_no_notebook(
    flags: Callable[..., list[str]], bare_packages: Path, tmp_path: Path
) -> None:
    """Nothing of a notebook's environment, and no package that only several processes need, costs a model or its papers."""
    out = tmp_path / "out"
    environment = os.environ | {
        "PYTHONPATH": f"{REPO_ROOT}:{bare_packages}", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }  # fmt: skip
    command = [sys.executable, "-S", "-m", MODULE, *flags(out)]
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]
    score(out)
    assert (out / "training_curves.svg").is_file()
    versions = json.loads((out / "train_summary.json").read_text())["metadata"]["versions"]
    # The build, which metadata may leave out.
    assert versions["torch"] == torch.__version__ and "deepspeed" not in versions
    assert f"| torch | {torch.__version__} |" in (out / "README.md").read_text()


# --- a folder that holds the finished model of another run

BEST = ("--held_out_share", "0.3", "--eval_steps", "1", "--metric_for_best", "loss", "--learning_rate", "5e-2")


def contents(folder: Path) -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "README.md", "adapter/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def test_a_run_that_diverges_or_is_killed_damages_no_finished_model(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(flags(out, *BEST, "--lora_rank", "2", "--global_batch_size", "2")) == 0
    before, log = contents(out), (out / "train_log.jsonl").read_text()
    assert len(before) == 5
    best = [contents(path) for path in out.glob("best-*")]
    assert best, "the test needs a run whose last evaluation is not its best"
    with pytest.raises(ContrastRMError, match="stopped, nothing was saved"):
        main(flags(out, "--learning_rate", "1e30", "--max_grad_norm", "1e30", "--held_out_share", "0.3"))
    assert contents(out) == before
    long = flags(out, "--epochs", "400", "--save_steps", "3", "--held_out_share", "0")
    killed = [sys.executable, "-m", MODULE, *long]
    with subprocess.Popen(killed, cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}) as child:
        while child.poll() is None and not (out / "checkpoint-6").exists():
            time.sleep(0.01)
        child.kill()
    assert contents(out) == before
    # What the finished run said of itself, and its best weights, wait aside.
    earlier = out / "earlier_run"
    assert (earlier / "train_log.jsonl").read_text() == log and (earlier / "train_summary.json").is_file()
    assert [contents(path) for path in earlier.glob("best-*")] == best
    # It goes on where it was killed, and only its own model replaces the other.
    short = flags(out, "--epochs", "4", "--held_out_share", "0")
    with pytest.raises(ContrastRMError, match="belongs to another run .*total_steps"):
        main([*short, "--resume", "auto"])
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert main([*short, "--resume", "auto"]) == 0
    assert contents(out)["model.safetensors"] != before["model.safetensors"] and not (out / "adapter").exists()
    assert not earlier.exists() and not list(out.glob("best-*"))


def test_files_are_readable_as_the_umask_says(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = os.umask(0o027)
    try:
        extra = (*BEST, "--lora_rank", "2", "--global_batch_size", "2", "--save_steps", "2")
        assert main(flags(out, *extra)) == 0
    finally:
        os.umask(before)
    for path in out.rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        if path.name != ".training.lock":
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
    for kind in ("adapter", "best-*", "checkpoint-*"):
        assert list(out.glob(f"{kind}/*.safetensors")), kind


# --- when the save itself fails


def test_weights_of_a_save_that_fails_are_kept_and_named(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(ContrastRMError, match=r"cannot save the model in .*its weights are whole in .*unsaved_model"):
        main(flags(out))
    [kept] = out.glob("unsaved_model-*")
    score(kept)
    assert not (out / "config.json").exists() and not list(out.glob(".model*"))


def test_a_disk_that_fills_during_the_save(tiny_base_dir: Path, tmp_path: Path, mount: Callable[..., None]) -> None:
    """Wherever it happens: half of the weights do not stay, whole ones do."""
    model, tokenizer = load_reward_model(str(tiny_base_dir), require_head=False)
    files = {path.name: path for path in save_reward_model(model, tokenizer, tmp_path / "plain").iterdir()}
    pages = sum(-(-path.stat().st_size // 4096) for path in files.values())
    weights = -(-files["model.safetensors"].stat().st_size // 4096)
    for size in (weights // 2, weights, *range(weights + 1, pages)):
        disk = tmp_path / str(size)
        mount(disk, f"size={4 * size}k")
        with pytest.raises(ContrastRMError, match="cannot save the model in .*No space left") as caught:
            save_reward_model(model, tokenizer, disk / "model")
        left = [path.parent.name for path in disk.rglob("*.safetensors")]
        assert left == ([] if size <= weights else [path.name for path in disk.glob("model/unsaved_model-*")])
        assert ("its weights are whole in" in str(caught.value)) == bool(left)
        assert not (disk / "model" / "config.json").exists()


# A process for every n that ends at the n-th renaming of its second save, as a kill would end it.
KILLED = """
import os, sys
import torch
from codes.train.reward_model import load_reward_model, save_reward_model
base, out = sys.argv[1:]
model, tokenizer = load_reward_model(base, require_head=False)
seen, n, first = 0, 0, os.getpid()
def watch(event, arguments):
    global seen
    if event == "os.rename" and os.getpid() != first:
        seen += 1
        if seen == n:
            os._exit(9)
sys.addaudithook(watch)
code = 9
save_reward_model(model, tokenizer, f"{out}/0")
with torch.no_grad():
    model.classifier.score.weight.mul_(-2)
while code == 9:
    n += 1
    os.system(f"cp -r {out}/0 {out}/{n}")
    if (child := os.fork()) == 0:
        save_reward_model(model, tokenizer, f"{out}/{n}")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(n, code)
"""


def test_a_killed_save_never_looks_whole(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Killed at any of its moves, a folder that has a config is the whole model: the earlier one, or the new one."""
    command = [sys.executable, "-c", KILLED, str(tiny_base_dir), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    n, code = map(int, done.stdout.split()[-2:])
    assert code == 0 and n > 6, done.stderr
    folders = [tmp_path / str(number) for number in range(n + 1)]
    scores = [round(score(folder), 5) if (folder / "config.json").exists() else None for folder in folders]
    # Before the first move, in the middle, and after the last one.
    assert scores[1] == scores[0] != scores[-1] and scores[-1] is not None
    assert set(scores[2:-1]) == {None}
