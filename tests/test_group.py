"""What several processes of a run may count on: a group that waits, and a refusal where there is none."""

from datetime import timedelta

import pytest
from ddpm_models import Place
from launching import launch

from barrier_diffusers.training.run_config import RunConfig
from barrier_diffusers.training.trainer import GROUP_TIMEOUT, open_run, refuse_precision

WAITING = """
import sys, time
from datetime import timedelta
from barrier_diffusers.training import trainer
from barrier_diffusers.training.run_config import RunConfig

trainer.GROUP_TIMEOUT = timedelta(seconds=float(sys.argv[1]))
accelerator = trainer.open_run(RunConfig(output_dir=sys.argv[2], report_to="none"))
if accelerator.is_main_process:
    time.sleep(6)  # draws images, certifies
accelerator.wait_for_everyone()
print("together again")
"""


def test_the_others_wait_for_the_first_process_as_long_as_the_group_lets_them(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    impatient, patient = (launch([str(script)], [seconds, str(tmp_path / "run")]) for seconds in ("2", "60"))
    assert impatient.returncode != 0 and "together again\ntogether again" not in impatient.stdout
    assert patient.returncode == 0 and patient.stdout.count("together again") == 2, patient.stderr[-2000:]
    assert GROUP_TIMEOUT >= timedelta(days=7)


def test_processes_that_form_no_group_are_refused(tmp_path):
    place = Place(tmp_path / "place")
    words = place.unlearn_words(tmp_path / "run", **{"evaluation.judge": "null"})
    done = launch(["-m", "ddpm_ext.unlearn"], words, group=False)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and set(errors) == {
        "error: 2 processes were started, but they are no group, as accelerate found no GPU: launch with "
        "--num_processes 1, or set the environment variable ACCELERATE_USE_CPU=true for a group of CPU processes"
    }


@pytest.mark.parametrize("asked", [None, "no"])
def test_the_precision_is_accelerates_unless_the_settings_name_one(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = RunConfig(output_dir=str(tmp_path / "run"), report_to="none", mixed_precision=asked)
    wanted = asked or "bf16"
    assert open_run(config).mixed_precision == config.mixed_precision == wanted


def test_a_precision_that_nothing_here_trains_in_is_refused():
    with pytest.raises(ValueError, match="mixed_precision fp8 is not supported"):
        refuse_precision("fp8", "cuda")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        refuse_precision("fp16", "cpu")
