"""BarrierConfig: defaults, ranges, contradictions, save and load."""

import json
import subprocess
import sys

import pytest

from barrier_diffusers import BarrierConfig


def test_defaults_are_those_of_the_method():
    config = BarrierConfig()
    assert (config.lambda_interval, config.reduced_dim, config.infinity_scale) == (10.0, 32, 20.0)
    assert (config.lower_percentile, config.upper_percentile) == (0.05, 0.95)
    assert not config.use_actual_bounds and config.normalize_protection
    assert config.residual_weighting == "per_sample" and config.region == "two_corner"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": []}, "targets"),
        ({"targets": "attn2.to_q"}, "must be a non-empty list"),
        ({"lower_percentile": 0.9, "upper_percentile": 0.1}, "0.9 and 0.1"),
        ({"lower_percentile": 0.5, "upper_percentile": 0.5}, "lower_percentile < upper_percentile"),
        ({"upper_percentile": 1.5}, "1.5"),
        ({"reduced_dim": 0}, "reduced_dim is 0"),
        ({"infinity_scale": -1.0}, "infinity_scale is -1.0"),
        ({"lambda_interval": float("nan")}, "lambda_interval is nan"),
        ({"region": "sphere"}, "two_corner, envelope, slabs"),
        ({"decomposition": "ica"}, "svd, pca, none"),
        ({"decomposition": "none", "remove_top_directions": True}, "nothing to remove"),
        ({"decomposition": "none", "residual_source": "both"}, "no residual"),
        ({"decomposition": "none", "residual_weighting": "singular_values"}, "no residual"),
        ({"interval": False, "remove_top_directions": True}, "choose one"),
        ({"interval": False, "region": "slabs"}, "without the interval term"),
        ({"remove_top_directions": True, "include_bias_drift": True}, "without the interval term"),
        ({"interval": False, "use_actual_bounds": True}, "without the interval term"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BarrierConfig(**options)


def test_save_and_load(tmp_path):
    config = BarrierConfig(targets=["fc"], lambda_interval=0.5, region="slabs")
    config.save_pretrained(tmp_path / "new")
    assert BarrierConfig.from_pretrained(tmp_path / "new") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["barrier_config.json"]


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="holds no barrier_config.json"):
        BarrierConfig.from_pretrained(tmp_path)
    (tmp_path / "barrier_config.json").write_text(json.dumps({"lambda": 3}))
    with pytest.raises(ValueError, match="unknown option lambda"):
        BarrierConfig.from_pretrained(tmp_path)


def test_config_module_needs_no_torch():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('config', 'barrier_diffusers/protection/config.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['config'] = module\n"
        "spec.loader.exec_module(module); module.BarrierConfig(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
