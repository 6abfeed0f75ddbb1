"""The adapters folder: publish, verify, list, resolve names, CURRENT. Knows files and names, no
modules of a model; the formats of a manifest and of a weights file are in manifest.py.

    var/adapters/000007/        adapters.safetensors and adapter_config.json as mlx-lm writes them,
                                manifest.json, hot_vocab.npy where the hot vocabulary was refreshed
    var/adapters/CURRENT        the id that should be active, moved by rename; empty for none
    var/adapters/PREVIOUS       the id that was active before it
    var/adapters/MARKS.json     what was decided about adapters after their promotion (marks.py)

Publishing writes files under a temporary name, syncs them, renames the directory, and moves CURRENT
last. Whenever a process is killed, CURRENT names a complete adapter that verifies, or nothing. A
directory is never changed after its rename.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from specl.shared.adapters.manifest import Manifest, header_problem, parse_manifest
from specl.shared.adapters.marks import AdapterMarks
from specl.shared.errors import AdapterRejected
from specl.shared.runtime.atomic_files import sync_to_disk, sync_tree, write_file
from specl.shared.runtime.failpoints import failpoint

FILES = ("adapters.safetensors", "adapter_config.json", "manifest.json", "hot_vocab.npy")
REQUIRED = FILES[:3]
MAX_FILE = 2 * 1024**3
MAX_MANIFEST = 64 * 1024**2
KEEP_LAST = 5  # newest adapters that pruning keeps
HIGHEST = "HIGHEST"  # file of the largest id that was ever removed: ids are never used twice
PREVIOUS = "PREVIOUS"
EXTERNAL_FILES = FILES[:2]  # that an external adapter must have; mlx-lm writes no more
STAGED = ".new-import-"  # prefix of staged imports; `sweep` removes them, too
STAGED_NAME = re.compile(re.escape(STAGED) + "[0-9a-f]{32}")
ID = re.compile(r"[0-9]{6}")
ALIASES = ("latest", "best", "previous", "current")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_bounded(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_MANIFEST + 1)


class Adapters:
    """The adapters folder of one run directory.

    The trainer publishes; inference moves CURRENT for a user and for a rollback.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.marks = folder, AdapterMarks(folder)

    # ------------------------------------------------------------------------------------------------ write
    def next_id(self) -> str:
        """The next free id: one more than the highest that was ever used in this folder."""
        with suppress(OSError, ValueError):
            return f"{max(int((self.folder / HIGHEST).read_text()), *self._numbers(), 0) + 1:06d}"
        return f"{max(self._numbers(), default=0) + 1:06d}"

    def _numbers(self) -> list[int]:
        return [int(id) for id in self.ids()]

    def sweep(self) -> None:
        """Remove what a killed process left unfinished. Call with the trainer's lock held."""
        for path in self.folder.glob(".new-*"):
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, source: Path, manifest: Manifest, make_current: bool = True) -> Path:
        """Make the files in `source` adapter `manifest.id`; with `make_current`, CURRENT names it.
        Returns its folder.

        Raises OSError where the disk refuses; then there is no such adapter, and the caller removes
        `source`.
        """
        failpoint("adapter.files_written")
        hashes = {
            name: sha256_of(source / name) for name in FILES if name != "manifest.json" and (source / name).exists()
        }
        document = asdict(manifest) | {"files": hashes}
        (source / "manifest.json").write_text(json.dumps(document, indent=2))
        sync_tree(source)
        final = self.folder / manifest.id
        failpoint("adapter.before_rename")
        os.rename(source, final)
        try:
            sync_to_disk(self.folder)
            failpoint("adapter.after_rename")
            if make_current:
                self.set_current(manifest.id)
        except OSError:
            if self.current() != manifest.id:  # CURRENT moves last, so nothing refers to it
                shutil.rmtree(final, ignore_errors=True)
                raise
        return final

    def scratch(self, id: str) -> Path:
        """An empty folder to write an adapter's files into."""
        path = self.folder / f".new-{id}-{os.getpid()}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def stage(self, source: Path, token: str) -> Path:
        """Copy an external adapter's files into this folder, where the trainer evaluates them;
        `token` makes its name unique.

        Raises AdapterRejected where `source` is no adapter directory, OSError where the copy fails.
        """
        if not source.is_dir():
            raise AdapterRejected(f"there is no directory {source}")
        if missing := [name for name in EXTERNAL_FILES if not (source / name).is_file()]:
            raise AdapterRejected(f"{source} holds no adapter: {' and '.join(missing)} not found")
        if large := [name for name in FILES if (source / name).is_file() and (source / name).stat().st_size > MAX_FILE]:
            raise AdapterRejected(f"{source / large[0]} is larger than {MAX_FILE >> 30} GiB")
        folder = self.folder / f"{STAGED}{token}"
        folder.mkdir(parents=True, mode=0o700)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return folder

    def staged(self, name: str) -> Path:
        """The staged copy with this name. Raises AdapterRejected for any other name, and where it
        no longer exists.
        """
        folder = self.folder / name
        if not STAGED_NAME.fullmatch(name) or folder.is_symlink() or not folder.is_dir():
            raise AdapterRejected(f"{name!r} is not an adapter that was staged for import")
        return folder

    def set_current(self, id: str) -> None:
        """Make CURRENT name `id`; empty for none."""
        failpoint("adapter.before_current")
        self._replace("CURRENT", id)
        failpoint("adapter.after_current")

    def _replace(self, name: str, text: str) -> None:
        """Replace a file of this folder atomically and durably. Raises OSError."""
        write_file(self.folder / name, text, sync=True)

    def set_previous(self, id: str) -> None:
        """Make PREVIOUS name the adapter that was active before, for a rollback; empty for none.
        Raises OSError.
        """
        self._replace(PREVIOUS, id)

    def rolled_back(self) -> dict[str, str]:
        """Adapters that were rolled back and not reinstated since, with the reason."""
        return self.marks.rolled_back()

    def drop(self, ids: Sequence[str]) -> None:
        """Remove these adapters for good; their ids are not used again. CURRENT must name none of
        them. Raises OSError.
        """
        self._replace(HIGHEST, str(int(self.next_id()) - 1))
        for id in ids:
            self._remove(id)

    def descendants(self, ids: Sequence[str]) -> list[str]:
        """`ids` and every adapter that was trained from one of them, directly or not; oldest first."""
        descendants = set(ids)
        for id in self.ids():
            with suppress(AdapterRejected):
                if self.manifest(id).parent_id in descendants:
                    descendants.add(id)
        return sorted(descendants)

    def trained_on(self, generations: Sequence[str]) -> list[str]:
        """Adapters that learned from any of these generations, themselves or through a parent."""
        learned, ids = set(generations), []
        for id in self.ids():
            with suppress(AdapterRejected):
                if learned & set(self.manifest(id).generations):
                    ids.append(id)
        return self.descendants(ids)

    def _remove(self, id: str) -> None:
        removed = self.folder / f".new-removed-{id}"  # renamed first: a directory never exists in part
        os.rename(self.folder / id, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def prune(self, keep: Sequence[str]) -> list[str]:
        """Remove all but the last five, CURRENT, the previous, the best and those in `keep`; the
        removed ids.
        """
        kept = {*self.ids()[-KEEP_LAST:], *map(self.resolve, ("current", "previous", "best")), *keep}
        removed = [id for id in self.ids() if id not in kept]
        for id in removed:
            self._remove(id)
        return removed

    # ------------------------------------------------------------------------------------------------ read
    def ids(self) -> list[str]:
        """Ids of published adapters, oldest first."""
        try:
            return sorted(path.name for path in self.folder.iterdir() if ID.fullmatch(path.name) and path.is_dir())
        except FileNotFoundError:
            return []

    def current(self) -> str:
        """The id that CURRENT names; empty where it names none or cannot be used."""
        try:
            return self.named()
        except AdapterRejected:
            return ""

    def named(self) -> str:
        """The id that CURRENT names; empty for none. Raises AdapterRejected where that is no id, or
        the file cannot be read.
        """
        try:
            id = (self.folder / "CURRENT").read_bytes()[:64].decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise AdapterRejected(f"CURRENT cannot be read: {error}") from error
        if id and not ID.fullmatch(id):
            raise AdapterRejected(f"CURRENT names {id!r}, which is not an adapter id")
        return id

    def manifest(self, id: str) -> Manifest:
        """An adapter's manifest. Raises AdapterRejected where it is missing or malformed."""
        try:
            document = _read_bounded(self.folder / id / "manifest.json")
        except OSError as error:
            raise AdapterRejected(f"adapter {id}: its manifest cannot be read: {error}") from error
        try:
            manifest = parse_manifest(document)
        except AdapterRejected as error:
            raise AdapterRejected(f"adapter {id}: {error}") from error
        if manifest.id != id:
            raise AdapterRejected(f"adapter {id}: its manifest says it is {manifest.id}")
        return manifest

    def resolve(self, name: str) -> str:
        """The id for a name: an id, `latest`, `current`, `previous` or `best`; empty where there is
        no such adapter.

        `best` has the highest held-out agreement of those that were not rolled back and whose
        manifest has a score.
        """
        if name == "latest":
            return next(reversed(self.ids()), "")
        if name == "current":
            return self.current()
        if name == "previous":
            with suppress(OSError):
                name = (self.folder / PREVIOUS).read_bytes()[:64].decode("ascii", "replace").strip()
            return name if name in self.ids() else ""
        if name == "best":
            scored, rolled_back = [], self.rolled_back()
            for id in (id for id in self.ids() if id not in rolled_back):
                with suppress(AdapterRejected):
                    if (score := self.manifest(id).score) is not None:
                        scored.append((score, id))
            return max(scored, default=(0.0, ""))[1]
        id = name.zfill(6) if name.isdigit() else name
        return id if id in self.ids() else ""

    def verify(self, path: str | Path, base_fingerprint: str, tokenizer_fingerprint: str) -> Manifest:
        """Check an adapter directory's files and return its manifest.

        It must be directly in this folder, hold regular files of known names, sizes and sha256, and
        be made for this draft. Raises AdapterRejected with every reason found. The tensors are
        checked in tensors.py.
        """
        folder = self.confine(Path(path))
        problems = self._file_problems(folder)
        if problems:
            raise AdapterRejected(f"adapter {folder.name}: " + "; ".join(problems))
        manifest = self.manifest(folder.name)
        for name in FILES:
            present = (folder / name).exists()
            if name == "manifest.json" or (not present and name not in manifest.files):
                continue
            if not present:
                problems.append(f"{name} is missing, though the manifest names it")
            elif manifest.files.get(name) != sha256_of(folder / name):
                problems.append(f"{name} is not the file that was published (sha256)")
        if manifest.base_fingerprint != base_fingerprint:
            problems.append(f"it was trained on draft {manifest.base_fingerprint}, this one is {base_fingerprint}")
        if manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            problems.append("its tokenizer is another one")
        if problems:
            raise AdapterRejected(f"adapter {folder.name}: " + "; ".join(problems))
        return manifest

    def confine(self, path: Path) -> Path:
        """Return `path` if it is directly inside this folder, without links. Raises AdapterRejected
        otherwise.
        """
        name = path.name
        if path.parent not in (self.folder, Path(".")) and path.parent.absolute() != self.folder.absolute():
            raise AdapterRejected(f"{path} lies outside {self.folder}")
        if not ID.fullmatch(name):
            raise AdapterRejected(f"{name!r} is not an adapter id")
        inside = self.folder / name
        if inside.is_symlink():
            raise AdapterRejected(f"adapter {name}: a link, not a folder")
        if not inside.is_dir():
            raise AdapterRejected(f"there is no adapter {name}")
        return inside

    def _file_problems(self, folder: Path) -> list[str]:
        present = {path.name: path.lstat() for path in folder.iterdir()}
        problems = [f"{name} is missing" for name in REQUIRED if name not in present]
        for name, info in sorted(present.items()):
            if name not in FILES:
                problems.append(f"{name} does not belong in an adapter")
            elif not stat.S_ISREG(info.st_mode):
                problems.append(f"{name} is not a regular file")
            elif info.st_size > MAX_FILE:
                problems.append(f"{name} has {info.st_size} bytes")
        if not problems:
            problem = header_problem(folder / "adapters.safetensors")
            problems += [problem] if problem else []
        return problems
