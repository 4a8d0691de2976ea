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
    """Where dequantized GGUF models are kept: ``$VPS_CACHE`` or ``~/.cache/vps``."""
    return Path(os.environ.get("VPS_CACHE") or Path.home() / ".cache" / "vps")


def load_model(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        name: a Hugging Face id, a local folder, or a ``.gguf`` file, whose dequantized weights
            are cached in :func:`cache_folder`.
        dtype: of the weights.
        device: where to put the model.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        FileNotFoundError: a path that does not exist.
        ModuleNotFoundError: transformers or gguf is missing.
        OSError: no such model, or not to be reached.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ModuleNotFoundError(
            "loading a model needs transformers: pip install 'vps-kernels[hf]'"
        ) from None
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such GGUF file: {name}")
        source, local = str(_dequantized(path)), True
    elif path.is_dir():
        source, local = name, True
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {name}")
    else:
        source, local = name, False
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
    return model.to(device).eval(), tokenizer


def _dequantized(path: Path) -> Path:
    """Folder with the plain form of a GGUF file, made on first use."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError(
            "loading a GGUF file needs gguf: pip install 'vps-kernels[hf]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{path.stem}-{key[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain by now, but still called quantized, which cannot be saved.
        model.hf_quantizer = None
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
