"""A local page that draws the same prompt with the base and with the unlearned pipeline, beside the run's records.

The page is Gradio's, an extra of its own. Both pictures start from noise of the same seed, each in a batch of its own.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from barrier_diffusers.data.erased_concepts import read_erased
from barrier_diffusers.evaluation.report import RunRecord, read_run
from barrier_diffusers.models.generation import SamplingConfig, sample
from barrier_diffusers.models.loading import ADAPTER_NAME, load_adapter, load_pipeline
from barrier_diffusers.utils.checks import FOLDER, MODEL, Checked, Range, rules
from barrier_diffusers.utils.shown_text import for_markdown

SMALLEST_SHOWN = 256  # side in pixels below which a picture is enlarged, every pixel a square
MOST_EXAMPLES = 6
FIRST_WIDTH, OTHER_WIDTH = "400px", "150px"  # of the tables' columns

Table = list[list[str]]


@dataclass(kw_only=True)
class DemoConfig(Checked):
    """Which result is shown, and where the page is served."""

    folder: str  # output folder of unlearn_sd.py
    evaluation_dir: str | None = None  # output folder of evaluate_sd.py about it, for the table of attacks
    base_model: str | None = None  # folder or hub id; None: what the run says that it started from
    host: str = "127.0.0.1"  # 0.0.0.0: whoever reaches this machine can use the page
    port: int | None = None  # None: the first that is free from 7860 on
    open_browser: bool = False  # show the page at once, where there is a desktop
    sampling: SamplingConfig | None = None  # where the sliders stand at first; None: as the run was evaluated

    POSITIONAL = "folder"
    RULES = rules(folder=FOLDER, evaluation_dir=FOLDER, base_model=MODEL, port=Range(1, 65535))

    def check_inputs(self) -> None:
        """Refuse what no page can be made of.

        Raises:
            ValueError: no Gradio, or folders without a run.
        """
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the page needs Gradio: pip install 'barrier-diffusers[demo]' (docs/demo.md)")
        record = read_run(self.folder)
        if self.evaluation_dir is not None:
            read_run(self.evaluation_dir)
        if self.base_model is None and self._settings(record).get("pretrained_model_name_or_path") is None:
            raise ValueError(f"folder {self.folder!r} does not say what it was unlearned from: set base_model")

    @property
    def announcement(self) -> str:
        """What is about to be done, in one line."""
        return f"loading what is in {self.folder} and its base"

    @staticmethod
    def _settings(record: RunRecord) -> dict[str, Any]:
        return record.manifest.get("settings", {})

    def load(self) -> Shown:
        """The run's records and both pipelines.

        Raises:
            ValueError, OSError: a pipeline that cannot be had.
        """
        record = read_run(self.folder)
        settings = self._settings(record)
        given: dict[str, Any] = {}
        if self.base_model is None:
            given = {name: settings.get(name) for name in HOW_IT_WAS_LOADED}
        base = load_pipeline(self.base_model or settings["pretrained_model_name_or_path"], **given)
        folder = Path(self.folder).expanduser()
        if (folder / ADAPTER_NAME).is_file():
            load_adapter(base, self.folder)
            pair = Pair(base)
        else:
            pair = Pair(base, load_pipeline(str(folder)))
        known = (settings.get("evaluation") or {}).get("sampling") or {}
        return Shown(
            record,
            pair.to("cuda" if torch.cuda.is_available() else "cpu"),
            sampling=self.sampling or SamplingConfig(**known),
            prompts=example_prompts(self.folder, record),
            attacks=attack_table([record, *([read_run(self.evaluation_dir)] if self.evaluation_dir else [])]),
        )


HOW_IT_WAS_LOADED = ("revision", "variant", "pipeline_config", "original_config")  # settings of unlearn_sd.py


@dataclass
class Pair:
    """A pipeline before and after it was unlearned.

    Args:
        base: as it was, or with the adapter of the result on it.
        unlearned: None: the adapter is the difference.
    """

    base: Any
    unlearned: Any = None

    @property
    def is_adapter(self) -> bool:
        """Whether the difference is an adapter, whose strength can be chosen."""
        return self.unlearned is None

    def to(self, device: str) -> Pair:
        """Both on a device; the pair itself."""
        for pipeline in (self.base, self.unlearned):
            if pipeline is not None:
                pipeline.to(device)
        return self

    @contextmanager
    def _strength(self, strength: float) -> Iterator[Any]:
        """The base with its adapter at this strength; 0 is the base, 1 the result, and what lies beyond is neither."""
        names = [name for each in self.base.get_list_adapters().values() for name in each]
        if strength == 0:
            self.base.disable_lora()
        else:
            self.base.set_adapters(list(dict.fromkeys(names)), strength)
        try:
            yield self.base
        finally:
            self.base.enable_lora()

    def draw(
        self, prompt: str, seed: int, strength: float, sampling: SamplingConfig
    ) -> tuple[Image.Image, Image.Image]:
        """The base's picture of the prompt and the unlearned pipeline's, from the same noise.

        Args:
            strength: of an adapter.

        Raises:
            FloatingPointError: see `sample`.
        """

        def one(pipeline: Any) -> Image.Image:
            return enlarged(sample(pipeline, [prompt], [seed], sampling, sampling.guidance_scale)[0])

        if not self.is_adapter:
            return one(self.base), one(self.unlearned)
        with self._strength(0) as pipeline:
            before = one(pipeline)
        with self._strength(strength) as pipeline:
            return before, one(pipeline)


@dataclass
class Shown:
    """Everything that the page shows."""

    record: RunRecord
    pair: Pair
    sampling: SamplingConfig
    prompts: list[str] = field(default_factory=list)  # to begin with
    attacks: Table = field(default_factory=list)


def enlarged(image_HWC: np.ndarray) -> Image.Image:
    """A small picture with every pixel a square of pixels; others as they are."""
    image = Image.fromarray(image_HWC)
    factor = math.ceil(SMALLEST_SHOWN / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def example_prompts(folder: str, record: RunRecord) -> list[str]:
    """Captions that were forgotten and prompts that were to be kept, a few of each; the concepts where neither is
    known."""
    forgotten = [caption for erased in read_erased(folder) for caption in erased.captions]
    kept = list(record.manifest.get("settings", {}).get("retain_prompts") or [])
    half = MOST_EXAMPLES // 2
    return list(dict.fromkeys([*forgotten[:half], *kept[:half]])) or list(record.forgotten)


ATTACK_HEADINGS = ["attack", "concept", "plain prompts, %", "attacked, %", "95 % interval", "images"]
CERTIFICATE_HEADINGS = ["map", "certified relative drift", "largest in test", "test images that keep it"]


def attack_table(runs: Sequence[RunRecord]) -> Table:
    """A row for every attack: images that the judge recognises as the concept, of the plain prompts and attacked."""
    return [
        [
            attack["attack"],
            attack["concept"],
            f"{attack['pre_attack']['value']:.1f}",
            f"{attack['post_attack']['value']:.1f}",
            "{:.1f} to {:.1f}".format(*attack["post_attack"]["interval_95"]),
            str(attack["post_attack"]["num_images"]),
        ]
        for run in runs
        for attack in run.metrics.get("attacks") or []
    ]


def certificate_table(record: RunRecord) -> Table:
    """A row for the whole network, for all maps at once and for every map; empty without a certificate."""
    paper = record.certificate
    if not paper:
        return []
    whole = [("whole network", paper.get("network")), ("all maps at once", paper.get("every_map"))]
    entries = [*whole, *((entry["name"], entry["relative"]) for entry in paper["maps"])]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    def kept(entry: dict[str, Any]) -> str:
        known = entry.get("coverage") is not None
        return f"{entry['num_test'] - entry['num_above']} of {entry['num_test']}" if known else ""

    return [
        [name, number(entry["certified"]), number(entry["largest_test"]), kept(entry)]
        for name, entry in entries
        if entry
    ]


def make_page(shown: Shown) -> Any:
    """The page, a `gradio.Blocks`; an error while drawing is shown on it."""
    import gradio

    record, pair, sampling = shown.record, shown.pair, shown.sampling

    def draw(
        prompt: str, seed: float, strength: float, steps: float, guidance: float
    ) -> tuple[Image.Image, Image.Image]:
        if not prompt.strip():
            raise gradio.Error("type a prompt first")
        chosen = SamplingConfig(int(steps), guidance, seed=int(seed), resolution=sampling.resolution)
        try:
            return pair.draw(prompt, int(seed), strength, chosen)
        except (ValueError, FloatingPointError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="What was forgotten, and what was kept", analytics_enabled=False) as page:
        what = f" forgetting {for_markdown(', '.join(record.forgotten))}" if record.forgotten else ""
        gradio.Markdown(f"# Before and after{what}")
        with gradio.Row():
            first = shown.prompts[0] if shown.prompts else ""
            prompt = gradio.Textbox(first, label="Prompt", elem_id="prompt", scale=4)
            button = gradio.Button("Draw both", variant="primary", elem_id="draw", scale=1)
        if shown.prompts:
            gradio.Examples([[each] for each in shown.prompts], prompt, label="What the run knows of")
        with gradio.Row():
            seed = gradio.Number(sampling.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
            steps = gradio.Slider(1, 100, sampling.num_inference_steps, step=1, label="Sampling steps")
            guidance = gradio.Slider(0, 15, sampling.guidance_scale, step=0.1, label="Guidance scale")
            strength = gradio.Slider(
                0,
                1.5,
                1,
                step=0.05,
                label="Adapter's strength",
                info="0 is the base, 1 the result",
                visible=pair.is_adapter,
                elem_id="strength",
            )
        with gradio.Row():
            pictures = [
                gradio.Image(label=name, elem_id=name, format="png", interactive=False)
                for name in ("base", "unlearned")
            ]
        gradio.Markdown("## What came out")
        gradio.Textbox(record.verdict, show_label=False, lines=2, elem_id="verdict")
        for heading, headings, rows, without in (
            ("Attacks", ATTACK_HEADINGS, shown.attacks, "No attacks on record: name an evaluation_dir with some."),
            ("Certificate", CERTIFICATE_HEADINGS, certificate_table(record), "The run left no certificate."),
        ):
            gradio.Markdown(f"## {heading}" if rows else f"## {heading}\n\n{without}")
            if rows:
                gradio.Dataframe(
                    rows,
                    headers=headings,
                    interactive=False,
                    elem_id=heading.lower(),
                    column_widths=[FIRST_WIDTH, *[OTHER_WIDTH] * (len(headings) - 1)],  # on a phone it scrolls
                    wrap=True,
                )
        asked = [prompt, seed, strength, steps, guidance]
        gradio.on([button.click, prompt.submit], draw, asked, pictures, concurrency_limit=1)
    return page


def serve(config: DemoConfig, wait: bool = True) -> Any:
    """Load, make the page and serve it.

    Args:
        wait: until the process is told to end; else the page, which is served by threads, is returned.
    """
    import gradio

    page = make_page(config.load())
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none of the net's
    page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open_browser,
        prevent_thread_lock=not wait,
        share=False,
        theme=gradio.themes.Default(**fonts),
    )
    return page
