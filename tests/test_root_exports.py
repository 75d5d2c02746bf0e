"""What a loop of one's own imports: names of the root and of barrier_diffusers.data, each loaded when first used."""

import importlib
import subprocess
import sys

import pytest

import barrier_diffusers
import barrier_diffusers.data


@pytest.mark.parametrize("module", [barrier_diffusers, barrier_diffusers.data])
def test_every_exported_name_is_there(module):
    assert {"EncodedImages", "NoisedBatches", "encode_images"} <= set(module.__all__) == set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Nothing'"):
        _ = module.Nothing


def test_both_give_the_same():
    encoding = importlib.import_module("barrier_diffusers.data.encoding")
    for name in barrier_diffusers.data.__all__:
        assert getattr(barrier_diffusers, name) is getattr(barrier_diffusers.data, name) is getattr(encoding, name)


def test_importing_them_loads_no_library():
    code = "import sys, barrier_diffusers.data; print({'torch', 'datasets', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
