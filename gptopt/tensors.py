"""safetensors files, written so that a full disk is an OSError as everywhere else."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], fact: tuple[str, str] = ("format", "pt")
) -> None:
    """Write contiguous tensors, and a fact about them into the file's header.

    One fact alone, for safetensors writes several in any order, and equal tensors shall make equal
    files. Without one the header says that PyTorch wrote the file, which transformers asks for.

    Raises:
        OSError: the disk is full, or the path is not writable.
    """
    try:
        save_file(dict(tensors), path, metadata=dict([fact]))
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
