"""A tiny class-conditional pipeline, labelled images and a judge for it, built on the fly."""

import json

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image as PILImage

from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.utils.command_line import parse_config
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import TrainConfig, UnlearnConfig

LABELS = ["bag", "boot", "coat"]


def make_pipeline(patch_size=2, channels=1):
    """8 x 8 pixels, three labels, attention at the coarser of two levels."""
    torch.manual_seed(0)
    seen = channels * patch_size**2
    unet = UNet2DModel(
        sample_size=8 // patch_size,
        in_channels=seen,
        out_channels=seen,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=len(LABELS) + 1,
    ).eval()
    scheduler = DDIMScheduler(num_train_timesteps=20, timestep_spacing="trailing")
    pipeline = ClassConditionalDDPMPipeline(unet, scheduler, LABELS, patch_size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_images(folder, per_label=8):
    """Splits train and test of grey 8 x 8 images: each label has its own stripe."""
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
    for split in ("train", "test"):
        images, labels = [], []
        for index in range(per_label * len(LABELS)):
            label = index % len(LABELS)
            image = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            image[2 * label : 2 * label + 2] += 190
            images.append(PILImage.fromarray(image))
            labels.append(label)
        folder.mkdir(parents=True, exist_ok=True)
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def write_judge(folder):
    """An untrained classifier that knows the labels."""
    torch.manual_seed(0)
    AttributeClassifier({"class": LABELS}, channels=(4, 8), resolution=8).save_pretrained(folder)
    return folder


class Place:
    """A folder with pipeline, data and judge, in which short runs are made."""

    def __init__(self, folder):
        self.folder = folder
        self.base, self.data, self.judge = (
            folder / "base",
            write_images(folder / "data"),
            write_judge(folder / "judge"),
        )
        make_pipeline().save_pretrained(self.base)

    def words(self, output, settings):
        """A command line."""
        every = {"data.train_data_dir": self.data, "output_dir": output, "report_to": "none", **settings}
        return [word for name, value in every.items() for word in (f"--{name}", str(value))]

    def unlearn_words(self, output, **settings):
        """The command line of a short unlearning run."""
        return self.words(
            output,
            {
                "pretrained_model_name_or_path": self.base,
                "concept": "boot",
                "train_batch_size": 4,
                "max_train_steps": 3,
                "learning_rate": 1e-3,
                "barrier.reduced_dim": 4,
                "evaluation.judge": self.judge,
                "evaluation.images_per_label": 5,
                "evaluation.sampling.num_inference_steps": 2,
                **settings,
            },
        )

    def unlearn(self, output, **settings):
        """(metrics, UNet after) of a short unlearning run."""
        from ddpm_ext.unlearn import main

        AcceleratorState._reset_state(reset_partial_state=True)
        main(parse_config(UnlearnConfig, self.unlearn_words(output, **settings)))
        after = ClassConditionalDDPMPipeline.from_pretrained(output)
        return json.loads((output / "metrics.json").read_text()), after.unet

    def train_words(self, output, **settings):
        """The command line of a short training run."""
        short = {"resolution": 8, "train_batch_size": 4, "max_train_steps": 4, "unet.block_out_channels": "[8,16]"}
        short |= {"unet.attention_head_dim": 8, "unet.norm_num_groups": 4, "num_train_timesteps": 20}
        return self.words(output, {**short, "lr_warmup_steps": 1, **settings})

    def train(self, output, **settings):
        """The pipeline of a short training run."""
        from ddpm_ext.train import main

        AcceleratorState._reset_state(reset_partial_state=True)
        main(parse_config(TrainConfig, self.train_words(output, **settings)))
        return ClassConditionalDDPMPipeline.from_pretrained(output)
