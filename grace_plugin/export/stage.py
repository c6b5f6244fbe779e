"""The folder that a checkpoint goes to, and the temporary one in which it is written; both are tried before the first step.

Where the destination does not exist, the temporary folder is next to it and renamed. Where it is an empty folder, the temporary
one is inside it and the files are moved up, the folder with the record last: a destination without `grace/record.json` holds
no finished checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from grace_plugin.export.ranks import is_writer

_INSIDE = ".grace-partial"
_RESERVE = 16 * 2**20  # bytes of free disk for the small files
GIB = 2**30


class Destination(NamedTuple):
    """path: as given. folder: with links resolved. stage: the temporary folder. inside: whether `stage` is in `folder`."""

    path: Path
    folder: Path
    stage: Path
    inside: bool

    def clear(self) -> None:
        """Remove the temporary folder, of this run or of an earlier one that was killed."""
        shutil.rmtree(self.stage, ignore_errors=True)

    def publish(self) -> None:
        """Make the staged checkpoint appear at the destination."""
        sync(self.stage)
        if not self.inside:
            self.stage.rename(self.folder)
            return
        # a mount point, or a folder behind a symbolic link, cannot be replaced by a rename
        names = sorted(path.name for path in self.stage.iterdir())
        moved: list[Path] = []
        try:
            for name in sorted(names, key=lambda name: (name == "grace", name)):
                (self.stage / name).rename(self.folder / name)
                moved.append(self.folder / name)
        except BaseException:
            for path in moved:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
        self.stage.rmdir()


def check_destination(output_dir: str | os.PathLike[str]) -> Path:
    """Check that a destination does not exist or is an empty folder; returns it.

    Raises:
        FileExistsError: something is there; nothing is touched.
        ValueError: no name, one that is too long, or a symbolic link to nothing.
    """
    path = Path(output_dir)
    if not os.fspath(output_dir):
        raise ValueError("output_dir is empty; name the folder that the checkpoint goes to")
    _check_names(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist; create that folder or remove the link"
        )
    # _INSIDE is what a killed run has left; it is replaced
    if path.exists() and (not path.is_dir() or any(entry.name != _INSIDE for entry in path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another output_dir or remove it")
    return path


def _check_names(path: Path) -> None:
    for part in path.parts:
        length = len(os.fsencode(part))
        if length > 255:
            raise ValueError(
                f"the name {part[:60]!r}... has {length} bytes, more than a file system takes; use a shorter one"
            )


def locate(output_dir: str | os.PathLike[str]) -> Destination:
    """Check a destination and return where its checkpoint is staged; the same on every rank, nothing is touched.

    Raises:
        FileExistsError, ValueError: as `check_destination`.
    """
    path = check_destination(output_dir)
    # resolved, because renaming onto a symbolic link would replace the link
    folder = path.resolve()
    if folder.is_dir():
        return Destination(path, folder, folder / _INSIDE, True)
    # next to the destination, so that both are on one file system: a rename is atomic only there
    name = f".{folder.name}.partial"
    if len(os.fsencode(name)) > 255:  # the destination's own name may have 255 bytes
        name = f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:32]}.partial"
    return Destination(path, folder, folder.with_name(name), False)


def rehearse(output_dir: str | os.PathLike[str], run_folder: str | os.PathLike[str] | None = None) -> Destination:
    """Try the temporary folder, the rename and the run folder, and leave nothing behind; every rank checks, one tries.

    Raises:
        FileExistsError: something is at the destination.
        ValueError: no checkpoint can be written there.
    """
    found = locate(output_dir)
    if run_folder is not None:
        _check_names(Path(run_folder))
    if not is_writer() or os.environ.get("RANK", "0") != "0":  # torchrun sets RANK before the process group exists
        return found
    if found.stage.is_symlink() or (found.stage.exists() and not found.stage.is_dir()):
        raise ValueError(
            f"{found.stage} has the name of the temporary folder of {found.path} and is none; move it away"
        )
    try:
        _try_stage(found)
        if run_folder is not None:
            _try_folder(Path(run_folder))
    except OSError as error:
        where = error.filename or found.path
        raise ValueError(
            f"no checkpoint can be written to {found.path}: {error.strerror or error} ({where}); choose another output_dir"
        ) from error
    return found


def _make_parents(folder: Path) -> list[Path]:
    """Create a folder with its parents; returns what was created, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _try_stage(found: Destination) -> None:
    parent = found.stage.parent
    created = _make_parents(parent)
    trial = parent / f".grace-{uuid.uuid4().hex}"
    aim = trial.with_suffix(".moved")  # not the destination itself, which another rank may be checking
    try:
        trial.mkdir()
        try:
            (trial / "file").write_bytes(b"grace")
            (trial / "file").unlink()
            trial.rename(aim)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        aim.rmdir()
    finally:
        _remove(created)


def _try_folder(folder: Path) -> None:
    if folder.is_dir():
        trial = folder / f".grace-{uuid.uuid4().hex}"
        trial.write_bytes(b"grace")
        trial.unlink()
        return
    _remove(_make_parents(folder))


def _remove(created: list[Path]) -> None:
    """Remove folders that a rehearsal has made."""
    for folder in created:
        with suppress(OSError):  # another rank uses it by now
            folder.rmdir()


def check_space(found: Destination, needed: int) -> None:
    """Refuse a destination whose file system has less free space than the checkpoint needs.

    Args:
        needed: bytes.

    Raises:
        ValueError: names the folder and both sizes.
    """
    near = next(folder for folder in (found.stage.parent, *found.stage.parents) if folder.is_dir())
    free = shutil.disk_usage(near).free
    if free < needed + _RESERVE:
        raise ValueError(
            f"the checkpoint needs about {(needed + _RESERVE) / GIB:.2f} GiB and {near} has {free / GIB:.2f} GiB free; free "
            "some space or choose another output_dir"
        )


def sync(folder: Path) -> None:
    """Ask the file system to write every file and folder below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems take no fsync of a folder
            if not path.is_dir():
                raise
        finally:
            os.close(handle)
