"""barrier-demo: what stands on the page, and the page itself in a browser (`make test-demo`)."""

import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from demo import main
from peft import LoraConfig
from PIL import Image
from pipelines import build
from short_runs import ROOT, run_tiny
from written_runs import share, write_certificate, write_run

from barrier_diffusers.evaluation.report import read_run
from barrier_diffusers.models.generation import SamplingConfig, sample
from barrier_diffusers.models.loading import load_adapter, load_pipeline
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.workflow.demo import DemoConfig, Pair, attack_table, certificate_table, example_prompts

SAMPLING = SamplingConfig(2, 3.0, resolution=32)


def drawn(pipeline, prompt="a boot", seed=5):
    return sample(pipeline, [prompt], [seed], SAMPLING, SAMPLING.guidance_scale)[0]


def as_drawn(picture):
    """A small picture of the page in its own pixels."""
    factor = picture.width // 32
    array = np.asarray(picture.convert("RGB"))
    assert factor == 8 and (array == array[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)).all()
    return array[::factor, ::factor]


def with_adapter(pipeline):
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    return pipeline


def test_an_adapter_is_drawn_at_every_strength_and_stays_on():
    base, changed = build("sd"), with_adapter(build("sd"))
    pair, expected = Pair(with_adapter(build("sd"))), drawn(base)
    before, after = pair.draw("a boot", 5, 1.0, SAMPLING)
    assert pair.is_adapter and (as_drawn(before) == expected).all()
    assert (as_drawn(after) == drawn(changed)).all() and (as_drawn(after) != expected).any()
    half = as_drawn(pair.draw("a boot", 5, 0.5, SAMPLING)[1])
    assert (half != expected).any() and (half != as_drawn(after)).any()
    assert (as_drawn(pair.draw("a boot", 5, 0.0, SAMPLING)[1]) == expected).all()
    assert (as_drawn(pair.draw("a boot", 5, 1.0, SAMPLING)[1]) == as_drawn(after)).all()


def test_two_pipelines_start_from_the_same_noise():
    base, other = build("sd"), build("sd")
    with torch.no_grad():
        other.unet.conv_out.weight *= 2
    before, after = Pair(base, other).draw("a boot", 5, 0.3, SAMPLING)
    assert (as_drawn(before) == drawn(base)).all() and (as_drawn(after) == drawn(other)).all()
    same = Pair(base, base).draw("a boot", 5, 1.0, SAMPLING)
    assert (as_drawn(same[0]) == as_drawn(same[1])).all()


def test_the_tables_of_a_run(tmp_path):
    attack = {"attack": "inversion", "concept": "bag", "pre_attack": share(0.0, 0.0, 27.8)}
    run = write_run(tmp_path / "run", attacks=[{**attack, "post_attack": share(40.0, 16.8, 68.7)}])
    assert certificate_table(read_run(run)) == []
    write_certificate(run)
    record = read_run(run)
    assert attack_table([record]) == [["inversion", "bag", "0.0", "40.0", "16.8 to 68.7", "10"]]
    assert certificate_table(record) == [
        ["whole network", "", "0.0625", ""],
        ["attn2.to_k", "0.25", "0.125", "3 of 4"],
    ]
    assert example_prompts(str(run), record) == ["<b>sneaker</b>"]
    erased = [{"concepts": ["boot"], "captions": ["a red boot"]}]
    (run / "erased_concepts.json").write_text(json.dumps(erased))
    assert example_prompts(str(run), record) == ["a red boot"]


def test_a_folder_is_named_without_a_flag(tmp_path):
    config = parse_config(DemoConfig, [str(tmp_path), "--port", "8000"])
    assert config.folder == str(tmp_path) and config.port == 8000
    assert parse_config(DemoConfig, ["--folder", str(tmp_path)]).folder == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "there", "said"),
    [
        ({"seed": 7}, False, "the page needs Gradio: pip install 'barrier-diffusers[demo]'"),
        ({"seed": 7}, True, "does not say what it was unlearned from: set base_model"),
        (None, True, "holds no metrics.json"),
    ],
)
def test_what_no_page_can_be_made_of_is_refused(settings, there, said, tmp_path, monkeypatch, capsys):
    if settings is None:
        (tmp_path / "run").mkdir()
    else:
        (write_run(tmp_path / "run") / "manifest.json").write_text(json.dumps({"settings": settings}))
    spec = importlib.util.find_spec("json") if there else None
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "gradio" else real(name))
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        run_script(main, DemoConfig)
    assert said in capsys.readouterr().err


@pytest.fixture
def result(tmp_path, monkeypatch):
    """An adapter for a tiny pipeline, as unlearn_sd.py leaves it."""
    monkeypatch.chdir(ROOT)
    build("sd").save_pretrained(tmp_path / "base")
    run_tiny(tmp_path / "base", tmp_path / "run", rank=2, max_train_steps=4, learning_rate=0.5)
    return tmp_path / "run"


@pytest.fixture
def address(result):
    """Of the page about the result, served by the script as users start it."""
    pytest.importorskip("gradio", reason="the page needs Gradio: make test-demo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "train_scripts/demo.py", str(result), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    where = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"the page ended: {server.stdout.read()}")
            try:
                urllib.request.urlopen(where, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield where
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser():
    """A headless browser of this machine; none is downloaded."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="what drives a browser: make test-demo")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


def shown(page, name):
    """The picture of that name on the page."""
    source = page.locator(f"#{name} img").get_attribute("src")
    return as_drawn(Image.open(io.BytesIO(page.request.get(source).body())))


@pytest.mark.slow
def test_someone_types_a_prompt_and_sees_both_pictures(result, address, browser):
    base = load_pipeline(str(result.parent / "base"))
    before = drawn(base, "a green bag", seed=1000)
    load_adapter(base, str(result))
    after = drawn(base, "a green bag", seed=1000)
    assert (before != after).any()

    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    page.goto(address)
    page.locator("#prompt textarea, #prompt input").first.fill("a green bag")
    page.locator("#draw").click()
    page.locator("#base img").wait_for(timeout=60_000)
    page.locator("#unlearned img").wait_for(timeout=60_000)
    assert (shown(page, "base") == before).all() and (shown(page, "unlearned") == after).all()
    page.locator("#certificate").get_by_text("whole network").first.wait_for()
    page.get_by_text("No attacks on record").wait_for()

    first = page.locator("#unlearned img").get_attribute("src")
    page.locator("#strength input[type=number]").fill("0")
    page.locator("#strength input[type=number]").press("Tab")
    page.locator("#draw").click()
    page.wait_for_function(f"document.querySelector('#unlearned img')?.getAttribute('src') !== '{first}'")
    assert (shown(page, "unlearned") == before).all()
    page.screenshot(path=result.parent / "page.png", full_page=True)
