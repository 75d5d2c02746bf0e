"""What a stage of a workflow depends on, as hashes, and the record that says whether its result still holds.

A stage is one script of the repository. It depends on its settings (instead of a path the content found there), on
the source of the package and of the script, and on the versions of the libraries; times and folders count for nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barrier_diffusers.utils.checks import PathRule, flat, settings_of
from barrier_diffusers.utils.files import file_hash, write_json
from barrier_diffusers.utils.installation import shipped
from barrier_diffusers.utils.open_settings import class_with_open_sections
from barrier_diffusers.utils.run_records import package_versions

SKIPPED = ("cache", "logs", "checkpoints")  # folders at the top of a result that are no part of it


WITHOUT_EFFECT = frozenset(  # settings that change no number of a result
    ("output_dir", "cache_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to")
    + (
        "checkpointing_steps",
        "checkpoints_total_limit",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "report_artifact",
    )
)


_known: dict[tuple[str, int, int], str] = {}  # (path, size, time of change) -> SHA-256 of a file read before


@dataclass(frozen=True)
class Stage:
    """One script, and how the workflow fills its settings."""

    name: str
    script: str  # path in the repository
    settings: str  # "module:class" of its dataclass
    result: str | None = None  # JSON file in its output folder with its numbers
    metrics: tuple[str, ...] = ()  # names of these numbers, * for labels and the like: what a sweep may ask for
    filled: frozenset[str] = frozenset(("output_dir",))  # settings that the workflow decides
    fill: Callable[[Any], dict[str, Any]] = field(default=lambda plan: {})  # the values of all but output_dir
    # setting -> "STAGE.SETTING" whose value it has, or "STAGE" whose folder it is, unless it is given one of its own
    shared: Mapping[str, str] = field(default_factory=dict)
    late: tuple[
        str, ...
    ] = ()  # filled settings that its dataclass looks up, so that they cannot be checked in advance
    needed: Callable[[Any], bool] = field(default=lambda plan: True)  # whether there is anything to do at all
    section: str = ""  # of the workflow's file with its settings; default: one of its name
    folder: str = ""  # its output_dir in the workflow's; default: one of its name
    part: str = ""  # folder in output_dir that is its result; default: all of it
    keep: tuple[str, ...] = ()  # names in output_dir that a new start leaves, as they are another stage's
    ignored: tuple[str, ...] = ()  # settings, or beginnings of their dotted names, that its result does not depend on

    @property
    def subfolder(self) -> str:
        """Its output_dir in the workflow's."""
        return self.folder or self.name

    def takes(self, stages: Sequence[str]) -> dict[str, str]:
        """What of `shared` the chosen stages can give; the other settings are ordinary ones."""
        return {name: source for name, source in self.shared.items() if source.partition(".")[0] in stages}

    @property
    def config_class(self) -> type:
        """The dataclass of the script's settings."""
        module, name = self.settings.split(":")
        return getattr(importlib.import_module(module), name)


def content_hash(path: Path, without: Sequence[str] = ()) -> str:
    """SHA-256 of a file, or of all names and files of a folder but hidden ones; links are followed.

    A file is not read again while its size and time of change stay the same.

    Args:
        without: names at the top of the folder that do not count.
    """
    if path.is_file():
        status = path.stat()
        key = str(path.resolve()), status.st_size, status.st_mtime_ns
        if key not in _known:
            _known[key] = file_hash(path)
        return _known[key]
    digest, seen = hashlib.sha256(), set[str]()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real, top = os.path.realpath(folder), Path(folder) == path
        kept = [name for name in subfolders if not (name.startswith(".") or top and name in without)]
        subfolders[:] = sorted(kept) if real not in seen else []  # a link may lead to a folder above
        seen.add(real)
        for name in sorted(names):
            file = Path(folder, name)
            if not (name.startswith(".") or top and name in without) and file.is_file():
                digest.update(f"{file.relative_to(path).as_posix()} {content_hash(file)}\n".encode())
    return digest.hexdigest()


def code_hash(root: Path, script: str) -> str:
    """SHA-256 of the package's sources, the script and what lies beside a script of an extension."""
    folders = [root / "barrier_diffusers"]
    if not script.startswith("train_scripts/"):
        folders.append(shipped(script, root).parent)
    files = {path for folder in folders for path in folder.rglob("*.py")} | {shipped(script, root)}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)} {content_hash(path)}\n".encode())
    return digest.hexdigest()


