"""Sweep files: wandb's own controller and ours read the same trials and the same distributions from them."""

import json
import warnings

import light_stages
import numpy as np
import optuna
import pytest
import yaml
from light_stages import CONFIGS, enter_repository
from short_runs import ROOT
from sweep_files import write

from barrier_diffusers.workflow.sweep_file import LOG_RANGES, OPTIONS, ROUNDED, TAIL, decode, encode, read_sweep
from barrier_diffusers.workflow.sweeps import EveryPoint, check_sweep
from barrier_diffusers.workflow.workflow import parse_workflow

with warnings.catch_warnings():  # of pydantic, about how the package is written
    warnings.simplefilter("ignore")
    HyperParameter = pytest.importorskip("sweeps.params", reason="wandb's sweep controller").HyperParameter
    import sweeps

pytestmark = pytest.mark.usefixtures("own_workflows")
FILES = sorted((ROOT / "train_scripts" / "sweeps").glob("*.yaml"))


def wandb_grid(content):
    """All trials of a grid, as wandb's controller hands them out until it has no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *runs, last = sweeps.next_runs(content, [], validate=True, n=10_000)
    assert last is None
    return [{name: entry["value"] for name, entry in run.config.items()} for run in runs]


def as_set(trials):
    texts = [json.dumps(trial, sort_keys=True) for trial in trials]
    assert len(set(texts)) == len(texts)
    return set(texts)


GRID = {
    "unlearn.learning_rate": {"values": [1.0e-5, 3.0e-5]},
    "unlearn.barrier.targets": {"values": [["attn2.to_k"], ["attn2.to_k", "attn2.to_v"]]},
    "unlearn.barrier.use_actual_bounds": {"values": [True, False]},
    "unlearn.objective.name": {"distribution": "categorical", "values": ["rl", "ga"]},
    "unlearn.rank": {"min": 3, "max": 5},
    "unlearn.seed": {"value": 7},
    "unlearn.barrier.projection_energy": {"distribution": "q_uniform", "min": 0.5, "max": 0.9, "q": 0.125},
}


def test_both_readers_give_the_same_trials_of_a_grid(tmp_path):
    sweep = read_sweep(write(tmp_path / "sweep.yaml", parameters=GRID))
    wanted = wandb_grid(yaml.safe_load((tmp_path / "sweep.yaml").read_text()))
    assert as_set(sweep.grid()) == as_set(wanted) and len(wanted) == 2 * 2 * 2 * 2 * 3 * 4


def test_optuna_draws_every_point_of_the_grid_once(tmp_path):
    sweep = read_sweep(write(tmp_path / "sweep.yaml", parameters=GRID))
    space = {p.name: [encode(value) for value in p.choices] for p in sweep.varied}
    study = optuna.create_study(sampler=EveryPoint(space, seed=0))
    points = []
    for _ in sweep.grid():
        trial = study.ask()
        points.append({p.name: p.suggest(trial, grid=True) for p in sweep.parameters})
        study.tell(trial, 0.0)
    assert as_set(points) == as_set(sweep.grid())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_of_the_repository(path, tmp_path, monkeypatch):
    """wandb accepts it, its trials are valid pipelines, and a grid is the same to both readers."""
    content = yaml.safe_load(path.read_text())
    enter_repository(ROOT / content["command"][4], tmp_path, monkeypatch)
    older = {key: value for key, value in content.items() if key != "run_cap"}  # which wandb has, and its package not
    assert sweeps.schema_violations_from_proposed_config(older) == []
    sweep = read_sweep(str(path))
    pipelines = check_sweep(sweep, ROOT)
    config = content["command"][content["command"].index("--config") + 1]
    assert (ROOT / config).is_file() and (ROOT / content["program"]).is_file()
    if sweep.method == "grid":
        wanted = wandb_grid(content)
        assert as_set(sweep.grid()) == as_set(wanted)
        folders = {str(pipeline.output) for pipeline in pipelines}
        assert len(folders) == len(wanted)
        for trial in (wanted[0], wanted[-1]):  # as wandb's agent writes them
            agent = [*sweep.words, *(f"--{name}={value}" for name, value in trial.items())]
            assert str(parse_workflow(agent, ROOT).output) in folders


def test_every_value_of_a_large_grid_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    light_stages.install(tmp_path)
    (tmp_path / "pipeline.yaml").write_text("kind: sd\nunlearn: {concept: bag}\nscore: {unlearn.loss: 1}\n")
    many = {"unlearn.learning_rate": {"values": list(range(10))}, "evaluate.bonus": {"values": list(range(8))}}
    assert len(check_sweep(read_sweep(write(tmp_path / "s.yaml", parameters=many)), tmp_path)) == 18
    many["evaluate.bonus"]["values"][-1] = "none"
    with pytest.raises(ValueError, match="trial --evaluate.bonus=none --unlearn.learning_rate=0"):
        check_sweep(read_sweep(write(tmp_path / "s.yaml", parameters=many)), tmp_path)


def test_every_pipeline_has_a_sweep():
    names = {path.stem.removeprefix("pipeline_") for path in CONFIGS}
    assert names == {path.stem for path in FILES}


VARIED = {  # sweep of the paper's code -> how long it trains, and the name of its objective
    "cifar10_classifier": ("num_train_epochs", "method.name"),
    "cifar10_classifier_random": ("num_train_epochs", "method.name"),
    "cifar10_ddpm": ("max_train_steps", "objective.name"),
    "sd_class": ("num_train_epochs", "objective.name"),
    "sd_nudity": ("num_train_epochs", "objective.name"),
}


@pytest.mark.parametrize("name", VARIED)
def test_the_papers_sweeps_have_its_keys(name):
    wanted = ("learning_rate", "barrier.lambda_interval", "barrier.targets", *VARIED[name])
    sweep = read_sweep(str(ROOT / f"train_scripts/sweeps/{name}.yaml"))
    assert {f"unlearn.{key}" for key in wanted} <= {parameter.name for parameter in sweep.parameters}


RANGES = {
    "int_uniform": {"min": 2, "max": 9},
    "uniform": {"min": -1.5, "max": 2.5},
    "log_uniform": {"min": -3.0, "max": 1.0},
    "log_uniform_values": {"min": 1.0e-5, "max": 1.0e-2},
    "inv_log_uniform": {"min": -3.0, "max": 1.0},
    "inv_log_uniform_values": {"min": 1.0e-5, "max": 1.0e-2},
    "normal": {"mu": 1.0, "sigma": 0.5},
    "log_normal": {"mu": 0.5, "sigma": 0.25},
    "beta": {"a": 2, "b": 5},
    "categorical": {"values": ["a", 1, [2, 3]]},
    "categorical_w_probabilities": {"values": ["a", "b", "c"], "probabilities": [0.2, 0.5, 0.3]},
    "constant": {"value": 3},
}


def suggestion(distribution, base, options, u):
    """What stands in an optuna trial at quantile `u` of a parameter's range."""
    if base == "categorical":
        return encode(options["values"][int(u * len(options["values"]))])
    if base == "int_uniform":
        return options["min"] + int(u * (options["max"] - options["min"] + 1))
    if base == "uniform":
        return options["min"] + u * (options["max"] - options["min"])
    if base in LOG_RANGES:
        low, high = np.log(LOG_RANGES[base](options["min"], options["max"]))
        return float(np.exp(low + u * (high - low)))
    return u


