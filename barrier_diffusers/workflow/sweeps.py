"""Run a sweep file through Optuna: many workers share one journal file, and a killed worker's trial is retried.

The journal is Optuna's storage for a folder that several machines share. Optuna's heartbeat belongs to its data base
storage, and SQLite's locks fail on network file systems, so a worker's sign of life is a file here, which it touches
every few seconds; what a worker left is queued again by Optuna's callback. Ages are differences of times that the file
system itself noted, so clocks of several machines need not agree. Who wants a trial takes the claim lock, so that no
two workers count or draw at once.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState

from barrier_diffusers.utils.checks import ABOVE_0, FILE, OUTPUT, SEED, at_least, check_settings, rules
from barrier_diffusers.utils.run_records import fingerprint
from barrier_diffusers.workflow.processes import Stopped
from barrier_diffusers.workflow.sweep_file import Sweep, encode
from barrier_diffusers.workflow.tracking import UnknownMetric, require_metric
from barrier_diffusers.workflow.workflow import HASH, Workflow, check_metric, parse_workflow, run_workflow

try:
    import optuna
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("a sweep needs optuna: pip install 'barrier-diffusers[sweep]'") from error


JOURNAL_NAME = "journal.log"


ALIVE = "alive"  # folder with a file per running trial


POLL_SECONDS = 2.0


MANY_TRIALS = 64


@dataclass(kw_only=True)
class SweepConfig:
    """One worker of a sweep. Start the same command as often as there are machines for it."""

    sweep: str  # YAML file in wandb's sweep format
    output_dir: str  # journal, table and plots, shared by all workers
    num_trials: int | None = None  # None: run_cap of the file, or all of a grid
    seed: int = 0  # of random and Bayesian draws
    grace_seconds: float = 120.0  # without a sign of life, after which a trial's worker counts as killed
    max_retries: int = 3  # of a trial whose worker was killed
    trade_off: list[str] | None = None  # two metrics of results.json, drawn against each other
    wandb: bool = False  # create the sweep on wandb's server, which then draws, and run its trials here
    wandb_sweep: str | None = None  # with wandb: no new sweep, but trials of this one, [ENTITY/PROJECT/]ID
    dry_run: bool = False  # only show the trials' command lines

    RULES = rules(
        sweep=FILE,
        output_dir=OUTPUT,
        num_trials=at_least(1),
        seed=SEED,
        grace_seconds=ABOVE_0,
        max_retries=at_least(0),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.trade_off is not None and len(self.trade_off) != 2:
            raise ValueError("trade_off must be two metrics, one for each axis")
        if self.wandb_sweep is not None and not self.wandb:
            raise ValueError("wandb_sweep is a sweep on wandb's server: set wandb")
        if self.wandb and self.trade_off is not None:
            raise ValueError("trade_off is drawn of trials in output_dir, but with wandb it is wandb that has them")


class EveryPoint(GridSampler):
    """A grid whose end the workers see for themselves, under the claim lock."""

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        """Nothing: optuna would stop a loop of its own here."""


def sampler_of(sweep: Sweep, seed: int, num_trials: int) -> BaseSampler:
    """A sampler for the next trial after `num_trials`; its draw depends on the seed and on the trials alone."""
    if sweep.method == "grid":
        return EveryPoint({p.name: [encode(value) for value in p.choices] for p in sweep.varied}, seed=seed)
    if sweep.method == "random":
        return RandomSampler(seed=seed + num_trials)
    return TPESampler(seed=seed + num_trials, constant_liar=True)


def check_sweep(sweep: Sweep, root: Path, axes: Sequence[str] = ()) -> list[Workflow]:
    """The workflows of all trials of a grid, or of one trial in the middle of every range, with all their checks.

    Of a grid of more than MANY_TRIALS, every value is tried once, beside the first values of the other parameters.

    Args:
        axes: metrics that are drawn against each other.

    Raises:
        ValueError: a trial that no workflow accepts, one without a folder of its own, or a metric that no trial has.
    """
    if sweep.method == "grid":
        points = sweep.grid()
        if len(points) > MANY_TRIALS:
            points = [points[0] | {p.name: value} for p in sweep.parameters for value in p.choices]
    else:
        middle = optuna.trial.FixedTrial({p.name: _middle(p.options) for p in sweep.varied})
        points = [{parameter.name: parameter.suggest(middle) for parameter in sweep.parameters}]
    if not any(HASH in word for word in sweep.words):
        raise ValueError(f"the trials would share a folder: give command --output_dir with {HASH} in it")
    workflows = []
    for point in points:
        try:
            workflows.append(parse_workflow(sweep.command_line(point), root))
        except Exception as error:
            raise ValueError(f"trial {' '.join(sweep.flags(point))}: {error}") from error
        check_metric(workflows[-1], sweep.metric, "metric")
        for name in axes:
            check_metric(workflows[-1], name, "trade_off")
    return workflows


def _middle(options: Mapping[str, Any]) -> Any:
    if "values" in options:
        return 0.0 if "probabilities" in options else encode(options["values"][0])
    return options.get("min", 0.5)


def retried(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the trials whose settings were queued again."""
    return {number for trial in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)[-1:]}


