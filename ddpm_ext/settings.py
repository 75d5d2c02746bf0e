"""Settings of the DDPM scripts, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

POSITIVE = (
    *("resolution", "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps"),
    *("checkpoints_total_limit", "validation_steps"),
)


def require_positive(config: object, names: tuple[str, ...] = POSITIVE) -> None:
    """A ValueError if one of these whole-number settings is given and below 1."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


@dataclass
class LabelledDataConfig:
    """A data set of labelled images; defaults are those of CIFAR-10 on the hub."""

    train_data_dir: str | None = None  # folder readable by `datasets`: parquet, Arrow or an image folder
    dataset_name: str | None = None  # or a hub name, e.g. cifar10 or tanganke/stl10
    split: str = "train"
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("set either data.train_data_dir (a folder) or data.dataset_name (a hub name)")

    @property
    def source(self) -> str:
        """What `load_labelled` is given."""
        return self.train_data_dir or self.dataset_name or ""


@dataclass
class UnetConfig:
    """The noise predictor; the defaults are the embedded model's."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])  # halves the side at each step but one
    attention_levels: list[bool] = field(default_factory=lambda: [False, True])  # which of them have self-attention
    layers_per_block: int = 1
    attention_head_dim: int = 32  # features per head
    norm_num_groups: int = 16
    dropout: float = 0.0
    patch_size: int = 2  # the UNet sees patches of this side as channels (pipeline.py); 1: plain pixels

    def __post_init__(self) -> None:
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError(
                f"unet.attention_levels names {len(self.attention_levels)} levels, "
                f"unet.block_out_channels {len(self.block_out_channels)}"
            )
        require_positive(self, ("layers_per_block", "attention_head_dim", "norm_num_groups", "patch_size"))

    @property
    def unit(self) -> int:
        """The image side must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)


@dataclass(kw_only=True)
class TrainConfig:
    """Everything a training run depends on."""

    data: LabelledDataConfig
    output_dir: str  # becomes the pipeline folder
    exclude_labels: list[str] = field(default_factory=list)  # never seen: the "retrained" baseline of unlearning
    overwrite_output_dir: bool = False
    seed: int = 0
    resolution: int = 28  # side in pixels
    num_channels: Literal[1, 3] = 1  # grey or colour
    random_flip: bool = False  # mirror half of the images
    train_batch_size: int = 64  # per process
    max_train_steps: int = 3000
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # peak
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 200
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    label_dropout: float = 0.1  # share of labels replaced by "no label", for classifier-free guidance
    ema_decay: float = 0.999  # of the averaged weights that are saved
    num_train_timesteps: int = 1000  # of the linear noise schedule
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the written weights
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    checkpointing_steps: int | None = None  # None: a checkpoint only when a signal stops the run
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None  # a checkpoint's name, or latest
    unet: UnetConfig = field(default_factory=UnetConfig)

    def __post_init__(self) -> None:
        require_positive(self)
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout is {self.label_dropout}, but must be in [0, 1)")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must be in [0, 1)")
        if self.resolution % self.unet.unit:
            raise ValueError(
                f"resolution is {self.resolution}, but must be a multiple of {self.unet.unit} for "
                f"{len(self.unet.block_out_channels)} levels and patch_size {self.unet.patch_size}"
            )