@pytest.mark.parametrize("distribution", OPTIONS)
def test_distributions_are_wandbs(distribution, tmp_path):
    base = distribution.removeprefix("q_")
    options = {**RANGES[base], **({"q": 0.125} if distribution in ROUNDED else {})}
    entry = {"x": {"distribution": distribution, **options}}
    (parameter,) = read_sweep(write(tmp_path / "s.yaml", method="random", parameters=entry)).parameters
    theirs = HyperParameter("x", entry["x"])
    for u in (TAIL, 0.13, 0.4, 0.77, 0.999):
        mine = parameter.suggest(optuna.trial.FixedTrial({"x": suggestion(distribution, base, options, u)}))
        wanted = theirs.ppf(u)
        if isinstance(wanted, np.ndarray):
            wanted = wanted.item()
        assert mine == (wanted if isinstance(wanted, str | list) else pytest.approx(wanted, rel=1e-6, abs=1e-9))


def test_distributions_without_a_name(tmp_path):
    plain = {"a": {"min": 1, "max": 2}, "b": {"min": 0, "max": 0.5}, "c": {"values": [1]}, "d": {"value": None}}
    nested = {"unlearn": {"parameters": {"barrier": {"parameters": {"reduced_dim": {"values": [1, 2]}}}}}}
    sweep = read_sweep(write(tmp_path / "s.yaml", method="bayes", parameters={**plain, **nested}))
    names = {parameter.name: parameter.distribution for parameter in sweep.parameters}
    kinds = {"a": "int_uniform", "b": "uniform", "c": "categorical", "d": "constant"}
    assert names == {**kinds, "unlearn.barrier.reduced_dim": "categorical"}
    assert sweep.flags({"a": 1, "c": "x", "d": None, "e": [1, "b"]}) == ["--a=1", "--c=x", "--d=null", '--e=[1, "b"]']


