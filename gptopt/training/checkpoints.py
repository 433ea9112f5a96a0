"""The checkpoints of a run: written whole or not at all, verified before use, kept in number.

A checkpoint is a folder RUN/checkpoints/step-000500. The files RUN/latest and RUN/best hold such a
folder's name each and are replaced only after that folder is complete.
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from gptopt.errors import CheckFailed, UserError, first_line
from gptopt.manifest import (
    Entries,
    remove_stale,
    staged_folder,
    verify_manifest,
    write_manifest,
    write_text,
)

logger = logging.getLogger(__name__)

KIND = "checkpoint"
_FREE = ("README.md",)  # what the run found is written into it later; people alone read it
_NAME = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """The folder RUN/checkpoints, and the two files that point into it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"

    def of(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Every checkpoint folder, damaged ones too, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def newest(self) -> Path | None:
        """The newest checkpoint that its manifest proves whole; damaged ones are named."""
        for folder in reversed(self.all()):
            try:
                verify_manifest(folder, KIND)
            except UserError as error:
                logger.warning("%s: damaged and skipped (%s)", folder, error)
            else:
                return folder
        return None

    def forget(self) -> None:
        """Remove pointers that no checkpoint stands behind any more: a new run begins."""
        for name in ("best", "latest"):
            (self.run / name).unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what a killed writer left half-written."""
        for folder in (self.run, self.folder):
            for name in remove_stale(folder):
                logger.info("%s: removed, a killed run left it half-written", folder / name)

    def save(self, step: int, write: Callable[[Path], Entries | None]) -> Path:
        """Write a checkpoint through `write(folder)`, then point `latest` at it.

        `write` may return the manifest's entries of files that others wrote and synced.

        Raises:
            UserError: it cannot be written; what was there before still stands.
        """
        target = self.of(step)
        try:
            # Only a damaged checkpoint, or this step's own from before a resume, can be in the way.
            with staged_folder(target, force=True) as folder:
                write_manifest(folder, KIND, known=write(folder), free=_FREE)
        except SafetensorError as error:  # what its writer makes of an OSError
            raise UserError(
                f"{target}: cannot be written ({first_line(error)}); free space, then --resume;"
                f" earlier checkpoints are intact"
            ) from None
        self._point("latest", target)
        return target

    def mark_best(self, step: int) -> None:
        """Point `best` at a complete checkpoint."""
        assert self.of(step).is_dir()
        self._point("best", self.of(step))

    def pointed(self, name: str) -> Path | None:
        """The folder that `latest` or `best` names, or None."""
        try:
            target = (self.run / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.folder / target if _NAME.fullmatch(target) else None

    def prune(self, keep: int, every: int = 0) -> None:
        """Remove all but `best`, `latest`, the newest `keep` beside it, and each `every` steps'."""
        best, latest = self.pointed("best"), self.pointed("latest")
        found = self.all()
        for_good = {folder for folder in found if every and step_of(folder) % every == 0}
        others = [folder for folder in found if folder != best and folder not in for_good]
        kept = {best, latest, *for_good, *others[-keep:]}
        for folder in found:
            if folder not in kept:
                # Renamed first: a kill half-way leaves a leftover, not a damaged checkpoint.
                doomed = folder.with_name(f".tmp-{folder.name}")
                folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _point(self, name: str, target: Path) -> None:
        write_text(self.run / name, target.name + "\n")


def step_of(folder: Path) -> int:
    """step-000500 -> 500."""
    matched = _NAME.fullmatch(folder.name)
    if matched is None:
        raise CheckFailed(f"{folder}: is not named like a checkpoint (step-000500)")
    return int(matched[1])
