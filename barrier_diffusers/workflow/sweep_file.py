"""Sweep files in wandb's format: what is varied, which workflow runs, which metric counts.

The same file serves `wandb sweep FILE` and train_scripts/sweep.py. Read are `method`, `metric`, `parameters`,
`command`, `run_cap` and `name`; keys that only place a sweep on wandb's site are accepted, and those that would change
the trials, like `early_terminate`, are refused.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from scipy import stats

METHODS = ("grid", "random", "bayes")


SITE_KEYS = ("program", "project", "entity", "description", "apiVersion", "kind", "controller")


KEYS = ("method", "metric", "parameters", "command", "run_cap", "name")


PROGRAM = "run_pipeline.py"


TAIL = 1e-6  # quantiles of distributions without ends stay this far from 0 and 1


LOG_RANGES = {  # distribution -> (lowest, highest) value from its min and max
    "log_uniform": lambda low, high: (math.exp(low), math.exp(high)),
    "log_uniform_values": lambda low, high: (low, high),
    "inv_log_uniform": lambda low, high: (math.exp(-high), math.exp(-low)),
    "inv_log_uniform_values": lambda low, high: (low, high),
}


QUANTILES = {  # distribution -> value at a quantile
    "normal": lambda u, o: stats.norm.ppf(u, o.get("mu", 0.0), o.get("sigma", 1.0)),
    "log_normal": lambda u, o: stats.lognorm.ppf(u, s=o.get("sigma", 1.0), scale=math.exp(o.get("mu", 0.0))),
    "beta": lambda u, o: stats.beta.ppf(u, o.get("a", 1), o.get("b", 1)),
}


OPTIONS = {  # distribution -> (options it needs, options it may have)
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": (("min", "max"), ()),
    "uniform": (("min", "max"), ()),
    **{name: (("min", "max"), ()) for name in LOG_RANGES},
    **{name: ((), ("mu", "sigma")) for name in ("normal", "log_normal")},
    "beta": ((), ("a", "b")),
}


ROUNDED = {  # q_NAME rounds NAME to multiples of q
    f"q_{name}": (needed, (*more, "q"))
    for name, (needed, more) in OPTIONS.items()
    if name in ("uniform", "log_uniform", "log_uniform_values", *QUANTILES)
}


OPTIONS |= ROUNDED


@dataclass(frozen=True)
class Parameter:
    """One setting that is varied.

    Args:
        name: dotted flag of the workflow.
        distribution: a name of wandb's.
        options: what the distribution needs.
    """

    name: str
    distribution: str
    options: Mapping[str, Any]

    @property
    def choices(self) -> list[Any]:
        """The values of a grid.

        Raises:
            ValueError: there are infinitely many.
        """
        options = self.options
        if self.distribution == "constant":
            return [options["value"]]
        if self.distribution == "categorical":
            return list(options["values"])
        if self.distribution == "int_uniform":
            return list(range(options["min"], options["max"] + 1))
        if self.distribution == "q_uniform":
            return np.arange(options["min"], options["max"], options.get("q", 1.0)).tolist()
        raise ValueError(f"parameter {self.name}: a grid cannot have {self.distribution}; give values")

    def suggest(self, trial: Any, grid: bool = False) -> Any:
        """The parameter's value in an optuna trial; in a grid one of `choices`."""
        if grid and self.distribution != "constant":
            return decode(trial.suggest_categorical(self.name, [encode(value) for value in self.choices]))
        options, name, base = self.options, self.name, self.distribution.removeprefix("q_")
        if base == "constant":
            return options["value"]
        if base == "categorical":
            return decode(trial.suggest_categorical(name, [encode(value) for value in options["values"]]))
        if base == "int_uniform":
            return trial.suggest_int(name, options["min"], options["max"])
        if base == "categorical_w_probabilities":
            ends = np.cumsum(options["probabilities"])[:-1]
            return options["values"][int(np.searchsorted(ends, trial.suggest_float(name, 0, 1), side="right"))]
        if base == "uniform":
            value = trial.suggest_float(name, options["min"], options["max"])
        elif base in LOG_RANGES:
            value = trial.suggest_float(name, *LOG_RANGES[base](options["min"], options["max"]), log=True)
        else:
            value = float(QUANTILES[base](trial.suggest_float(name, TAIL, 1 - TAIL), options))
        if self.distribution not in ROUNDED:
            return value
        step = options.get("q", 1.0)
        rounded = round(value / step) * step
        return int(rounded) if isinstance(step, int) else float(rounded)