def test_choices_survive_the_journal():
    for value in (1, "a", "json", None, 2.5, True, [1, ["b"]], {"a": [1]}):
        assert decode(encode(value)) == value


X = "unlearn.learning_rate"
BAD = {
    "unknown key": ({"early_terminate": {"type": "hyperband"}}, "early_terminate is not supported"),
    "method": ({"method": "annealing"}, "method is 'annealing'"),
    "no metric": ({"metric": None}, "metric must have a name"),
    "goal": ({"metric": {"name": "score", "goal": "up"}}, "minimize or maximize"),
    "nothing varied": ({"parameters": {}}, "nothing is varied"),
    "no mapping": ({"parameters": {X: 3}}, "expected is a mapping"),
    "distribution": ({"parameters": {X: {"distribution": "cauchy"}}}, "one of constant, categorical"),
    "empty": ({"parameters": {X: {}}}, "give value, values, min and max"),
    "missing end": ({"parameters": {X: {"distribution": "uniform", "min": 1}}}, "uniform lacks max"),
    "unread option": ({"parameters": {X: {"values": [1], "min": 1}}}, "categorical has no min"),
    "number as text": ({"parameters": {X: {"min": "1e-5", "max": 1.0}}}, "no number to YAML"),
    "upside down": ({"parameters": {X: {"min": 2, "max": 1}}}, "min 2 is not less than max 1"),
    "logarithm of 0": (
        {"parameters": {X: {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
        "needs more than 0",
    ),
    "no values": ({"parameters": {X: {"values": []}}}, "non-empty list"),
    "probabilities": ({"parameters": {X: {"values": [1, 2], "probabilities": [0.5, 0.4]}}}, "1 in sum"),
    "endless grid": ({"parameters": {X: {"min": 0.0, "max": 1.0}}}, "a grid cannot have uniform"),
    "no command": ({"command": None}, "command must be a list with ${program}"),
    "other program": ({"program": "train.py"}, "only run_pipeline.py can be run"),
    "run cap": ({"run_cap": 0}, "run_cap is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError) as caught:
        read_sweep(write(tmp_path / "sweep.yaml", **changes))
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path):
    for text, message in (("a: [", "is no YAML"), ("[1]", "holds no settings"), (None, "cannot be read")):
        path = tmp_path / "sweep.yaml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_sweep(str(path))