class Worker:
    """Takes trials of a sweep until none is left.

    Args:
        root: of the repository with the scripts, or the folder that holds the installed packages.

    Raises:
        ValueError: output_dir belongs to another sweep.
    """

    def __init__(self, config: SweepConfig, sweep: Sweep, root: Path):
        self.config, self.sweep, self.root = config, sweep, root
        self.output = Path(config.output_dir)
        self.wanted = config.num_trials or sweep.run_cap or 0
        if sweep.method == "grid":
            size = len(sweep.grid())
            self.wanted = min(self.wanted or size, size)
        if not self.wanted:
            raise ValueError(f"a {sweep.method} sweep has no end of its own: set num_trials, or run_cap in its file")
        (self.output / ALIVE).mkdir(parents=True, exist_ok=True)
        self.journal = self.output / JOURNAL_NAME
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._retry = RetryHeartbeatStaleTrialCallback(max_retry=config.max_retries)
        lock = JournalFileSymlinkLock(str(self.journal))
        with self._claim():
            self._mend_journal(lock)
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self.journal), lock)),
                study_name=sweep.name,
                direction=sweep.goal,
                load_if_exists=True,
            )
            content = {key: value for key, value in sweep.content.items() if key != "run_cap"}
            made_of = fingerprint(content, config.seed)
            if self.study.user_attrs.get("made_of", made_of) != made_of:
                raise ValueError(f"output_dir {config.output_dir!r} belongs to another sweep: name another folder")
            self.study.set_user_attr("made_of", made_of)

    @contextmanager
    def _claim(self) -> Iterator[None]:
        lock = JournalFileOpenLock(str(self.output / "claim"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _mend_journal(self, lock: JournalFileSymlinkLock) -> None:
        """Cut off the end of a line that a killed worker, or a full disk, left unfinished.

        Optuna reads past such an end, but the next writer would go on in the same line, which nobody can read then.

        Args:
            lock: of all who write to the journal, as a line that is being written is unfinished, too.
        """
        if not self.journal.is_file():
            return
        lock.acquire()
        try:
            content = self.journal.read_bytes()
            if content and not content.endswith(b"\n"):
                with self.journal.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
        finally:
            lock.release()

    def _alive(self, number: int) -> Path:
        return self.output / ALIVE / f"trial-{number}"

    def _dead(self) -> list[FrozenTrial]:
        """Running trials whose worker gave no sign of life for longer than the grace period."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        probe = self.output / ALIVE / ".now"
        probe.touch()
        now = probe.stat().st_mtime
        files = [(trial, self._alive(trial.number)) for trial in running]
        limit = self.config.grace_seconds
        return [trial for trial, path in files if not path.is_file() or now - path.stat().st_mtime > limit]

    def _give_back(self, trial: FrozenTrial, why: str) -> None:
        """End a trial that has no worker, and queue its settings again unless that was done too often."""
        if not self._queued_again(trial):  # else who did so was killed before the trial was ended
            self._retry(self.study, copy.deepcopy(trial))  # a copy, as it appends to a list of the trial
        self.study.tell(trial.number, state=TrialState.FAIL)
        print(f"trial {trial.number}: {why}" + ("; queued again" if self._queued_again(trial) else ""), flush=True)

    def _queued_again(self, trial: FrozenTrial) -> bool:
        return trial.number in retried(self.study.get_trials(deepcopy=False))

    def _taken(self) -> int:
        """Trials that count: all but those that were queued again."""
        trials = self.study.get_trials(deepcopy=False)
        waiting = {trial.number for trial in trials if trial.state == TrialState.WAITING}
        return len({trial.number for trial in trials} - retried(trials) - waiting)

    def next_trial(self) -> tuple[Trial, Workflow] | None:
        """A trial and its workflow; None if there is none to start now.

        Raises:
            ValueError: settings that no workflow accepts; the trial counts as failed.
        """
        with self._claim():
            for trial in self._dead():
                self._give_back(trial, "its worker was killed")
            if self._taken() >= self.wanted:
                return None
            self.study.sampler = sampler_of(self.sweep, self.config.seed, len(self.study.get_trials(deepcopy=False)))
            taken = self.study.ask()
            self._alive(taken.number).touch()
            settings = {
                parameter.name: parameter.suggest(taken, self.sweep.method == "grid")
                for parameter in self.sweep.parameters
            }
            taken.set_user_attr("settings", settings)
            try:
                workflow = parse_workflow(self.sweep.command_line(settings), self.root)
            except Exception:
                self._tell(taken, None, "no workflow accepts these settings")
                raise
            taken.set_user_attr("output_dir", str(workflow.output))
            return taken, workflow

    @property
    def others_run(self) -> bool:
        """Whether any trial is still running somewhere."""
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def run_trial(self, trial: Trial, workflow: Workflow) -> None:
        """Run one trial's workflow; one that fails is noted and not retried.

        Raises:
            Stopped: a signal came; the trial is queued again.
            UnknownMetric: the workflow has no such number.
        """
        print(f"trial {trial.number}: {' '.join(self.sweep.flags(trial.user_attrs['settings']))}", flush=True)
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(self._alive(trial.number), ended), daemon=True)
        beat.start()
        try:
            value = self._value(workflow)
        except Stopped as stopped:
            with self._claim():
                self._give_back(self.study.trials[trial.number], str(stopped))
            raise
        except UnknownMetric as error:
            self._tell(trial, None, str(error))
            raise  # no other trial has it either
        except (ValueError, OSError) as error:
            self._tell(trial, None, str(error))
            print(f"trial {trial.number}: failed, {error}", flush=True)
        else:
            self._tell(trial, value)
            print(f"trial {trial.number}: {self.sweep.metric} {value:.4g}", flush=True)
        finally:
            ended.set()
            beat.join()
            self._alive(trial.number).unlink(missing_ok=True)

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.config.grace_seconds / 5):
            path.touch()

    def _value(self, workflow: Workflow) -> float:
        results = run_workflow(workflow, wait_seconds=10 * self.config.grace_seconds)
        score = {"score": results["score"]} if "score" in results else {}
        return require_metric({**results["metrics"], **score}, self.sweep.metric)

    def _tell(self, trial: Trial, value: float | None, error: str = "") -> None:
        try:
            trial.set_user_attr("error", error)
            self.study.tell(trial, value, state=TrialState.FAIL if value is None else None)
        except (ValueError, RuntimeError):  # this worker was silent for too long, and another one has it now
            print(f"trial {trial.number}: was given to another worker meanwhile", flush=True)

    def run(self) -> None:
        """Trials until all are taken and none runs any more."""
        while True:
            claimed = self.next_trial()
            if claimed is not None:
                self.run_trial(*claimed)
            elif self.others_run:  # one of them may yet be killed
                time.sleep(min(POLL_SECONDS, self.config.grace_seconds / 2))
            else:
                return
