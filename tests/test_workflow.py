"""Pipelines: what runs, what is left alone, what happens when a stage fails or is killed."""

import json
import multiprocessing
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import light_stages
import pytest
from light_stages import CONFIGS, enter_repository, wait_for
from registries import registries_kept
from short_runs import ROOT

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.utils.command_line import config_from, run_script
from barrier_diffusers.utils.locks import FolderLock
from barrier_diffusers.workflow.definitions import WORKFLOWS
from barrier_diffusers.workflow.processes import Stopped
from barrier_diffusers.workflow.settings import chosen_objective
from barrier_diffusers.workflow.stages import stage_inputs
from barrier_diffusers.workflow.workflow import command_of, parse_workflow, run_workflow, stop_message

pytestmark = pytest.mark.usefixtures("own_workflows")
SCORE = {"evaluate.classes.unlearning_accuracy": 1, "evaluate.classes.retain_accuracy_drop": -1}


@pytest.fixture
def light(tmp_path, monkeypatch):
    """A function that runs the light pipeline with other settings, and says which stages ran."""
    root = light_stages.install(tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text("kind: sd\noutput_dir: out\ntrack: {report_to: none}\n")
    trace = tmp_path / "trace"
    monkeypatch.setenv("LIGHT_TRACE", str(trace))

    def run(**changes):
        trace.write_text("")
        words = ["--config", "pipeline.yaml", "--unlearn.concept=bag", f"--score={json.dumps(SCORE)}"]
        words += [f"--{name}={value}" for name, value in changes.items()]
        results = run_workflow(parse_workflow(words, root))
        return results, [line.split()[0] for line in trace.read_text().splitlines()]

    run.trace, run.root = trace, root
    return run


def test_all_stages_run_once(light, tmp_path, capsys):
    results, ran = light()
    assert ran == ["unlearn", "evaluate"]
    numbers = {
        "unlearn.loss": 1,
        "evaluate.classes.unlearning_accuracy": 10,
        "evaluate.classes.retain_accuracy_drop": 1,
    }
    assert results == {"score": 9, "metrics": {**numbers, "evaluate.attacks.inversion.post.value": 3}}
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    capsys.readouterr()
    assert light() == (results, [])
    assert capsys.readouterr().out.count("complete, nothing that it depends on has changed") == 2


CHANGES = {
    "learning rate": ({"unlearn.learning_rate": 2e-5}, ["unlearn", "evaluate"]),
    "evaluation": ({"evaluate.bonus": 1}, ["evaluate"]),
    "shared setting": ({"unlearn.concept": "boot"}, ["unlearn", "evaluate"]),
    "own value of a shared one": ({"evaluate.concept": "boot"}, ["evaluate"]),
    "tracker of a stage": ({"unlearn.report_to": "tensorboard"}, []),
    "score": ({"score": '{"unlearn.loss": 2}'}, []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_changed_setting_runs_again(name, light):
    changes, wanted = CHANGES[name]
    light()
    assert light(**changes)[1] == wanted


def test_changed_data_code_and_results_run_again(light, tmp_path):
    data, script = tmp_path / "data", light.root / "train_scripts/judge.py"
    data.mkdir()
    (data / "a.txt").write_text("a")
    assert light(**{"unlearn.data": "data"})[1] == ["unlearn", "evaluate"]
    data.rename(tmp_path / "elsewhere")  # the content counts, not the place
    assert light(**{"unlearn.data": "elsewhere"})[1] == []
    (tmp_path / "elsewhere/a.txt").write_text("b")
    assert light(**{"unlearn.data": "elsewhere"})[1][0] == "unlearn"
    script.write_text(script.read_text() + "# changed\n")
    assert light(**{"unlearn.data": "elsewhere"})[1] == ["evaluate"]
    (tmp_path / "out/unlearn/weights").write_text("7")
    assert light(**{"unlearn.data": "elsewhere"})[1] == ["unlearn"]  # evaluated weights are back as they were
    (tmp_path / "out").rename(tmp_path / "moved")
    assert light(**{"unlearn.data": "elsewhere", "output_dir": "moved"})[1] == []


def test_inputs_count_wholly(light, tmp_path):
    def ran():
        return light(**{"unlearn.data": "data"})[1] != []

    (tmp_path / "data/inner/logs/cache").mkdir(parents=True)
    (tmp_path / "other/deep").mkdir(parents=True)
    (tmp_path / "data/link").symlink_to(tmp_path / "other")
    files = ["data/a.txt", "data/inner/logs/b.txt", "data/inner/logs/cache/c.txt", "other/deep/d.txt"]
    for name in files:
        (tmp_path / name).write_text("1")
    assert ran() and not ran()
    for name in files:
        (tmp_path / name).write_text("22")
        assert ran() and not ran(), name
    (tmp_path / "other/up").symlink_to(tmp_path / "data")  # a circle
    assert ran() and not ran()


def test_a_folder_that_is_called_like_a_setting_is_no_input(light, tmp_path):
    for name in ("bag", "none"):
        (tmp_path / name).mkdir()
    assert light()[1] == ["unlearn", "evaluate"]
    for name in ("bag", "none"):
        (tmp_path / name / "new.txt").write_text("1")
    assert light()[1] == []


def test_lists_are_words_one_after_another(light, capsys):
    base = ["--config", "pipeline.yaml", "--unlearn.concept=bag"]
    words = ["--unlearn.targets", "a", "b", "--stages", "unlearn", "evaluate", "--unlearn.sleep", "0"]
    workflow = parse_workflow([*base, *words], light.root)
    assert workflow.settings["unlearn"]["targets"] == ["a", "b"] and workflow.names == ["unlearn", "evaluate"]
    assert parse_workflow([*base, "--stages", "unlearn"], light.root).names == ["unlearn"]
    with pytest.raises(ValueError, match="stages is empty: leave it out for all, or name some of unlearn, evaluate"):
        parse_workflow([*base, "--stages", "[]"], light.root)
    with pytest.raises(ValueError, match="score 'evaluate.classes.retain_acuracy_drop' is none that evaluate gives"):
        parse_workflow([*base, "--score", "{evaluate.classes.retain_acuracy_drop: 1}"], light.root)


def test_a_failed_stage_is_one_line_and_the_next_run_goes_on_there(light, tmp_path):
    with pytest.raises(
        ValueError, match=r"stage unlearn failed \(exit status 1\): the learning rate is below 0; log "
    ):
        light(**{"unlearn.learning_rate": -1})
    assert light()[1] == ["unlearn", "evaluate"]
    script = light.root / "train_scripts/judge.py"
    good = script.read_text()
    script.write_text("raise SystemExit('broken')\n")
    with pytest.raises(ValueError, match="stage evaluate failed .*: broken"):
        light()
    script.write_text(good)
    assert light()[1] == ["evaluate"]


def test_only_evaluation(light, tmp_path):
    with pytest.raises(ValueError, match="eval_only, but there is no complete 'out/unlearn'"):
        light(eval_only=True)
    light()
    assert light(eval_only=True, **{"unlearn.learning_rate": 5, "evaluate.bonus": 2})[1] == ["evaluate"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/weights").write_text("0.5")
    results, ran = light(unlearned_dir="mine", output_dir="other")
    assert ran == ["evaluate"] and results["metrics"]["evaluate.classes.unlearning_accuracy"] == 5
    assert not (tmp_path / "other/unlearn").exists()


def test_other_peoples_files_stay(light, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir 'out' holds other files"):
        light()
    light(output_dir="new")
    (tmp_path / "new/stages/evaluate.json").unlink()
    with pytest.raises(ValueError, match="'new/evaluate' holds files that no workflow left there"):
        light(output_dir="new")
    (tmp_path / "new/stages/evaluate.json").write_text("{")
    with pytest.raises(ValueError, match="evaluate.json' is damaged: delete it"):
        light(output_dir="new")
    assert (tmp_path / "out/notes.txt").read_text() == "mine" and (tmp_path / "new/evaluate/evaluation.json").is_file()


def test_what_somebody_put_in_a_stages_folder_stays(light, tmp_path):
    light()
    notes = [tmp_path / "out" / stage / "notes.txt" for stage in ("unlearn", "evaluate")]
    for path in notes:
        path.write_text("mine")
    assert light(**{"unlearn.learning_rate": 5})[1] == ["unlearn", "evaluate"]
    with pytest.raises(ValueError, match="below 0"):
        light(**{"unlearn.learning_rate": -1})
    assert light(**{"unlearn.learning_rate": 5})[1][0] == "unlearn"
    assert [path.read_text() for path in notes] == ["mine", "mine"]


def test_an_earlier_results_checkpoints_are_not_gone_on_from(light, tmp_path):
    """A failed start may bring the result before it back."""
    light()
    step = tmp_path / "out/unlearn/checkpoints/step-1"
    step.mkdir(parents=True)
    os.utime(step, (1, 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="below 0"):
            light(**{"unlearn.learning_rate": -1})
        assert light.trace.read_text().split()[-1] == "None"
    os.utime(step)
    with pytest.raises(ValueError, match="below 0"):
        light(**{"unlearn.learning_rate": -1})
    assert light.trace.read_text().split()[-1] == "latest"


def test_two_processes_do_not_share_a_folder(light, tmp_path):
    light()
    with FolderLock(tmp_path / "out"), pytest.raises(ValueError, match="another process works in 'out'"):
        light()


def test_a_hash_in_the_name_tells_settings_apart(light):
    def folder(*words):
        base = ["--config", "pipeline.yaml", "--unlearn.concept=bag", "--output_dir=runs/{hash}"]
        return str(parse_workflow([*base, *words], light.root).output)

    first = folder()
    assert re.fullmatch("runs/[0-9a-f]{12}", first)
    assert (
        folder("--unlearn.report_to=all") == folder("--score={a: 1}") == folder("--unlearn.learning_rate=1.0") == first
    )
    others = [folder("--unlearn.learning_rate=1e-5"), folder("--evaluate.bonus=1"), folder("--unlearn.concept=boot")]
    assert len({first, *others}) == 4


def test_dry_run_says_what_would_run(light, tmp_path, capsys):
    light()
    capsys.readouterr()
    assert light(dry_run=True, **{"evaluate.bonus": 2}) == ({}, [])
    assert "unlearn: complete, would not run" in (said := capsys.readouterr().out)
    assert "evaluate: bonus was 0.0 and is 2.0" in said and "train_scripts/judge.py --config out/stages/" in said


def drive(words, root, said):
    """A pipeline in a process of its own."""
    with open(said, "w") as sys.stderr:
        try:
            run_workflow(parse_workflow(words, root))
        except Stopped as stopped:
            raise SystemExit(stop_message(stopped)) from None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_the_stage_ends_too_and_the_same_command_goes_on(number, light, tmp_path):
    words = ["--config", "pipeline.yaml", "--unlearn.concept=bag", "--unlearn.sleep=60"]
    light.trace.write_text("")
    process = multiprocessing.get_context("fork").Process(target=drive, args=(words, light.root, "said"))
    process.start()
    wait_for(lambda: "pid" in light.trace.read_text())
    child = int(light.trace.read_text().split("pid ")[1])
    os.kill(process.pid, number)
    process.join(20)
    if number == signal.SIGTERM:
        assert process.exitcode == 143
        assert (tmp_path / "said").read_text() == "stopped by SIGTERM: the same command goes on from here\n"
    with FolderLock(tmp_path / "out", 20):  # which the child holds as long as it lives
        status = Path(f"/proc/{child}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()
    light(**{"unlearn.sleep": 60})
    assert light.trace.read_text().splitlines()[0] == "unlearn 1.0 latest"


def test_a_stage_gets_no_run_of_the_tracker(light, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "secret-run")
    script = light.root / "train_scripts/train.py"
    script.write_text("import os\nassert 'WANDB_RUN_ID' not in os.environ\n" + script.read_text())
    assert light()[1] == ["unlearn", "evaluate"]


BAD = {
    "no kind": ([], "no kind is given: set kind to one of"),
    "unknown kind": (["--kind=gan"], "unknown kind 'gan'"),
    "unknown stage": (["--kind=sd", "--output_dir=x", "--stages=[paint]"], "unknown stage paint"),
    "filled setting": (["--config", "pipeline.yaml", "--evaluate.model=x"], "evaluate.model"),
    "no number": (["--config", "pipeline.yaml", "--unlearn.learning_rate=fast"], "unlearn.learning_rate"),
    "missing": (["--kind=sd", "--output_dir=x"], "unlearn.concept"),
    "no processes": (
        ["--config", "pipeline.yaml", "--unlearn.concept=bag", "--launch.num_processes=0"],
        "must be at least 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line_before_anything_runs(name, light, tmp_path, monkeypatch, capsys):
    words, message = BAD[name]
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_script(run_workflow, lambda arguments: parse_workflow(arguments, light.root))
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code in (1, 2) and line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_stages(light, tmp_path):
    (tmp_path / "pipeline.yaml").write_text((tmp_path / "pipeline.yaml").read_text() + "evaluate: {bonus: 3}\n")
    assert light(stages="[unlearn]")[1] == ["unlearn"]
    assert light()[1] == ["evaluate"]


def test_signals_are_not_swallowed(light):
    """A stage that a signal ends, not sent by us, is a failure and not a stop."""
    script = light.root / "train_scripts/train.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(ValueError, match=r"stage unlearn failed \(exit status -9\)"):
        light()
    assert not issubclass(Stopped, ValueError)


def test_generated_images_depend_on_no_attack_and_no_judge():
    stage = next(stage for stage in WORKFLOWS["sd"] if stage.name == "generate")
    judged = {"pretrained_model_name_or_path": "p", "dataset_name": "d", "protocol": "style", "clip": "c"}
    fields = asdict(EvaluateConfig(output_dir="o", concept="bag", **judged))

    def deciding(**changes):
        return stage_inputs(stage, {**fields, **changes}, ROOT)

    for name in (*ATTACKS, "certificate", "membership", "fidelity"):
        assert name in fields and deciding(**{name: {**fields[name], "seed": 99}}) == deciding()
    assert deciding(attacks=["benign"]) == deciding() != deciding(concept="other")
    sampling = {**fields["evaluation"]["sampling"], "seed": 99}
    assert deciding(evaluation={**fields["evaluation"], "sampling": sampling}) != deciding()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_pipeline_of_the_repository_is_valid(path, tmp_path, monkeypatch):
    enter_repository(path, tmp_path, monkeypatch)
    workflow = parse_workflow(["--config", str(path)], ROOT)
    assert workflow.names[-1] == "evaluate" and "unlearn" in workflow.names
    assert all((ROOT / stage.script).is_file() for stage in workflow.stages)
    assert str(workflow.output) == f"runs/pipelines/{path.stem.removeprefix('pipeline_')}"
    for stage in workflow.stages:
        words = command_of(workflow, stage, Path("settings.json"))
        assert words[1:] == [str(ROOT / stage.script), "--config", "settings.json"]
        if workflow.config.kind == "sd":
            filled = workflow.filled(stage)
            config = config_from(stage.config_class, {key: filled[key] for key in filled if key not in stage.late})
            if stage.name == "unlearn":
                chosen_objective(config)


OWN = """
from dataclasses import dataclass
from barrier_diffusers.objectives import register_objective
from barrier_diffusers.utils.checks import FILE, Checked, at_least, rules

@dataclass
class Push(Checked):
    strength: float = 1.0
    words: list[str] = None
    table: str | None = None
    RULES = rules(strength=at_least(0), table=FILE)

@register_objective("push", settings=Push)
def push(step):
    return -step.options.strength * step.ordinary_loss()
"""


@pytest.mark.parametrize("way", ["flags", "file"])
def test_a_stages_own_module_gives_flags(way, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "table.txt").write_text("1")
    own = {"name": "push", "module": str(tmp_path / "own.py"), "strength": 0.5, "table": str(tmp_path / "table.txt")}
    words = ["--config", "train_scripts/configs/pipeline_fashion_class.yaml", f"--output_dir={tmp_path / 'out'}"]
    words += ["--unlearn.objective.anchor=null"]
    if way == "flags":
        words += [f"--unlearn.objective.{name}={value}" for name, value in own.items()]
        words += ["--unlearn.objective.words", "a", "b"]
    else:
        (tmp_path / "own.yaml").write_text(json.dumps({"unlearn": {"objective": {**own, "words": ["a", "b"]}}}))
        words += ["--config", str(tmp_path / "own.yaml")]
    with registries_kept():
        workflow = parse_workflow(words, ROOT)
        stage = workflow.stages[0]
        objective = workflow.filled(stage)["objective"]
        assert objective["strength"] == 0.5 and objective["words"] == ["a", "b"]
        before = stage_inputs(stage, workflow.filled(stage), ROOT)["settings"]
        (tmp_path / "table.txt").write_text("2")  # what an own setting names is an input, too
        now = stage_inputs(stage, workflow.filled(stage), ROOT)["settings"]
        assert {name for name in now if now[name] != before[name]} == {"objective.table"}
        with pytest.raises(
            ValueError, match=r"unlearn.objective.strength is -1.0, but must be at least 0|strength is -1"
        ):
            parse_workflow([*words, "--unlearn.objective.strength=-1"], ROOT)