def encode(value: Any) -> Any:
    """A choice as optuna stores it: lists and mappings as JSON behind a mark."""
    return f"json:{json.dumps(value)}" if isinstance(value, list | dict) else value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    return json.loads(value[5:]) if isinstance(value, str) and value.startswith("json:") else value


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked."""

    method: Literal["grid", "random", "bayes"]
    metric: str  # dotted name in results.json, or score
    goal: Literal["minimize", "maximize"]
    parameters: tuple[Parameter, ...]
    words: tuple[str, ...]  # command line of the workflow that no trial changes
    name: str
    run_cap: int | None = None
    content: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def varied(self) -> list[Parameter]:
        """All parameters but the constant ones."""
        return [parameter for parameter in self.parameters if parameter.distribution != "constant"]

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of values, constants included."""
        names = [parameter.name for parameter in self.parameters]
        products = itertools.product(*(parameter.choices for parameter in self.parameters))
        return [dict(zip(names, values, strict=True)) for values in products]

    def command_line(self, settings: Mapping[str, Any]) -> list[str]:
        """Words of the workflow's command line for one trial."""
        return [*self.words, *self.flags(settings)]

    def flags(self, settings: Mapping[str, Any]) -> list[str]:
        """The words that tell one trial from another."""
        return [as_flag(name, value) for name, value in settings.items()]


def as_flag(name: str, value: Any) -> str:
    """A setting as one word of a command line."""
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _parameters(content: Mapping[str, Any], prefix: str = "") -> Iterator[Parameter]:
    for key, options in content.items():
        name = f"{prefix}{key}"
        if not isinstance(options, Mapping):
            raise ValueError(f"parameter {name}: expected is a mapping such as `values: [1, 2]`")
        if "parameters" in options:
            yield from _parameters(options["parameters"], f"{name}.")
        else:
            yield _parameter(name, dict(options))


def _parameter(name: str, options: dict[str, Any]) -> Parameter:
    distribution = options.pop("distribution", None)
    if distribution is None:
        whole = all(isinstance(options.get(end), int) for end in ("min", "max"))
        kinds = {
            "constant": "value" in options,
            "categorical_w_probabilities": "probabilities" in options,
            "categorical": "values" in options,
            "int_uniform": "min" in options and whole,
            "uniform": "min" in options,
        }
        distribution = next((kind for kind, fits in kinds.items() if fits), None)
    if distribution not in OPTIONS:
        known = ", ".join(OPTIONS)
        raise ValueError(f"parameter {name}: give value, values, min and max, or distribution: one of {known}")
    needed, more = OPTIONS[distribution]
    missing, extra = set(needed) - set(options), set(options) - {*needed, *more}
    if missing or extra:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has no {', '.join(sorted(extra))}"
        raise ValueError(f"parameter {name}: {distribution} {what}")
    for option in ("min", "max", "q", "mu", "sigma", "a", "b"):
        value = options.get(option, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"parameter {name}: {option} is {value!r}, no number to YAML (write 1.0e-5 for 1e-5)")
    if "min" in options and options["min"] >= options["max"]:
        raise ValueError(f"parameter {name}: min {options['min']} is not less than max {options['max']}")
    if distribution.endswith("log_uniform_values") and options["min"] <= 0:
        raise ValueError(f"parameter {name}: min is {options['min']}, but a logarithm needs more than 0")
    if "values" in options and (not isinstance(options["values"], list) or not options["values"]):
        raise ValueError(f"parameter {name}: values must be a non-empty list")
    chances = options.get("probabilities", [1])
    if len(chances) != len(options.get("values", [1])) and "probabilities" in options or abs(sum(chances) - 1) > 1e-6:
        raise ValueError(f"parameter {name}: probabilities must be one for each value, 1 in sum")
    return Parameter(name, distribution, options)


def _words(content: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The fixed words of `command` behind the program."""
    command = content.get("command")
    if not isinstance(command, list) or "${program}" not in command or "${args}" not in command:
        raise ValueError(f"{where}: command must be a list with ${{program}}, --config FILE and ${{args}}")
    if Path(str(content.get("program"))).name != PROGRAM:
        raise ValueError(f"{where}: program is {content.get('program')!r}, but only {PROGRAM} can be run")
    return tuple(str(word) for word in command[command.index("${program}") + 1 :] if word != "${args}")


def read_sweep(path: str) -> Sweep:
    """A sweep from its YAML file.

    Raises:
        ValueError: what is wrong, and where.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"sweep file {path!r} is no YAML: {error}") from error
    except OSError as error:
        raise ValueError(f"sweep file {path!r} cannot be read: {error.strerror}") from error
    where = f"sweep file {path!r}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds no settings")
    unknown = [key for key in content if key not in (*KEYS, *SITE_KEYS)]
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} is not supported; known are {', '.join(KEYS)}")
    method = content.get("method")
    if method not in METHODS:
        raise ValueError(f"{where}: method is {method!r}, but must be one of {', '.join(METHODS)}")
    metric = content.get("metric")
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        raise ValueError(f"{where}: metric must have a name, such as score, and a goal")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize") or set(metric) - {"name", "goal"}:
        raise ValueError(f"{where}: metric has a name and a goal, minimize or maximize, but is {dict(metric)}")
    if not isinstance(content.get("parameters"), Mapping) or not content["parameters"]:
        raise ValueError(f"{where}: parameters is empty: nothing is varied")
    run_cap = content.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise ValueError(f"{where}: run_cap is {run_cap!r}, but must be a number of trials")
    parameters = tuple(_parameters(content["parameters"]))
    name = str(content.get("name") or Path(path).stem)
    sweep = Sweep(method, metric["name"], goal, parameters, _words(content, where), name, run_cap, content)
    if method == "grid":
        sweep.grid()
    return sweep
