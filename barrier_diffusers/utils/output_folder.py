"""An output folder holds one run: it is locked while the run lasts, and the run before it is kept until this one ends.

What a run wrote is known by a hidden record beside it. Nothing else in a folder is ever moved or removed. An earlier
run that may be overwritten waits in a hidden folder: it is deleted when the new run has ended well, and comes back
when that fails, at once or, after a kill, at the next start.

    @in_output_folder()
    def main(config): ...          # of a script: config has output_dir, overwrite_output_dir, resume_from_checkpoint
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from barrier_diffusers.utils.files import clear_leftovers, leftover, remove, require_writable, write_json
from barrier_diffusers.utils.locks import EXCLUSIVE_NAME, LOCK_NAME, FolderLock
from barrier_diffusers.utils.overlaps import check_overlaps

RECORD_NAME = ".barrier_run.json"
SIGNATURE = "output folder of barrier_diffusers"  # a record's first value
ASIDE = ".run-before"  # the earlier run, as long as another one is at work
MOVING = ".run-before.moving"  # the same on its way there or back: what is in it belongs into the folder
DONE = ".run-before.done"  # the same when the new one has ended well: to be deleted
HIDDEN = (RECORD_NAME, ASIDE, MOVING, DONE, LOCK_NAME, EXCLUSIVE_NAME)
KEPT = ("cache", "logs")  # stay from run to run, and make no folder an occupied one
DROPPINGS = (".DS_Store", "Thumbs.db", "desktop.ini")  # of systems that show folders
CHECKPOINTS = "checkpoints"

WRITTEN = (  # what scripts leave at the top of their folder; a folder of an earlier version has no list of its own
    *("manifest.json", "metrics.json", "evaluation.json", "certificate.json", "seconds.json", "erased_concepts.json"),
    "attack_curves.json",
    *("report.html", "before_after.png", "loss_curves.png", "attacks.png", "images.png"),
    *("barrier_config.json", "barrier_*.safetensors", "pytorch_lora_weights.safetensors", "training_config.json"),
    *("model_index.json", "config.json", "preprocessor_config.json", "model*.safetensors*"),
    *("unet", "transformer", "vae", "text_encoder*", "tokenizer*", "scheduler", "safety_checker"),
    *("feature_extractor", "image_encoder", "merged", "exported", "validation", "images", f"{CHECKPOINTS}*"),
)
LATER = ("report.html", f"{CHECKPOINTS}*")  # what may come when a run has ended
CACHED = ("latents-*", "text-*", "images-*", "features-*", "generated-*", "moments-*", "attack-*")  # names in a cache

Main = TypeVar("Main", bound=Callable[..., Any])


def is_first_process() -> bool:
    """Whether this process starts alone or as the first of a group, by the launcher's word."""
    ranks = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
    return next((os.environ[name] for name in ranks if name in os.environ), "0") == "0"


def say(line: str) -> None:
    """Print in the first process of a run alone."""
    if is_first_process():
        print(line)


