"""A workflow: one YAML file drives unlearn -> ... -> evaluate -> track, and only what changed runs again.

Its output_dir holds a folder per stage with the stage's result, `stages` with what each ran with and its record,
`logs` with what each printed, and results.json with all numbers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from barrier_diffusers.utils.checks import (
    ANY_NUMBER,
    FILE,
    FOLDER,
    OUTPUT,
    Checked,
    at_least,
    check_paths,
    check_settings,
    deferred_checks,
    flat,
    rules,
)
from barrier_diffusers.utils.command_line import (
    config_from,
    join_lists,
    list_fields,
    require_sections,
    sections_of,
    wants_help,
)
from barrier_diffusers.utils.files import require_writable, write_json
from barrier_diffusers.utils.help_page import Flag, Group, groups_of, help_page
from barrier_diffusers.utils.hub import will_be_made
from barrier_diffusers.utils.installation import resolve_named_files, shipped
from barrier_diffusers.utils.locks import FolderLock
from barrier_diffusers.utils.open_settings import class_with_open_sections, section_of
from barrier_diffusers.utils.overlaps import check_overlaps, expand_outputs, refuse_inside
from barrier_diffusers.workflow.definitions import WORKFLOWS
from barrier_diffusers.workflow.processes import Stopped, last_error, run_logged
from barrier_diffusers.workflow.stages import WITHOUT_EFFECT, Record, Stage, stage_inputs
from barrier_diffusers.workflow.tracking import RESULTS_NAME, TrackConfig, collect, publish

HASH = "{hash}"


TRAINED = ("train", "retrain", "unlearn")  # stages that more than one process may share


@dataclass(kw_only=True)
class LaunchConfig(Checked):
    """How the stages are started."""

    num_processes: int = 1  # of training; more than one, or a config_file: by `accelerate launch`
    config_file: str | None = None  # of `accelerate config`

    RULES = rules(num_processes=at_least(1), config_file=FILE)


@dataclass(kw_only=True)
class WorkflowConfig:
    """What holds for the whole workflow; each stage's settings are a section of its name beside it."""

    kind: Literal["sd", "ddpm", "classifier"]  # which scripts run one after another
    output_dir: str  # {hash} in it stands for a hash of all settings, so that no two runs of a sweep share a folder
    stages: list[str] | None = None  # of the kind; None: all
    eval_only: bool = False  # judge the unlearned result that is there, whatever the settings of the stages before
    unlearned_dir: str | None = None  # or that one, unlearned elsewhere
    dry_run: bool = False  # only say what would run, and why
    score: dict[str, float] = field(default_factory=dict)  # metric of results.json -> weight in `score`
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    RULES = rules(output_dir=OUTPUT, unlearned_dir=FOLDER, score=ANY_NUMBER)

    def __post_init__(self) -> None:
        check_settings(self)
        check_stages(self.kind, self.stages)


def check_stages(kind: str, stages: Sequence[str] | None) -> None:
    """A ValueError for a stage that the kind does not have, or an empty list."""
    if stages is None:
        return
    known = [stage.name for stage in WORKFLOWS[kind]]
    unknown = [str(name) for name in stages if name not in known]
    if not stages:
        raise ValueError(f"stages is empty: leave it out for all, or name some of {', '.join(known)}")
    if unknown:
        raise ValueError(f"unknown stage {', '.join(unknown)}; {kind!r} has {', '.join(known)}")


