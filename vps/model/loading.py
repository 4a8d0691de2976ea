"""Load a Hugging Face causal language model by id, from a folder, or from a GGUF file."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """Return the folder of dequantized GGUF models: ``$VPS_CACHE`` or ``~/.cache/vps``."""
    return Path(os.environ.get("VPS_CACHE") or Path.home() / ".cache" / "vps")


def load_model(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        name: a Hugging Face id, a local folder, or a ``.gguf`` file, whose dequantized weights
            are cached in :func:`cache_folder`.
        dtype: dtype of the weights.
        device: where to put the model.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no model.
        ModuleNotFoundError: transformers or gguf is missing.
        OSError: there is no such model, it cannot be reached, or no folder can be written for
            dequantized weights.
        ValueError: the file is no GGUF file, or a broken one.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ModuleNotFoundError(
            "loading a model needs transformers: pip install 'vps-kernels[hf]'"
        ) from None
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"no model in {name}: expected config.json or one .gguf file, found {len(files)}"
            )
        path = files[0]
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such GGUF file: {name}")
        source, local = str(_dequantized(path)), True
    elif path.is_dir():
        source, local = str(path), True
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {name}")
    else:
        source, local = name, False
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
    except OSError as error:
        if local:
            raise
        raise OSError(
            f"{name!r} is no local folder or file, and Hugging Face has no such model or cannot "
            f"be reached: {str(error).splitlines()[0]}"
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def _dequantized(path: Path) -> Path:
    """Return the folder with the plain form of a GGUF file, made on first use."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{path.stem}-{key[:12]}"
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError(
            "loading a GGUF file needs gguf: pip install 'vps-kernels[hf]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OSError(
            f"cannot keep dequantized weights in {folder.parent} ({error.strerror}); "
            "set VPS_CACHE to a folder that can be written"
        ) from error
    try:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        except Exception as error:  # gguf and transformers raise what their parsers stumble over
            raise ValueError(f"{path} cannot be read, is it complete? {error}") from error
        tokenizer.save_pretrained(temporary)
        # The weights are plain now, but a model that is still marked as quantized cannot be saved.
        vars(model)["hf_quantizer"] = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