def in_output_folder(kept: Sequence[str] = (), also_written: Sequence[str] = ()) -> Callable[[Main], Main]:
    """Decorator of a script's `main(config)`: it has config.output_dir to itself, and what was there is safe.

    Args:
        kept: names in the folder that stay from run to run, beside cache and logs.
        also_written: patterns of names that the script leaves, beside those of `WRITTEN`.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def wrapped(config: Any) -> Any:
            if not is_first_process():
                return main(config)
            with output_folder(config, kept=kept, also_written=also_written):
                return main(config)

        return wrapped  # type: ignore[return-value]

    return decorate


@contextmanager
def output_folder(config: Any, kept: Sequence[str] = (), also_written: Sequence[str] = ()) -> Iterator[Path]:
    """Within the block the output folder belongs to this process alone; see `in_output_folder`.

    Args:
        config: settings with output_dir, and overwrite_output_dir, resume_from_checkpoint, cache_dir where there are
            such; a work_dir is locked as well.

    Raises:
        ValueError: the folder may not be used, or lies where something is read; the message says why.
    """
    check_overlaps(config)
    given = Path(config.output_dir).absolute()
    new = [folder for folder in (given, *given.parents) if not os.path.lexists(folder)]
    path = require_writable(config.output_dir)
    with ExitStack() as locks:
        locks.callback(_remove_empty, new)  # a run that is refused leaves nothing
        locks.enter_context(FolderLock(path))
        if getattr(config, "work_dir", None) is not None:
            locks.enter_context(FolderLock(require_writable(config.work_dir)))
        cache = getattr(config, "cache_dir", None)
        folder = OutputFolder(path, [*KEPT, *kept, *_first_part(path, cache)], also_written)
        clear_caches(config, path)
        try:
            folder.open(
                overwrite=bool(getattr(config, "overwrite_output_dir", False)),
                resume=getattr(config, "resume_from_checkpoint", None) is not None,
            )
            _in_use.append(folder)
            yield path
        except BaseException:
            folder.close_failed()
            raise
        finally:
            _in_use.clear()
        folder.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Delete those of the folders, the innermost first, that hold nothing but the file of a lock."""
    for folder in folders:
        with suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {LOCK_NAME, EXCLUSIVE_NAME}:
                (folder / LOCK_NAME).unlink(missing_ok=True)
                folder.rmdir()


_in_use: list[OutputFolder] = []  # by this process


def set_aside(path: Path) -> None:
    """Delete a folder of ours that is to be made anew; within an output folder in use it comes back if that fails."""
    inside = [folder for folder in _in_use if folder.path.resolve() in path.resolve().parents]
    if inside:
        inside[0].set_aside(path)
    else:
        remove(path)


def clear_caches(config: Any, output: Path) -> None:
    """Delete what killed processes left half written in the caches of a run."""
    fidelity = getattr(getattr(config, "fidelity", None), "cache_dir", None)
    for cache in (output / "cache", getattr(config, "cache_dir", None), fidelity):
        folder = Path(cache).expanduser() if cache else output / "cache"
        if folder.is_dir():
            clear_leftovers(folder, lambda path: any(fnmatchcase(path.name, name) for name in CACHED), alone=False)


def _first_part(path: Path, cache: str | None) -> list[str]:
    """The name in the folder that holds the cache; none if it lies elsewhere."""
    if cache is None:
        return []
    inside, outside = Path(cache).expanduser().resolve(), path.resolve()
    return [inside.relative_to(outside).parts[0]] if outside in inside.parents else []


