"""An attack of a user's own: a file outside the package, named by a setting."""

import re

import pytest
from registries import registries_kept
from short_evaluations import evaluate, flags
from short_runs import ROOT

from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.utils.command_line import config_from, parse_config


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)
    with registries_kept():
        yield


def test_the_attack_of_the_documentation(tmp_path):
    """docs/add_an_attack.md: a user's file, named by a setting, with flags of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_an_attack.md").read_text(encoding="utf-8"), re.S)
    path = tmp_path / "long_prompts.py"
    path.write_text(code)
    changes = {"attacks": "[long_prompts]", "module": path, "long_prompts.num_words": 2}
    record = evaluate(tmp_path / "run", **changes)
    (found,) = record["attacks"]
    assert found["attack"] == "long_prompts" and found["post_attack"]["num_images"] == 2
    assert all(prompt.startswith("very very ") for prompt in found["prompts"])
    assert record["settings"]["long_prompts"] == found["budget"] == {"seed": 0, "num_words": 2, "word": "very"}
    words = flags(tmp_path / "yaml", **{**changes, "long_prompts.num_words": 3})
    (tmp_path / "more.yaml").write_text("long_prompts: {word: so}\n")
    config = parse_config(EvaluateConfig, [*words, "--config", str(tmp_path / "more.yaml")])
    assert (config.budgets["long_prompts"].word, config.budgets["long_prompts"].num_words) == ("so", 3)
    values = {name: value for name, value in record["settings"].items() if name != "output_dir"}
    assert config_from(EvaluateConfig, {**values, "output_dir": "o"}).budgets["long_prompts"].num_words == 2
    with pytest.raises(ValueError, match=r"long_prompts.num_words is 0"):
        parse_config(EvaluateConfig, flags(tmp_path / "none", **{**changes, "long_prompts.num_words": 0}))
    with pytest.raises(ValueError, match="lower long_prompts.num_words"):
        evaluate(tmp_path / "long", **{**changes, "long_prompts.num_words": 99})


def test_a_module_that_cannot_be_had(tmp_path):
    with pytest.raises(ValueError, match="module '/no/such.py' does not exist"):
        parse_config(EvaluateConfig, flags(tmp_path / "run", module="/no/such.py"))
    (tmp_path / "clash.py").write_text(
        "from barrier_diffusers.evaluation.attacks import Budget, register_attack\n"
        "register_attack('resolution', Budget)(lambda *_: None)\n"
    )
    with pytest.raises(ValueError, match="'resolution' cannot be registered: it is a setting"):
        parse_config(EvaluateConfig, flags(tmp_path / "run", module=tmp_path / "clash.py"))
