"""Workers of a sweep: they share trials, a killed one's trial is retried, and the end is a table and two plots."""

import csv
import multiprocessing
import os
import signal
import time
from pathlib import Path

import light_stages
import optuna
import pytest
import yaml
from light_stages import wait_for
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState
from PIL import Image

from barrier_diffusers.scripts import sweep as sweep_script
from barrier_diffusers.workflow.processes import Stopped
from barrier_diffusers.workflow.sweep_file import read_sweep
from barrier_diffusers.workflow.sweep_report import fanova, report
from barrier_diffusers.workflow.sweeps import SweepConfig, Worker, check_sweep, retried
from barrier_diffusers.workflow.tracking import UnknownMetric
from barrier_diffusers.workflow.workflow import stop_message

AXES = ["evaluate.classes.unlearning_accuracy", "evaluate.classes.retain_accuracy_drop"]
pytestmark = pytest.mark.usefixtures("own_workflows")
RATE, BONUS = "unlearn.learning_rate", "evaluate.bonus"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that writes a sweep of the light pipeline: (configuration, sweep, root)."""
    root = light_stages.install(tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHT_TRACE", str(tmp_path / "trace"))
    (tmp_path / "trace").write_text("")
    (tmp_path / "pipeline.yaml").write_text("kind: sd\noutput_dir: out\ntrack: {report_to: none}\n")

    def make(parameters=None, words=(), settings=None, **changes):
        parameters = parameters or {RATE: {"values": [0.5, 2.0]}, BONUS: {"values": [0, 1]}}
        command = ["${env}", "${program}", "--config", "pipeline.yaml", "--unlearn.concept=bag", *words]
        content = {
            "program": "train_scripts/run_pipeline.py",
            "method": "grid",
            "metric": {"name": AXES[0], "goal": "maximize"},
            "parameters": parameters,
            "command": [*command, "--output_dir=trials/{hash}", "${args}"],
            **changes,
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        options = {"grace_seconds": 3.0, "trade_off": AXES, **(settings or {})}
        return SweepConfig(sweep="sweep.yaml", output_dir="sweep", **options), read_sweep("sweep.yaml"), root

    return make


def work(config, sweep, root):
    worker = Worker(config, sweep, root)
    try:
        worker.run()
    except Stopped as stopped:
        raise SystemExit(stop_message(stopped)) from None
    return worker


def in_process(*arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def ran(name="unlearn"):
    return [line for line in Path("trace").read_text().splitlines() if line.startswith(name)]


def states(worker):
    return [trial.state.name for trial in worker.study.get_trials()]


def test_four_trials_two_workers_one_killed_four_results_and_plots(sweep):
    config, plan, root = sweep(words=["--unlearn.sleep=2"])
    check_sweep(plan, root)
    first = in_process(config, plan, root)
    wait_for(lambda: "pid" in Path("trace").read_text())
    second = in_process(config, plan, root)
    wait_for(lambda: Path("trace").read_text().count("pid") == 2)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(120)
    assert first.exitcode == -signal.SIGKILL and second.exitcode == 0
    worker = Worker(config, plan, root)
    trials = worker.study.get_trials()
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(trials) == 5 and len(done) == 4 and retried(trials) == {0}
    points = [trial.user_attrs["settings"] for trial in done]
    assert {(point[RATE], point[BONUS]) for point in points} == {(0.5, 0), (0.5, 1), (2.0, 0), (2.0, 1)}
    assert [line.split()[-1] for line in ran()].count("latest") == 1  # the retried trial went on from its checkpoint

    rows = report(worker.study, plan, AXES, worker.output)
    assert [row[AXES[0]] for row in rows] == [21.0, 20.0, 6.0, 5.0] and rows[0][AXES[1]] == 2.0
    with Path("sweep/results.csv").open() as file:
        assert [float(row[AXES[0]]) for row in csv.DictReader(file)] == [21.0, 20.0, 6.0, 5.0]
    assert Path("sweep/results.md").read_text().count("\n") == 6
    for name in ("importances.png", "trade_off.png"):
        assert min(Image.open(f"sweep/{name}").size) > 200
    importances = optuna.importance.get_param_importances(worker.study, evaluator=fanova())
    assert importances[RATE] > importances[BONUS]

    again = len(ran("evaluate"))
    worker.run()  # nothing is left to do
    assert len(worker.study.get_trials()) == 5 and len(ran("evaluate")) == again


def test_finished_trials_of_a_longer_sweep_are_not_run_again(sweep):
    config, plan, root = sweep(settings={"num_trials": 2})
    work(config, plan, root)
    config.num_trials = None
    assert states(work(config, plan, root)) == ["COMPLETE"] * 4 and len(ran()) == 4


def test_a_failed_trial_is_noted_and_not_retried(sweep, capsys):
    config, plan, root = sweep({RATE: {"values": [-1.0, 1.0]}})
    worker = work(config, plan, root)
    assert sorted(states(worker)) == ["COMPLETE", "FAIL"] and len(ran()) == 2
    rows = report(worker.study, plan, AXES, worker.output)
    assert "the learning rate is below 0" in rows[1]["error"] and rows[1][AXES[0]] is None
    assert "no importances: 1 complete trials" in capsys.readouterr().out


def test_a_stopped_worker_gives_its_trial_back_at_once(sweep):
    config, plan, root = sweep(
        {RATE: {"values": [1.0]}}, words=["--unlearn.sleep=60"], settings={"grace_seconds": 60.0}
    )
    process = in_process(config, plan, root)
    wait_for(lambda: "pid" in Path("trace").read_text())
    process.terminate()
    process.join(20)
    assert process.exitcode == 143
    worker = Worker(config, plan, root)
    assert states(worker) == ["FAIL", "WAITING"]
    worker.run()
    assert states(worker) == ["FAIL", "COMPLETE"]


def test_a_trial_that_kills_its_workers_is_given_up(sweep):
    config, plan, root = sweep({RATE: {"values": [1.0]}}, settings={"max_retries": 1, "grace_seconds": 0.2})
    for _ in range(2):
        taken = Worker(config, plan, root).next_trial()
        assert taken is not None
        time.sleep(0.5)
    worker = work(config, plan, root)
    assert states(worker) == ["FAIL", "FAIL"] and not ran()
    assert report(worker.study, plan, AXES, worker.output)[0]["error"] == "killed too often"


def test_a_trial_whose_workers_are_killed_twice_comes_to_its_end(sweep):
    config, plan, root = sweep({RATE: {"values": [1.0]}}, settings={"max_retries": 2, "grace_seconds": 0.2})
    for _ in range(2):
        assert Worker(config, plan, root).next_trial() is not None
        time.sleep(0.5)
    worker = work(config, plan, root)
    assert states(worker) == ["FAIL", "FAIL", "COMPLETE"] and len(ran()) == 1
    assert retried(worker.study.get_trials()) == {0, 1}
    assert [row[AXES[0]] for row in report(worker.study, plan, AXES, worker.output)] == [10.0]


def test_an_unfinished_line_that_somebody_still_writes_is_left_alone(sweep):
    config, plan, root = sweep({RATE: {"values": [1.0]}})
    journal = Worker(config, plan, root).journal
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    with journal.open("a") as file:
        file.write('{"op_code"')
        file.flush()
        other = in_process(config, plan, root)
        time.sleep(1)
        file.write(':4,"worker_id":"w","trial_id":0,"user_attr":{}}\n')
    lock.release()
    other.join(60)
    assert other.exitcode is not None and '"worker_id":"w","trial_id":0' in journal.read_text()


def test_a_living_worker_keeps_its_trial(sweep):
    config, plan, root = sweep({RATE: {"values": [1.0]}})
    worker, other = Worker(config, plan, root), Worker(config, plan, root)
    assert worker.next_trial() is not None
    assert other.next_trial() is None and other.others_run


def test_what_was_given_away_is_not_told_twice(sweep, capsys):
    config, plan, root = sweep({RATE: {"values": [1.0]}}, settings={"grace_seconds": 0.2})
    slow = Worker(config, plan, root)
    trial, pipeline = slow.next_trial()
    time.sleep(0.5)
    work(config, plan, root)
    slow.run_trial(trial, pipeline)
    assert "was given to another worker meanwhile" in capsys.readouterr().out
    assert states(slow) == ["FAIL", "COMPLETE"] and len(ran()) == 1  # and the pipeline found its stages complete


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_random_and_bayes(method, sweep):
    space = {RATE: {"distribution": "log_uniform_values", "min": 1.0e-3, "max": 10.0}, BONUS: {"min": 0, "max": 3}}
    config, plan, root = sweep(space, method=method, run_cap=6)
    trials = work(config, plan, root).study.get_trials()
    rates = [trial.user_attrs["settings"][RATE] for trial in trials]
    assert len(set(rates)) == 6 and all(1e-3 <= rate <= 10 for rate in rates)
    assert {trial.user_attrs["settings"][BONUS] for trial in trials} <= {0, 1, 2, 3}
    assert max(trials, key=lambda trial: trial.value).value == pytest.approx(
        max(10 * trial.user_attrs["settings"][RATE] + trial.user_attrs["settings"][BONUS] for trial in trials)
    )
    config.output_dir = "again"
    again = work(config, plan, root).study.get_trials()
    assert [trial.user_attrs["settings"] for trial in again] == [trial.user_attrs["settings"] for trial in trials]
    with pytest.raises(ValueError, match=f"a {method} sweep has no end of its own"):
        Worker(config, sweep(space, method=method)[1], root)


def test_a_line_that_was_cut_off_is_mended(sweep):
    config, plan, root = sweep()
    work(config, plan, root)
    with Path("sweep/journal.log").open("a") as file:
        file.write('{"op_code": 8, "worker')
    assert states(work(config, plan, root)) == ["COMPLETE"] * 4


BAD = {
    "misspelled metric": (
        None,
        {"metric": {"name": "evaluate.classes.unlearning_acuracy"}},
        "metric 'evaluate.classes.unlearning_acuracy' is none that evaluate gives; the nearest are classes",
    ),
    "metric of no stage": (None, {"metric": {"name": "judge.loss"}}, "those with numbers are unlearn, evaluate"),
    "no weights": (None, {"metric": {"name": "score"}}, "metric is score, but the workflow has no weights"),
    "unknown setting": ({"unlearn.rate": {"values": [1]}}, {}, "trial --unlearn.rate=1"),
    "bad value": ({RATE: {"values": ["fast"]}}, {}, "trial --unlearn.learning_rate=fast"),
    "one folder for all": (
        None,
        {"command": ["${program}", "--config", "pipeline.yaml", "${args}"]},
        "share a folder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_trials_are_found_before_any_runs(name, sweep):
    parameters, changes, message = BAD[name]
    _, plan, root = sweep(parameters, **changes)
    with pytest.raises(ValueError, match=message):
        check_sweep(plan, root)


def test_a_misspelled_axis_is_found_before_any_trial_runs(sweep):
    _, plan, root = sweep()
    with pytest.raises(ValueError, match="trade_off 'unlearn.los' is none that unlearn gives; the nearest are loss"):
        check_sweep(plan, root, ["unlearn.los", AXES[1]])


def test_a_metric_that_the_first_trial_does_not_give_ends_the_sweep(sweep):
    config, plan, root = sweep(metric={"name": "evaluate.attacks.benign.post.value"})
    check_sweep(plan, root)
    with pytest.raises(UnknownMetric, match="gave no 'evaluate.attacks.benign.post.value'"):
        work(config, plan, root)
    assert len(ran()) == 1


def test_a_sweep_without_any_result_is_an_error(sweep, monkeypatch):
    config, _, root = sweep({RATE: {"values": [-1.0, -2.0]}})
    monkeypatch.setattr(sweep_script, "ROOT", root)
    with pytest.raises(ValueError, match="all 2 trials failed: stage unlearn failed"):
        sweep_script.main(config)


def test_another_sweep_is_refused(sweep):
    config, plan, root = sweep()
    Worker(config, plan, root)
    other = sweep({RATE: {"values": [5.0]}})[1]
    with pytest.raises(ValueError, match="belongs to another sweep"):
        Worker(config, other, root)