class OutputFolder:
    """What is in an output folder, and whose it is. Its user holds the folder's lock.

    Args:
        kept: names that stay from run to run.
        also_written: patterns of names, beside `WRITTEN`, that the run may leave.
    """

    def __init__(self, path: Path, kept: Sequence[str], also_written: Sequence[str] = ()):
        self.path, self.kept, self.also_written = path, frozenset(kept), list(also_written)

    def open(self, overwrite: bool, resume: bool) -> None:
        """Make room for a run: bring back what a killed one had set aside, then set aside what may be overwritten.

        A resumed run sets aside the results of its earlier end, so that new weights never stand beside old numbers.

        Raises:
            ValueError: the folder holds another run that may not be overwritten, or files of somebody else.
        """
        self._recover()
        there = self._entries()
        record = read_record(self.path)
        if there and not record and not _is_of_earlier_version(self.path):
            names = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise ValueError(
                f"output_dir {str(self.path)!r} holds other files, which no run wrote ({names}); name another folder"
            )
        clear_leftovers(self.path, lambda path: path.name == RECORD_NAME or self._is_own(path, record), alone=True)
        there = self._entries()
        own = [name for name in there if self._is_own(self.path / name, record)]
        stopped = "images" in self.kept and not (self.path / "metrics.json").exists()  # an evaluation, which goes on
        if own and not (overwrite or resume or stopped):
            raise ValueError(
                f"output_dir {str(self.path)!r} holds another run; name another folder or set --overwrite_output_dir"
            )
        self._refuse_links([*self.kept, *([CHECKPOINTS] if resume else [])])
        self._refuse_additions(there, own, record)
        stay = {CHECKPOINTS} if resume else set()
        self._set_aside([*(name for name in own if name not in stay), *([RECORD_NAME] if record else [])])
        self._write_record([])

    def close(self) -> None:
        """The run has ended well: note what it wrote, and delete the one before it."""
        entries = [name for name in self._entries() if self._is_own(self.path / name, read_record(self.path))]
        files = [path for name in entries for path in _files(self.path / name)]
        self._write_record(sorted(path.relative_to(self.path).as_posix() for path in files))
        if (self.path / ASIDE).is_dir():
            os.replace(self.path / ASIDE, self.path / DONE)
            self._delete_done()

    def close_failed(self) -> None:
        """The run has failed: what was there before it comes back; new checkpoints stay."""
        try:
            if (self.path / MOVING).is_dir():
                self._move_back()
            if self._restore():
                print(f"{str(self.path)!r} is as it was before this run", file=sys.stderr)
            elif not self._entries():
                remove(self.path / RECORD_NAME)
        except (OSError, ValueError) as error:
            print(f"warning: the run before this one is in {str(self.path / ASIDE)!r} ({error})", file=sys.stderr)

    def _entries(self) -> list[str]:
        """Names at the top of the folder that count."""
        ignored = {*HIDDEN, *DROPPINGS, *self.kept}
        return sorted(path.name for path in self.path.iterdir() if path.name not in ignored and not leftover(path))

    def _is_own(self, path: Path, record: dict[str, Any]) -> bool:
        """Whether a run wrote a file or folder at the top of the folder: by the record, or else by its name."""
        files = record.get("files") or []
        if any(file == path.name or file.startswith(f"{path.name}/") for file in files):
            return True
        if record.get("finished"):
            return any(fnmatchcase(path.name, pattern) for pattern in LATER)
        if path.name == "README.md" and path.is_file():  # a model card, or somebody's own
            text = path.read_text(encoding="utf-8", errors="replace")
            return "after unlearning **" in text or "pytorch_model_hub_mixin" in text
        return any(fnmatchcase(path.name, pattern) for pattern in [*WRITTEN, *record.get("patterns", [])])

    def _refuse_links(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.path / name
            if path.is_symlink():
                raise ValueError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, and nothing is written through a link: "
                    "move it away (cache_dir names a cache elsewhere)"
                )

    def _refuse_additions(self, there: Sequence[str], own: Sequence[str], record: dict[str, Any]) -> None:
        """Refuse to move what somebody put among a run's files, and to write over what stands where a run writes."""
        patterns = [*WRITTEN, *self.also_written]
        others = [name for name in there if name not in own]
        inside = [name for name in others if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if record.get("finished"):
            known, free = set(record["files"]), (CHECKPOINTS, "images/")
            found = (path.relative_to(self.path).as_posix() for name in own for path in _files(self.path / name))
            below = (name for name in found if "/" in name and not name.startswith(free) and _shown(name))
            inside += [name for name in below if name not in known]
        if inside:
            raise ValueError(
                f"output_dir {str(self.path)!r} holds files among those of a run that no run wrote: "
                f"{', '.join(inside[:3])}; move them elsewhere, or name another folder"
            )

    def _set_aside(self, names: Sequence[str]) -> None:
        if not names:
            return
        moving = self.path / MOVING
        moving.mkdir(exist_ok=True)
        try:
            for name in names:
                os.replace(self.path / name, moving / quote(name, safe=""))
        except OSError as error:
            self._move_back()
            raise ValueError(
                f"output_dir {str(self.path)!r} cannot be overwritten ({error.strerror}: {error.filename}): change "
                "the rights, or name another folder"
            ) from error
        os.replace(moving, self.path / ASIDE)

    def set_aside(self, path: Path) -> None:
        """Move a folder below the kept names aside, as the run makes it anew."""
        (self.path / ASIDE).mkdir(exist_ok=True)
        name = quote(path.relative_to(self.path).as_posix(), safe="")
        remove(self.path / ASIDE / name)
        os.replace(path, self.path / ASIDE / name)

    def _recover(self) -> None:
        """Finish what a killed process left half done."""
        self._delete_done()
        if (self.path / MOVING).is_dir():
            self._move_back()
        if self._restore():
            print(f"{str(self.path)!r}: a run was killed; what was there before it is back", file=sys.stderr)

    def _restore(self) -> bool:
        """Replace what the last run wrote by what it had set aside; False if there is nothing. Checkpoints stay, and
        those of the earlier run come back under a name of their own."""
        aside, record = self.path / ASIDE, read_record(self.path)
        if not aside.is_dir():
            return False
        fresh = self.path / CHECKPOINTS
        if not any(fresh.glob("step-*")):
            if fresh.is_dir() and not fresh.is_symlink() and (aside / CHECKPOINTS).exists():
                remove(fresh)
        elif (aside / CHECKPOINTS).exists():
            number = 1
            while (name := f"{CHECKPOINTS}-before-{number}") in {path.name for path in self.path.iterdir()}:
                number += 1
            os.replace(aside / CHECKPOINTS, aside / name)
        for name in self._entries():
            if not name.startswith(CHECKPOINTS) and self._is_own(self.path / name, record):
                remove(self.path / name)
        remove(self.path / RECORD_NAME)
        os.replace(aside, self.path / MOVING)
        self._move_back()
        return True

    def _move_back(self) -> None:
        moving = self.path / MOVING
        for unit in sorted(moving.iterdir(), key=lambda unit: unit.name == RECORD_NAME):
            target = self.path / unquote(unit.name)
            if target.is_dir() and not target.is_symlink():
                remove(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unit, target)
        moving.rmdir()

    def _delete_done(self) -> None:
        done = self.path / DONE
        remove(done)
        if done.exists():
            print(f"warning: {str(done)!r}, a run that was overwritten, cannot be deleted", file=sys.stderr)

    def _write_record(self, files: list[str]) -> None:
        script = Path(sys.argv[0]).name
        patterns = {"patterns": self.also_written} if self.also_written else {}
        content = {"signature": SIGNATURE, "script": script, "finished": bool(files), **patterns, "files": files}
        write_json(self.path / RECORD_NAME, content)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the run that wrote a folder; empty if there is none."""
    content = _json(folder / RECORD_NAME)
    return content if content.get("signature") == SIGNATURE else {}


def _is_of_earlier_version(folder: Path) -> bool:
    """Whether files in a folder without a record show that a script of ours wrote it."""
    for name in ("manifest.json", "metrics.json", "evaluation.json"):
        content = _json(folder / name)
        versions = content.get("versions")
        if isinstance(versions, dict) and "barrier-diffusers" in versions:
            return True
        if {"judge", "model", "seeds", "rendering"} <= content.keys():  # ddpm_ext's
            return True
    if {"config", "test_accuracy", "per_label"} <= _json(folder / "metrics.json").keys():
        return True
    if {"lambda_interval", "targets"} <= _json(folder / "barrier_config.json").keys():
        return True
    if {"train_data_dir", "vae", "unet"} <= _json(folder / "training_config.json").keys():
        return True
    if any({"sampling", "prompts"} <= _json(path).keys() for path in folder.glob("images/*/*/manifest.json")):
        return True
    steps = list((folder / CHECKPOINTS).glob("step-*"))
    kinds = ("checkpoint.json", "random_states_0.pkl")
    return any((step / name).is_file() for step in steps for name in kinds)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _files(path: Path) -> Iterator[Path]:
    """A file, or all files of a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for folder, names, files in os.walk(path):
        yield from (Path(folder) / name for name in files)
        yield from (Path(folder) / name for name in names if (Path(folder) / name).is_symlink())


def _shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))
