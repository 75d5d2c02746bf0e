"""Train a small Stable Diffusion from scratch (VAE, text encoder, UNet) and save a genuine StableDiffusionPipeline.

Stages: VAE on pixels -> its posteriors cached -> text encoder and UNet trained together on noise prediction, with an
exponential moving average -> pipeline folder. A VAE that is already in work_dir is not trained again, and
`--resume_from_checkpoint latest` goes on with whatever stage was stopped.

`--exclude_concepts '[sneaker]' --pretrained_vae assets/fashion_sd/vae` trains a control: the same recipe without one
concept's pictures, the yardstick of how much an unlearned model still knows.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from barrier_diffusers.data.captions import labels_in_texts
from barrier_diffusers.data.encoding import cached_tensors, encode_moments, image_batches, tensors_hash, tokenize
from barrier_diffusers.data.readers import load_image_text, rows_hash
from barrier_diffusers.models.autoencoders import sample_latents
from barrier_diffusers.models.loading import module_hash
from barrier_diffusers.models.publishing import load_in_float32
from barrier_diffusers.models.vocabulary import cut_clip_vocabulary, find_clip_vocabulary
from barrier_diffusers.training.run_config import RunConfig, StageConfig
from barrier_diffusers.training.trainer import ONE_CYCLE, Averages, Trainer, make_accelerator
from barrier_diffusers.utils.checks import (
    DATA,
    FOLDER,
    OUTPUT,
    Checked,
    Range,
    at_least,
    check_settings,
    require_different,
    rules,
)
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json, written_whole
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import fingerprint

MADE_FROM = "made_from.json"  # beside the autoencoder in work_dir: its data and settings


@dataclass(kw_only=True)
class VaeConfig(StageConfig):
    """The autoencoder: 32 x 32 pixels <-> 4 x 8 x 8 latents with three levels."""

    block_out_channels: list[int] = field(default_factory=lambda: [24, 48, 64])  # halves the side at each step but one
    latent_channels: int = 4  # of the latents
    max_train_steps: int | None = 1600  # of AdamW
    train_batch_size: int = 64  # images per step
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    lr_scheduler: str = ONE_CYCLE
    kl_weight: float = 1e-5  # per latent element; keeps the latents near a unit Gaussian without blurring

    RULES = rules(block_out_channels=at_least(1), latent_channels=at_least(1), kl_weight=at_least(0))
    ONE_CYCLE_WARMUP = 0.1
    NUM_GROUPS: ClassVar = 8  # of its group norms

    def __post_init__(self) -> None:
        check_settings(self)
        require_divisible("vae.block_out_channels", self.block_out_channels, self.NUM_GROUPS, "groups of its norms")


def require_divisible(setting: str, values: list[int], by: int, what: str) -> None:
    """A ValueError that names the setting, for values that cannot be cut into so many parts."""
    for value in values:
        if value % by:
            raise ValueError(f"{setting} is {value}, but must be a multiple of {by}, the {what}")


@dataclass
class TextConfig(Checked):
    """The CLIP text encoder, and the words its tokenizer keeps whole."""

    hidden_size: int = 96  # features of a token
    num_hidden_layers: int = 2  # of the transformer
    num_attention_heads: int = 4  # of each layer
    max_length: int = 24  # tokens; every prompt is padded to this
    extra_words: list[str] = field(
        default_factory=lambda: [
            "shoe",
            "clothes",
            "garment",
            "clothing",
            "top",
            "picture",
            "drawing",
            "image",
            "an",
            "the",
        ]
    )  # kept as one token besides the captions' words; all other text falls back to byte pieces
    vocabulary_package: str = "open_clip"  # installed package that carries CLIP's byte-pair merges

    RULES = rules(
        hidden_size=at_least(1),
        num_hidden_layers=at_least(1),
        num_attention_heads=at_least(1),
        max_length=at_least(3),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisible("text.hidden_size", [self.hidden_size], self.num_attention_heads, "text.num_attention_heads")


@dataclass(kw_only=True)
class UnetConfig(StageConfig):
    """The noise predictor and its training."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])  # halves the side at each step but one
    layers_per_block: int = 1  # residual layers of a level
    attention_head_dim: int = 4  # number of heads: diffusers' historical name
    norm_num_groups: int = 16  # of the group norms
    max_train_steps: int | None = 5000  # of AdamW
    train_batch_size: int = 128  # images per step
    learning_rate: float = 1.5e-3  # peak of the one-cycle schedule
    lr_scheduler: str = ONE_CYCLE
    weight_decay: float = 0.01  # of AdamW
    ema_decay: float = 0.999  # of the averaged weights that are saved
    caption_dropout: float = 0.1  # share of captions replaced by "" for classifier-free guidance

    RULES = rules(
        block_out_channels=at_least(1),
        layers_per_block=at_least(1),
        attention_head_dim=at_least(1),
        norm_num_groups=at_least(1),
        weight_decay=at_least(0),
        ema_decay=Range(0, 1, without_high=True),
        caption_dropout=Range(0, 1, without_high=True),
    )
    ONE_CYCLE_WARMUP = 0.1

    def __post_init__(self) -> None:
        check_settings(self)
        require_divisible(
            "unet.block_out_channels", self.block_out_channels, self.norm_num_groups, "unet.norm_num_groups"
        )


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything the recipe depends on."""

    train_data_dir: str = "runs/fashion_mnist"  # folder or hub name with an image and a caption column
    output_dir: str = "assets/fashion_sd"  # becomes the pipeline folder
    overwrite_output_dir: bool = True  # an earlier result in output_dir goes when the new one is there
    work_dir: str = "runs/fashion_sd_work"  # trained VAE, cached latents, logs
    split: str = "train"  # of the data set
    image_column: str = "image"  # of the data set
    caption_column: str = "text"  # of the data set
    exclude_concepts: list[str] = field(default_factory=list)  # rows whose caption names one are left out
    pretrained_vae: str | None = None  # folder of an AutoencoderKL that is taken as it is; None: one is trained
    resolution: int = 32  # side of the images in pixels
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float16"  # of the written weights
    resume_from_checkpoint: Literal["latest"] | None = None  # go on from the newest checkpoint
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)

    RULES = rules(train_data_dir=DATA, work_dir=OUTPUT, pretrained_vae=FOLDER, resolution=at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_different(self.exclude_concepts, "exclude_concepts")
        if not all(concept.strip() for concept in self.exclude_concepts):
            raise ValueError("exclude_concepts has an empty name: name words of captions")
        halvings = len(self.vae.block_out_channels) + len(self.unet.block_out_channels) - 2
        require_divisible("resolution", [self.resolution], 2**halvings, "halvings of the side in autoencoder and UNet")

    def check_inputs(self) -> None:
        """A ValueError for a pretrained_vae that is none, or one of another size than the settings in `vae` say."""
        if self.pretrained_vae is None:
            return
        folder = Path(self.pretrained_vae).expanduser()
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("_class_name") != AutoencoderKL.__name__:
            inside = f": name {str(folder / 'vae')!r}" if (folder / "vae" / "config.json").is_file() else ""
            raise ValueError(f"pretrained_vae {self.pretrained_vae!r} holds no AutoencoderKL{inside}")
        self.require_size(self.pretrained_vae, found["latent_channels"], len(found["block_out_channels"]))

    def require_size(self, folder: str, latent_channels: int, levels: int) -> None:
        """A ValueError for an autoencoder with other latents or levels than the settings in `vae` say."""
        found = {"latent_channels": latent_channels, "levels": levels}
        wanted = {"latent_channels": self.vae.latent_channels, "levels": len(self.vae.block_out_channels)}
        if found != wanted:
            raise ValueError(f"the autoencoder in {folder!r} has {found}, but the settings in `vae` say {wanted}")

    @property
    def announcement(self) -> str:
        """What a run is about to do, in one line."""
        without = f", without {' and '.join(self.exclude_concepts)}" if self.exclude_concepts else ""
        return f"training a small Stable Diffusion from scratch on {self.train_data_dir}{without}"

    def vae_made_from(self, dataset: Dataset) -> dict[str, Any]:
        """All that the autoencoder in work_dir depends on."""
        settings = {**asdict(self.vae), "resolution": self.resolution, "seed": self.seed}
        return {"data": rows_hash(dataset, [self.image_column]), **settings}

    def trainer(self, accelerator: Accelerator, stage: StageConfig, name: str) -> Trainer:
        """The trainer of one of the two stages, with checkpoints of its own in work_dir."""
        return Trainer(accelerator, self, stage=stage, folder=Path(self.work_dir) / f"{name}_training")


def train_vae(accelerator: Accelerator, config: TrainConfig, dataset: Dataset) -> None:
    """Fit the autoencoder on mean absolute + squared error; scaling_factor is set to 1 / std of the latents."""
    settings = config.vae
    levels = len(settings.block_out_channels)
    vae = AutoencoderKL(
        sample_size=config.resolution,
        latent_channels=settings.latent_channels,
        block_out_channels=tuple(settings.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=settings.NUM_GROUPS,
    )
    rows = image_batches(dataset, config.image_column, config.resolution)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    vae.to(memory_format=torch.channels_last)

    loader = shuffled(rows, settings.train_batch_size, config.seed)
    trainer = config.trainer(accelerator, settings, "vae")
    trainer.checkpoints.inputs = {"data": rows_hash(dataset, [config.image_column])}
    (batches,) = trainer.prepare(
        models=[vae], parameters=list(vae.parameters()), optimizer=optimizer, loaders=[loader]
    )

    def terms(step: int) -> dict[str, Tensor]:
        pixels = next(batches)["pixels"]
        with accelerator.autocast():  # neither is the network's forward function
            posterior = vae.encode(pixels).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        squared = F.mse_loss(reconstruction, pixels)
        return {
            "vae/squared": squared,
            "vae/absolute": 0.2 * F.l1_loss(reconstruction, pixels),
            "vae/kl": settings.kl_weight * kl,
        }

    trainer.fit(terms, desc="VAE")
    accelerator.free_memory()  # the next stage's checkpoints hold its own networks alone
    with written_whole(Path(config.work_dir) / "vae") as temporary:
        vae.eval().save_pretrained(temporary)
        write_json(temporary / MADE_FROM, config.vae_made_from(dataset))
    trainer.finish()


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer with random weights for this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(config: TrainConfig) -> UNet2DConditionModel:
    """A UNet with self- and cross-attention at every level, as Stable Diffusion's."""
    levels = len(config.unet.block_out_channels)
    return UNet2DConditionModel(
        sample_size=config.resolution // 2 ** (len(config.vae.block_out_channels) - 1),
        in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        block_out_channels=tuple(config.unet.block_out_channels),
        layers_per_block=config.unet.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.text.hidden_size,
        attention_head_dim=config.unet.attention_head_dim,
        norm_num_groups=config.unet.norm_num_groups,
    )


