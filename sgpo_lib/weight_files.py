"""Weights and code that come from somewhere else: what is read of them, and what is refused by name.

Weights are read from safetensors only. A pickle (`pytorch_model.bin`, `adapter_model.bin`, any `.pt`) can run a program
when it is opened, so it is not opened, also not under the name of a safetensors file. Python code that comes with
weights (`auto_map`) runs only with model.trust_remote_code=true; it is then said, and `remote_code` tells what ran.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")
"""Endings of weights in forms that are not read."""
_SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
_METADATA = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
             ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
             ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
"""What the index of a distributed checkpoint is made of, besides torch's data types and its own classes."""


def require_safetensors(folder: Path, stem: str = "model") -> None:
    """Look at the weights of a folder: `model`, or `adapter_model`.

    Raises ValueError, with the file and the cure, where they are in another form, absent or damaged.
    """
    file, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    files = [file]
    if not file.exists() and index.exists():
        names = _json(index).get("weight_map", {})
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index}: got no weight_map, expected the index that transformers writes")
        files = [folder / str(name) for name in sorted(set(map(str, names.values())))]
        if odd := [f for f in files if f.suffix != ".safetensors" or f.parent != folder]:
            raise _refused(odd[0], f"named by {index.name}")
    elif not file.exists():
        if there := sorted(p for p in folder.iterdir() if p.suffix in PICKLES and "model" in p.name):
            raise _refused(there[0])
        raise ValueError(f"{file}: there is no such file, expected weights in the form of safetensors")
    named = str(_json(folder / "config.json").get("transformers_weights") or file.name)
    if not named.endswith((".safetensors", ".safetensors.index.json")):
        raise _refused(folder / named, "named by config.json")
    for path in files:
        require_header(path)


def require_header(path: Path) -> None:
    """Raises ValueError where a file is no safetensors file: damaged, or a pickle under its name."""
    try:
        with safe_open(path, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        with path.open("rb") if path.is_file() else Path("/dev/null").open("rb") as file:
            start = file.read(4)
        if start[:1] == b"\x80" or start == b"PK\x03\x04":
            raise _refused(path, "a pickle under the name of a safetensors file") from None
        raise ValueError(f"{path}: no whole safetensors file ({error}). Get the file again") from None


def _refused(path: Path, why: str = "") -> ValueError:
    return ValueError(f"{path}: refused{f' ({why})' if why else ''}: weights in this form can run a program when they "
                      "are opened, and only safetensors are read. Take a version of the model with safetensors, or "
                      "convert it where nothing can be harmed, from a source that you trust: "
                      "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')")


def _json(path: Path) -> dict[str, Any]:
    """An object from a foreign file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------- code with weights
class RefusedCode(ValueError):
    """Weights or a tokenizer that need code which comes with them."""


def require_own_tokenizer(source: str, folder: Path | None, revision: str) -> None:
    """Raises RefusedCode for a tokenizer of a class that comes with it.

    transformers would take another class in its place, without a word, where it knows the model's type.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    told = get_tokenizer_config(source, revision=revision or None)
    if told.get("auto_map") and not hasattr(transformers, str(told.get("tokenizer_class"))):
        raise refused_code(source, folder)


def refused_code(source: str, folder: Path | None) -> RefusedCode:
    """The error for weights that need Python code of their own, which was not asked for."""
    named = [f"{folder / name if folder else name}: auto_map names {', '.join(sorted(_classes(found)))}"
             for name in _SETTINGS if folder and (found := _json(folder / name).get("auto_map"))]
    told = "; ".join(named) or f"{source}: config.json or tokenizer_config.json names code in auto_map"
    return RefusedCode(f"{told}: refused, since it is Python code that comes with the weights. Nothing of it ran. Take "
                       "a model that transformers itself knows, or read the code and set model.trust_remote_code=true "
                       "(with model.revision, so that it stays what you read)")


def _classes(auto_map: Any) -> set[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return {str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name}


@functools.cache
def announce_code(source: str) -> None:
    """Say once that code which comes with weights may run in this process."""
    print(f"model.trust_remote_code=true: Python code that comes with {source} may run here, with all that you may do",
          file=sys.stderr, flush=True)


def remote_code() -> dict[str, str]:
    """Files of code that came with weights and ran in this process -> SHA-256."""
    files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items())
             if name.startswith("transformers_modules")}
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(filter(None, files))
            if Path(path).is_file()}


# ----------------------------------------------------------------------------------------- distributed checkpoints
class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, which torch pickles, and calls nothing but its own classes."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(checkpoint_metadata, name, None) if module == checkpoint_metadata.__name__ else None
        own = isinstance(found, type) and found.__module__ == module  # no dotted way through what it imports
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if own or dtype or (module, name) in _METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(FileSystemReader):
    """torch's reader of distributed checkpoints, whose index cannot run anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index `.metadata`."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _MetadataUnpickler(file).load()
            assert isinstance(found, Metadata)
        except (pickle.UnpicklingError, EOFError, AttributeError, AssertionError, ValueError, TypeError, IndexError,
                KeyError, ImportError) as error:  # any bytes
            raise ValueError(f"{path}: refused: no index of a distributed checkpoint ({error})") from None
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(DefaultLoadPlanner):
    """torch's planner, which would open what is no tensor (a learning rate) as any pickle."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Take one entry that is no tensor."""
        name = read_item.dest_index.fqn
        try:
            found = torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"refused: entry {name!r} of a distributed checkpoint is more than numbers and texts "
                             f"({str(error).splitlines()[0][:200]})") from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill a state from a distributed checkpoint; its shards may be of any number of workers.

    Raises ValueError with the folder where it holds anything but tensors, numbers and texts.
    """
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:  # holds what each worker raised
        told = "; ".join(dict.fromkeys(str(failure[0]) for failure in error.failures.values()))
        raise ValueError(f"{folder}: {told}. Restore it, or remove this checkpoint: the run continues from the one "
                         "before it") from None