@dataclass
class Workflow:
    """A workflow whose settings are all known and checked."""

    config: WorkflowConfig
    stages: list[Stage]
    settings: dict[str, dict[str, Any]]  # stage -> its settings as given, `shared` ones resolved
    root: Path  # of the repository with the scripts, or the folder that holds the installed packages

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.config.output_dir)

    @property
    def unlearned(self) -> Path:
        """The folder with the unlearned model."""
        return Path(self.config.unlearned_dir or self.output / "unlearn")

    @property
    def names(self) -> list[str]:
        """The stages' names."""
        return [stage.name for stage in self.stages]

    def results(self) -> dict[str, Path]:
        """Name of a stage that leaves numbers -> the JSON file with them."""
        stages = [stage for stage in self.stages if stage.result]
        return {stage.name: self.output / stage.subfolder / str(stage.result) for stage in stages}

    @property
    def folders(self) -> list[Path]:
        """Those that the stages make."""
        return [self.output / stage.subfolder for stage in self.stages]

    def filled(self, stage: Stage) -> dict[str, Any]:
        """All settings of a stage, those that the workflow decides included."""
        given = self.settings[stage.section or stage.name]
        folders = {folder_of(name): str(self.output / name) for name in self.names}
        given = {name: folders.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
        return {**given, "output_dir": str(self.output / stage.subfolder), **stage.fill(self)}

    def record(self, stage: Stage) -> Record:
        """What is known of the stage's last run."""
        result = self.output / stage.subfolder / stage.part
        return Record(self.output / "stages" / f"{stage.name}.json", result, stage.keep)


def folder_of(stage: str) -> str:
    """The default of a setting that is another stage's folder."""
    return f"the folder of {stage}"


def default_of(source: str) -> str:
    """The default of a setting that is another stage's setting or folder."""
    stage, _, name = source.partition(".")
    return f"as {stage}" if name else folder_of(stage)


def _peek(arguments: Sequence[str], name: str) -> Any:
    """The value of a plain setting, before there is a parser that knows all of them."""
    found: Any = None
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word, value in zip(words, words[1:], strict=False):
        if word == "--config":
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(f"{value!r} is no YAML: {error}") from error
            if not isinstance(content, dict):
                raise ValueError(f"{value!r} holds no settings: expected is YAML of the form `name: value`")
            found = content.get(name, found)
        elif word == f"--{name}":
            found = yaml.safe_load(value)
    return found


def parse_workflow(arguments: list[str], root: Path) -> Workflow:
    """A workflow from `--config FILE.yaml` and dotted flags, every stage's settings checked.

    Raises:
        ArgumentError, ValueError: a setting that is unknown, missing, or not as its dataclass wants it.
    """
    arguments = resolve_named_files(arguments, shipped("train_scripts", root))
    if wants_help(arguments):
        print(workflow_help(arguments), end="")
        raise SystemExit(0)
    kind = _peek(arguments, "kind")
    if kind not in WORKFLOWS:
        given = "no kind is given" if kind is None else f"unknown kind {kind!r}"
        raise ValueError(f"{given}: set kind to one of {', '.join(WORKFLOWS)}")
    lists, parts = list_fields(WorkflowConfig), sections_of(WorkflowConfig)
    classes: dict[str, type] = {}  # section -> its class, own settings of the user's modules included
    for stage in WORKFLOWS[kind]:
        name = stage.section or stage.name
        known = join_lists(list_fields(stage.config_class, f"{name}."), arguments)
        classes[name] = class_with_open_sections(stage.config_class, section_of(known, name))
        lists |= list_fields(classes[name], f"{name}.")
        parts |= {name: classes[name], **sections_of(classes[name], f"{name}.")}
    arguments = join_lists(lists, arguments)
    require_sections(parts, arguments)
    chosen = _peek(arguments, "stages")
    check_stages(kind, chosen if isinstance(chosen, list) else None)
    stages = [stage for stage in WORKFLOWS[kind] if not isinstance(chosen, list) or stage.name in chosen]
    names = [stage.name for stage in stages]
    sections = [stage for stage in stages if stage.section in ("", stage.name) or stage.section not in names]
    parser = ArgumentParser(exit_on_error=False, description=WorkflowConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(WorkflowConfig)
    for stage in sections:
        section, shared = stage.section or stage.name, stage.takes(names)
        hints = get_type_hints(classes[section])
        parser.add_class_arguments(classes[section], section, instantiate=False, skip={*stage.filled, *shared})
        for name, source in shared.items():
            default = default_of(source)
            parser.add_argument(f"--{section}.{name}", type=Literal[default] | hints[name], default=default)
    unread = {stage.section or stage.name for stage in WORKFLOWS[kind]} - {
        stage.section or stage.name for stage in sections
    }
    for section in unread:  # of stages that are not chosen
        parser.add_argument(f"--{section}", type=dict)
    with deferred_checks():
        found = parser.parse_args(arguments)
    check_settings(found.as_dict(), WorkflowConfig)
    values = vars(parser.instantiate_classes(found))
    for name in ("config", *unread):
        del values[name]
    settings = {
        name: _plain(values.pop(name).as_dict()) for name in [stage.section or stage.name for stage in sections]
    }
    for stage in sorted(sections, key=lambda stage: stage.name != "unlearn"):  # whose settings others take over
        own = settings[stage.section or stage.name]
        for name, source in stage.takes(names).items():
            giver, _, given = source.partition(".")
            if given and own[name] == default_of(source):
                own[name] = settings[giver][given]
    config = WorkflowConfig(**values)
    digest = hashlib.sha256(json.dumps(_deciding(settings), sort_keys=True, default=str).encode()).hexdigest()
    config.output_dir = config.output_dir.replace(HASH, digest[:12])
    expand_outputs(config)
    workflow = Workflow(config, stages, settings, root)
    check_overlaps(config, made=workflow.folders)
    for stage in stages:
        _check(workflow, stage)
    for metric in config.score:
        if metric.partition(".")[0] in names:
            check_metric(workflow, metric, "score")
    return workflow


def _plain(value: Any) -> Any:
    """Nested mappings, defaults that are dataclasses included."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def _deciding(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{stage}.{name}": value
        for stage, values in settings.items()
        for name, value in flat({name: value for name, value in values.items() if name not in WITHOUT_EFFECT})
    }


def _check(workflow: Workflow, stage: Stage) -> None:
    """Build the stage's settings, without what earlier stages have yet to make."""
    values = {name: value for name, value in workflow.filled(stage).items() if name not in stage.late}
    try:
        checked = config_from(stage.config_class, values)
        refuse_inside(checked, workflow.output, made=workflow.folders)
    except ValueError as error:
        raise ValueError(f"{stage.name}: {error}") from error


def command_of(workflow: Workflow, stage: Stage, settings: Path) -> list[str]:
    """The words that start a stage."""
    launch, script = workflow.config.launch, str(shipped(stage.script, workflow.root))
    start = [sys.executable]
    if stage.name in TRAINED and (launch.num_processes > 1 or launch.config_file):
        start += ["-m", "accelerate.commands.launch", "--num_processes", str(launch.num_processes)]
        start += ["--multi_gpu"] if launch.num_processes > 1 and launch.config_file is None else []
        start += ["--config_file", launch.config_file] if launch.config_file else []
    return [*start, script, "--config", str(settings)]


def claim_workflow_dir(workflow: Workflow) -> None:
    """Create the output folder, or make sure that a workflow left what is there.

    Raises:
        ValueError: it is not writable, or holds other files.
    """
    require_writable(workflow.config.output_dir)
    names = {path.name for path in workflow.output.iterdir()} - {".lock", "cache", "logs"}
    if names and not (workflow.output / "stages").is_dir():
        raise ValueError(f"output_dir {workflow.config.output_dir!r} holds other files: name another folder")
    for stage in workflow.stages:
        workflow.record(stage).check_owner()


def run_stage(workflow: Workflow, stage: Stage, lock: FolderLock) -> None:
    """Run a stage unless its result still holds.

    Raises:
        ValueError: the script failed; its one line and where the rest is.
        Stopped: a signal ended it.
    """
    output, record = workflow.output, workflow.record(stage)
    values = workflow.filled(stage)
    config_from(stage.config_class, values)  # now that the stages before have ended
    inputs = stage_inputs(stage, values, workflow.root)
    reason = record.reason_to_run(inputs)
    if reason is None:
        print(f"{stage.name}: complete, nothing that it depends on has changed")
        return
    log, settings = output / "logs" / f"{stage.name}.log", output / "stages" / f"{stage.name}-settings.json"
    print(f"{stage.name}: {reason}; runs now, log {log}", flush=True)
    names = {known.name for known in fields(stage.config_class)}
    if record.begin(inputs) and "resume_from_checkpoint" in names:
        values["resume_from_checkpoint"] = "latest"
    if "overwrite_output_dir" in names:  # it is the workflow's own
        values["overwrite_output_dir"] = True
    write_json(settings, values)
    start = time.monotonic()
    paths = [str(workflow.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    status = run_logged(command_of(workflow, stage, settings), log, lock.handle, environment)
    if status:
        raise ValueError(f"stage {stage.name} failed (exit status {status}): {last_error(log)}; log {log}")
    seconds = time.monotonic() - start
    changed = record.end(stage_inputs(stage, workflow.filled(stage), workflow.root), seconds)
    if changed:
        print(f"warning: {'; '.join(changed[:3])} while {stage.name} ran; the next run does it again", file=sys.stderr)
    print(f"{stage.name}: done in {seconds:.0f} seconds", flush=True)


def workflow_help(arguments: Sequence[str]) -> str:
    """The help page: the workflow's own settings and, if a kind is given, those of its stages."""
    try:
        kind = _peek(arguments, "kind")
    except (OSError, ValueError):
        kind = None
    groups = groups_of(WorkflowConfig)
    for stage in WORKFLOWS.get(str(kind), ()):
        name = stage.section or stage.name
        if name == stage.name:
            groups.append(Group(f"Settings of {stage.script}", groups_flags(stage), f"{name}."))
    kinds = [f"{name}: {', '.join(stage.name for stage in stages)}" for name, stages in WORKFLOWS.items()]
    about = (
        "Run a whole workflow; only what changed runs again. Each stage's settings are a section of its name, as "
        f"--unlearn.learning_rate 1e-5; with --kind or --config this page lists them. Kinds: {'; '.join(kinds)}."
    )
    return help_page("run_pipeline.py", about, groups, "--help-all" in arguments)


def groups_flags(stage: Stage) -> list[Flag]:
    """The flags of a stage's section: without what the workflow fills in."""
    prefix = f"{stage.section or stage.name}."
    groups = groups_of(stage.config_class, prefix, skip=tuple(stage.filled))
    return [flag for group in groups for flag in group.flags]


def check_inputs(workflow: Workflow) -> None:
    """Look at what the stages' settings name, before the first of them runs.

    Raises:
        ValueError: a path that is not there, a folder that cannot be made, or what a stage's settings refuse.
    """
    made = [workflow.output, *([Path(workflow.config.unlearned_dir)] if workflow.config.unlearned_dir else [])]
    check_paths(workflow.config)
    for stage in stages_to_run(workflow):
        if not stage.needed(workflow):
            continue
        values = {name: value for name, value in workflow.filled(stage).items() if name not in stage.late}
        try:
            check_paths(values, stage.config_class, made)
            config = config_from(stage.config_class, values)
            if hasattr(config, "check_inputs"):
                with will_be_made(made):
                    config.check_inputs()
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from error


def check_metric(workflow: Workflow, name: str, setting: str) -> None:
    """Refuse a metric that no run of the workflow gives.

    Args:
        setting: which one names it.

    Raises:
        ValueError: `score` without weights, a stage that was not chosen, or a name that the stage does not have.
    """
    stage, _, metric = name.partition(".")
    chosen = {stage.name: stage for stage in workflow.stages if stage.result}
    if name == "score":
        if not workflow.config.score:
            raise ValueError(f"{setting} is score, but the workflow has no weights in its setting score")
    elif stage not in chosen:
        raise ValueError(f"{setting} {name!r} is no number of a stage; those with numbers are {', '.join(chosen)}")
    elif not any(fnmatchcase(metric, known) for known in chosen[stage].metrics):
        near = difflib.get_close_matches(metric, chosen[stage].metrics, 4, 0.3)
        raise ValueError(f"{setting} {name!r} is none that {stage} gives; the nearest are {', '.join(near)}")


def stages_to_run(workflow: Workflow) -> list[Stage]:
    """All stages, or those after `unlearn` where the unlearned result is given.

    Raises:
        ValueError: `eval_only` without an unlearned result.
    """
    config = workflow.config
    if not (config.eval_only or config.unlearned_dir):
        return workflow.stages
    position = workflow.names.index("unlearn") if "unlearn" in workflow.names else -1
    needs_it = position >= 0 and config.unlearned_dir is None and workflow.stages[position].needed(workflow)
    if needs_it and not workflow.record(workflow.stages[position]).complete:
        raise ValueError(f"eval_only, but there is no complete {str(workflow.unlearned)!r}: set unlearned_dir")
    return workflow.stages[position + 1 :]


def run_workflow(workflow: Workflow, wait_seconds: float = 0) -> dict[str, Any]:
    """Run what has to run; the content of results.json.

    Args:
        wait_seconds: how long to wait for another process in the same folder.

    Raises:
        ValueError: an unusable output folder, or a stage that failed.
        Stopped: a signal came; the same command goes on.
    """
    stages = stages_to_run(workflow)
    if workflow.config.dry_run:
        for stage in (stage for stage in stages if stage.needed(workflow)):
            inputs = stage_inputs(stage, workflow.filled(stage), workflow.root)
            why = workflow.record(stage).reason_to_run(inputs) or "complete, would not run"
            settings = workflow.output / "stages" / f"{stage.name}-settings.json"
            print(f"{stage.name}: {why}\n  {' '.join(command_of(workflow, stage, settings))}")
        return {}
    check_inputs(workflow)
    claim_workflow_dir(workflow)
    (workflow.output / "stages").mkdir(exist_ok=True)
    with FolderLock(workflow.output, wait_seconds) as lock:
        for stage in (stage for stage in stages if stage.needed(workflow)):
            run_stage(workflow, stage, lock)
        results = collect(workflow.results(), workflow.config.score)
        before = workflow.output / RESULTS_NAME
        if not before.is_file() or json.loads(before.read_text(encoding="utf-8")) != results:
            publish(workflow.config.track, workflow.output, workflow.settings, results, workflow.results())
            write_json(before, results)
    return results


def stop_message(stopped: Stopped) -> int:
    """Say that the same command goes on; the exit status."""
    print(f"{stopped}: the same command goes on from here", file=sys.stderr)
    return 128 + signal.Signals(stopped.number)
