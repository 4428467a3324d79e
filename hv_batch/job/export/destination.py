"""The folder that an export fills: new, local, outside the output root, with hard links or copies of the root's files.

A link costs no time and no space, but it is the same file: an edit in place changes the output root. Files of an object
store, and of a local root on another file system, are copied, and their hashes are checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file of the output root and its name in the export. A file without a recorded size is not checked."""

    key: str
    name: str
    bytes: int | None = None
    sha256: str = ""


@dataclass(slots=True)
class Counts:
    links: int = 0
    copies: int = 0
    bytes: int = 0


class Destination:
    """Raises UserError if the folder is not empty, lies in the output root, or cannot be created."""

    def __init__(self, store: Store, folder: Path, *, copies: bool = False) -> None:
        self.folder = folder.absolute()
        self.counts = Counts()
        self._store = store
        self._copies = copies
        root = store.folder
        if root is not None and self.folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"The folder {folder} lies in the output root {root}. Choose a folder outside of it.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_empty = not any(self.folder.iterdir())
        except OSError as error:
            raise UserError(
                f"The folder {folder} cannot be created: {error.strerror}. Choose another one, or grant write access."
            ) from error
        if not is_empty:
            raise UserError(f"The folder {folder} is not empty. Choose a new one, or remove what is in it.")

    def distinguishes_case(self) -> bool:
        """Whether names that differ only by case are different files here."""
        probe = self.folder / ".hv_batch-case"
        probe.touch()
        try:
            return not probe.with_name(probe.name.upper()).exists()
        finally:
            probe.unlink()

    def add(self, files: Sequence[ExportedFile], advance: Callable[[int], None]) -> None:
        """Link or copy the files; `advance` gets the number of files that are done.

        Raises UserError if a file of the output root is missing or differs from its record.
        """
        for parent in sorted({(self.folder / file.name).parent for file in files}):
            parent.mkdir(parents=True, exist_ok=True)
        for is_link, num_bytes in map_in_threads(self._add, files, self._store.readers):
            self.counts.links += is_link
            self.counts.copies += not is_link
            self.counts.bytes += num_bytes
            advance(1)

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def _add(self, file: ExportedFile) -> tuple[bool, int]:
        target = self.folder / file.name
        try:
            is_link = not self._copies and self._store.link_file(file.key, target)
            if not is_link:
                self._refuse_size(file)
                self._store.get_file(file.key, target)
        except FileNotFoundError:
            raise self._damage(file, "is missing") from None
        num_bytes = target.stat().st_size
        if file.bytes is not None and num_bytes != file.bytes:
            raise self._damage(file, f"has {num_bytes:,} bytes and not {file.bytes:,}")
        if not is_link and file.sha256 and _sha256(target) != file.sha256:
            raise self._damage(file, "does not have the recorded sha256")
        return is_link, num_bytes

    def _refuse_size(self, file: ExportedFile) -> None:
        """Raise UserError for a local file that is too large: a sparse one would fill the disk of the export."""
        if self._store.folder is None or file.bytes is None:  # an object has the size of what was uploaded
            return
        if (size := self._store.size(file.key)) > file.bytes:
            raise self._damage(file, f"has {size:,} bytes and not {file.bytes:,}")

    def _damage(self, file: ExportedFile, problem: str) -> UserError:
        return UserError(
            f"{file.key} of {public_url(self._store.url)} {problem}. The export is incomplete. Run `hv-batch verify "
            "--repair`, remove the folder of the export, and export again."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