def _by_content(value: Any, rule: PathRule) -> Any:
    """What lies at the path that a setting names; the setting where it names something of the hub, or nothing."""
    if isinstance(value, list):
        return [_by_content(item, rule) for item in value]
    path = rule.path_in(value) if isinstance(value, str) and value else None
    return f"content {content_hash(path)}" if path is not None and path.exists() else value


def stage_inputs(stage: Stage, settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Everything the result depends on: {"settings": by dotted name, "code": hash, "versions": of libraries}."""
    known = class_with_open_sections(stage.config_class, settings)
    paths = {name: rule for name, _, rule in settings_of(known, settings) if isinstance(rule, PathRule)}
    deciding = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    resolved = {
        name: _by_content(value, paths[name]) if name in paths else value
        for name, value in flat(deciding)
        if not name.startswith(stage.ignored)
    }
    versions = package_versions()
    code = code_hash(root, stage.script)
    return json.loads(json.dumps({"settings": resolved, "code": code, "versions": versions}, default=str))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `stage_inputs`, in words."""
    then, today = dict(flat(before)), dict(flat(now))
    found = []
    for name in sorted(then.keys() | today.keys()):
        old, new = then.get(name, "absent"), today.get(name, "absent")
        if old != new:
            short = name.removeprefix("settings.")
            hashed = name == "code" or any(str(value).startswith("content ") for value in (old, new))
            found.append(f"{short} changed" if hashed else f"{short} was {old!r} and is {new!r}")
    return found


class Record:
    """The file that says what a stage's result was made from.

    Args:
        path: of the JSON file.
        folder: of the stage's result.
        keep: names in the folder that are another stage's.
    """

    def __init__(self, path: Path, folder: Path, keep: Sequence[str] = ()):
        self.path, self.folder, self.keep = path, folder, keep
        self.content: dict[str, Any] = {}
        if path.is_file():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{str(path)!r} is damaged: delete it, and the stage runs again") from error

    @property
    def complete(self) -> bool:
        """Whether the stage has ended well and its result is as it left it."""
        return bool(self.content.get("complete")) and self.content["output"] == content_hash(
            self.folder, (*SKIPPED, *self.keep)
        )

    def check_owner(self) -> None:
        """Refuse a folder that no workflow made.

        Raises:
            ValueError: there are files in it, but no record of the stage.
        """
        if not self.content and self._own():
            raise ValueError(f"{str(self.folder)!r} holds files that no workflow left there: name another output_dir")

    def _output(self) -> str:
        return content_hash(self.folder, (*SKIPPED, *self.keep))

    def _own(self) -> list[Path]:
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in paths if path.name not in self.keep]

    def reason_to_run(self, inputs: Mapping[str, Any]) -> str | None:
        """Why the stage has to run; None if its result holds."""
        if not self.content:
            return "not run before"
        changed = differences(self.content["inputs"], inputs)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return "; ".join(changed[:3]) + more
        if not self.content.get("complete"):
            return "stopped before its end"
        return None if self.complete else "its result is gone or changed"

    def begin(self, inputs: Mapping[str, Any]) -> bool:
        """Note the start; True if an earlier start with the same inputs left a checkpoint to go on from.

        Nothing is deleted: the stage's script knows which files of its folder are its own (utils/output_folder.py).

        Raises:
            WriteError: see `write_json`.
        """
        same = self.content.get("inputs") == inputs and not self.content.get("complete")
        begun = self.content.get("begun", 0.0) if same else time.time()
        self.content = {"inputs": dict(inputs), "complete": False, "begun": begun}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)
        # a failed start may have brought an earlier result back, with that one's checkpoints
        return same and any(step.stat().st_mtime >= begun for step in self.folder.glob("checkpoints/step-*"))

    def end(self, inputs: Mapping[str, Any], seconds: float) -> list[str]:
        """Note the end. What changed while the stage ran, in words: the next run will find it, and do the stage again.

        Args:
            inputs: of the stage as they are now.
        """
        self.content = {**self.content, "complete": True, "output": self._output(), "seconds": round(seconds, 1)}
        write_json(self.path, self.content)
        return differences(self.content["inputs"], inputs)
