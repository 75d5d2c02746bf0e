"""The scripts as modules, so that an installed package runs them: `python -m barrier_diffusers.scripts.unlearn_sd`.

In a clone they lie in train_scripts/, where they are also started by path; a wheel holds that folder as this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "train_scripts")]
