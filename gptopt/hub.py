"""The one explicit use of the network: `hf:org/name[@revision]` becomes a local folder."""

import logging
import re
from pathlib import Path

from gptopt.errors import UserError, first_line

logger = logging.getLogger(__name__)

PREFIX = "hf:"
_REFERENCE = re.compile(
    r"hf:(?P<repository>(?:\w[\w.-]*/)?\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
# Nothing in a model's root needs a subfolder, and `consolidated` files are the weights once more.
_UNWANTED = ["*/*", "consolidated*"]


def download(reference: str) -> Path:
    """Fetch a model's weights, configs and tokenizer into the hub's cache; the folder there.

    Raises:
        UserError: a malformed reference, huggingface_hub is missing, or the download failed.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference}: expected hf:org/name or hf:org/name@revision")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{reference}: huggingface_hub is not installed; install gptopt[hub], or download the "
            f"folder by other means and give its path"
        ) from None
    logger.info("%s: looking in the hub's cache, downloading what is missing", reference)
    try:
        folder = huggingface_hub.snapshot_download(
            match["repository"],
            revision=match["revision"],
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except Exception as error:  # the client raises the errors of whichever HTTP library it uses
        raise UserError(
            f"{reference}: download failed ({type(error).__name__}: {first_line(error)}); check "
            f"the name, the network and the access rights"
        ) from None
    return Path(folder)