def shuffled(rows: Any, batch_size: int, seed: int) -> DataLoader:
    """Batches in an order that draws nothing from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch_size, shuffle=True, drop_last=True, generator=generator)


def train_text_to_image(
    accelerator: Accelerator,
    config: TrainConfig,
    *,
    rows: TensorDataset,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    scale: float,
) -> tuple[CLIPTextModel, UNet2DConditionModel, Trainer]:
    """Noise prediction on cached latents; returns the averaged (EMA) text encoder and UNet, and their trainer.

    Args:
        rows: VAE posteriors, and for each the number of its caption.
        captions: distinct ones, the empty prompt first.
        scale: of the latents.
    """
    settings = config.unet
    token_ids = tokenize(tokenizer, captions).to(accelerator.device)
    text_encoder = build_text_encoder(config.text, tokenizer).train()
    unet = build_unet(config).to(memory_format=torch.channels_last).train()
    models = (unet, text_encoder)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    trainer = config.trainer(accelerator, settings, "unet")
    learned = dict(zip(("moments", "captions"), rows.tensors, strict=True))
    trainer.checkpoints.inputs = {"data": fingerprint(tensors_hash(learned), captions)}
    averages = [Averages(m.parameters(), decay=settings.ema_decay, use_ema_warmup=True, power=0.75) for m in models]
    for name, average in zip(("unet", "text_encoder"), averages, strict=True):
        average.to(accelerator.device)
        trainer.checkpoints.states[f"average_{name}"] = average
    loader = shuffled(rows, settings.train_batch_size, config.seed)
    (batches,) = trainer.prepare(models=models, parameters=parameters, optimizer=optimizer, loaders=[loader])

    def terms(step: int) -> dict[str, Tensor]:
        batch_moments, caption_ids = next(batches)
        latents = sample_latents(batch_moments, scale)
        drop = torch.rand(len(caption_ids), device=latents.device) < settings.caption_dropout
        used, inverse = caption_ids.masked_fill(drop, 0).unique(return_inverse=True)
        embeddings = text_encoder(token_ids[used]).last_hidden_state[inverse]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        return {"unet/noise": F.mse_loss(prediction, noise)}

    def average_weights(step: int) -> None:  # after a step's checkpoint, whose averages lack its own weights
        for average, model in zip(averages, models, strict=True):
            average.step(model.parameters())

    if 0 < trainer.first_step < trainer.max_steps:  # at the end of the training they have them
        average_weights(trainer.first_step)
    trainer.fit(terms, after_step=average_weights, desc="UNet")
    accelerator.free_memory()
    for average, model in zip(averages, models, strict=True):
        average.copy_to(model.parameters())
    return text_encoder.eval(), unet.eval(), trainer


def rows_without(captions: list[str], concepts: list[str]) -> list[int]:
    """The numbers of the captions that name none of the concepts; words are compared as `utils/words.py` says.

    Raises:
        ValueError: a concept that no caption names, or no caption is left.
    """
    kept = list(range(len(captions)))
    for concept in concepts:
        named = {row for row, label in enumerate(labels_in_texts(captions, [concept])) if label is not None}
        if not named:
            raise ValueError(f"exclude_concepts names {concept!r}, but no caption does")
        kept = [row for row in kept if row not in named]
    if not kept:
        raise ValueError(f"exclude_concepts {', '.join(concepts)} leaves no row to train on")
    return kept


def require_read(tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    """A ValueError if captions are the same where the tokenizer cuts them; a line if it cuts any.

    Args:
        captions: distinct ones.
    """
    whole: list[list[int]] = tokenizer(captions).input_ids
    length = tokenizer.model_max_length
    cut = [caption for caption, ids in zip(captions, whole, strict=True) if len(ids) > length]
    seen: dict[tuple[int, ...], str] = {}
    for caption, ids in zip(captions, whole, strict=True):
        other = seen.setdefault(tuple(ids[: length - 1]), caption)
        if other != caption and len(ids) > length:
            raise ValueError(
                f"text.max_length is {length}, and {other!r} and {caption!r} are the same as far as they are read: "
                f"raise it to {max(map(len, whole))}"
            )
    if cut:
        print(
            f"{len(cut)} of {len(captions)} captions have more than {length} tokens (text.max_length), like {cut[0]!r}"
        )


def require_made_from(folder: Path, now: dict[str, Any]) -> None:
    """A ValueError for an autoencoder of other data or settings; of an earlier version's, which has no record, a
    warning."""
    record = folder / MADE_FROM
    if not record.is_file():
        print(f"warning: {str(folder)!r} does not say what it was trained on: see yourself that it is this data")
        return
    then = json.loads(record.read_text(encoding="utf-8"))
    other = [name for name, value in json.loads(json.dumps(now)).items() if then.get(name) != value]
    if other:
        raise ValueError(
            f"the autoencoder in {str(folder)!r} was trained with another {' and another '.join(other)}: name another "
            "work_dir, or delete that folder to train it anew"
        )


def open_vae(config: TrainConfig, accelerator: Accelerator, dataset: Dataset) -> AutoencoderKL:
    """The autoencoder that the settings name, or the one in work_dir, which is trained if it is not there.

    Raises:
        ValueError: one for other latents or images than the settings say, or one in work_dir that was trained on other
            data or with other settings.
    """
    folder = Path(config.pretrained_vae or Path(config.work_dir) / "vae")
    if config.pretrained_vae is None:
        if (folder / "config.json").is_file():
            require_made_from(folder, config.vae_made_from(dataset))
        else:
            train_vae(accelerator, config, dataset)
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    config.require_size(str(folder), vae.config.latent_channels, len(vae.config.block_out_channels))
    return vae.to(accelerator.device).eval().requires_grad_(False)


@in_output_folder()
def main(config: TrainConfig) -> None:
    """VAE -> latents -> text encoder and UNet -> pipeline folder."""
    dataset = load_image_text(config.train_data_dir, config.split, config.image_column, config.caption_column)
    captions = list(dataset[config.caption_column])
    known = rows_without(captions, config.exclude_concepts)
    vocabulary = find_clip_vocabulary(config.text.vocabulary_package)
    accelerator = make_accelerator(config, logs_in=config.work_dir, data_seed=None)
    if accelerator.num_processes > 1:
        raise ValueError("this recipe trains in one process: launch it with --num_processes 1")
    output, work = Path(config.output_dir), Path(config.work_dir)
    # a control reads the same words as a model that learned all rows: what it never saw is the pictures
    text = (sorted(set(captions)), config.text.extra_words, config.text.max_length)
    tokenizer = cut_clip_vocabulary(vocabulary, *text, work / "tokenizer")
    require_read(tokenizer, sorted(set(captions)))
    set_seed(config.seed)
    vae = open_vae(config, accelerator, dataset)
    name = f"moments-{fingerprint(dataset._fingerprint, module_hash(vae), config.seed)}.safetensors"
    moments = cached_tensors(
        work / name, lambda: {"moments": encode_moments(vae, dataset, config.image_column, config.resolution)}
    )["moments"]
    if config.pretrained_vae is None:
        scale = 1 / sample_latents(moments[: 2**14], 1.0, torch.Generator().manual_seed(config.seed)).std().item()
        vae.register_to_config(scaling_factor=scale)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    set_seed(config.seed + 1)
    captions = [captions[row] for row in known]
    distinct = ["", *sorted(set(captions))]
    position = {text: index for index, text in enumerate(distinct)}
    text_encoder, unet, trainer = train_text_to_image(
        accelerator,
        config,
        rows=TensorDataset(moments[known], torch.tensor([position[text] for text in captions])),
        captions=distinct,
        tokenizer=tokenizer,
        scheduler=scheduler,
        scale=vae.config.scaling_factor,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(getattr(torch, config.save_dtype))

    def save(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        load_in_float32(folder)

    save_whole(save, output, last="model_index.json")
    write_json(output / "training_config.json", asdict(config))
    trainer.end_run()
    print(f"pipeline saved in {output}")


if __name__ == "__main__":
    run_script(main, TrainConfig)
