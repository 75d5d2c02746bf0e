"""Train a small Stable Diffusion from scratch (VAE, text encoder, UNet) and save a genuine StableDiffusionPipeline.

Stages: VAE on pixels -> its posteriors cached -> text encoder and UNet trained together on noise prediction, with an
exponential moving average -> pipeline folder. A VAE that is already in work_dir is not trained again, and
`--resume_from_checkpoint latest` goes on with whatever stage was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from barrier_diffusers.data.encoding import cached_tensors, encode_moments, image_batches, tokenize
from barrier_diffusers.data.readers import load_image_text
from barrier_diffusers.models.noising import sample_latents
from barrier_diffusers.models.vocabulary import cut_clip_vocabulary, find_clip_vocabulary
from barrier_diffusers.training.scratch import Averages, Training
from barrier_diffusers.utils.checks import require_positive
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import require_writable, write_json, written_whole
from barrier_diffusers.utils.run_records import fingerprint


@dataclass
class VaeConfig:
    """The autoencoder: 32 x 32 pixels <-> 4 x 8 x 8 latents with three levels."""

    block_out_channels: list[int] = field(default_factory=lambda: [24, 48, 64])  # halves the side at each step but one
    latent_channels: int = 4
    max_train_steps: int = 1600
    train_batch_size: int = 64
    learning_rate: float = 2e-3  # peak of the one-cycle schedule
    kl_weight: float = 1e-5  # per latent element; keeps the latents near a unit Gaussian without blurring


@dataclass
class TextConfig:
    """The CLIP text encoder, and the words its tokenizer keeps whole."""

    hidden_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
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


@dataclass
class UnetConfig:
    """The noise predictor and its training."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    layers_per_block: int = 1
    attention_head_dim: int = 4  # number of heads: diffusers' historical name
    norm_num_groups: int = 16
    max_train_steps: int = 5000
    train_batch_size: int = 128
    learning_rate: float = 1.5e-3  # peak of the one-cycle schedule
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    caption_dropout: float = 0.1  # share of captions replaced by "" for classifier-free guidance


@dataclass
class TrainConfig:
    """Everything the recipe depends on."""

    train_data_dir: str = "runs/fashion_mnist"  # folder or hub name with an image and a caption column
    output_dir: str = "assets/fashion_sd"  # becomes the pipeline folder
    work_dir: str = "runs/fashion_sd_work"  # trained VAE, cached latents, logs
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 32
    seed: int = 0
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float16"  # of the written weights
    checkpointing_steps: int | None = None  # None: a checkpoint only when a signal stops the run
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: Literal["latest"] | None = None
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)

    def __post_init__(self) -> None:
        require_positive(self)
        require_positive(self.vae, label="vae.{}")
        require_positive(self.unet, label="unet.{}")


def train_vae(accelerator: Accelerator, config: TrainConfig, dataset: Dataset) -> AutoencoderKL:
    """Fit the autoencoder on mean absolute + squared error; scaling_factor is set to 1 / std of the latents."""
    settings = config.vae
    levels = len(settings.block_out_channels)
    vae = AutoencoderKL(
        sample_size=config.resolution,
        latent_channels=settings.latent_channels,
        block_out_channels=tuple(settings.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
    )
    rows = image_batches(dataset, config.image_column, config.resolution)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    vae.to(memory_format=torch.channels_last)

    def terms(batch: dict[str, Tensor], models: Sequence[nn.Module]) -> dict[str, Tensor]:
        pixels, network = batch["pixels"], models[0]
        posterior = network.encode(pixels).latent_dist
        reconstruction = network.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        squared = F.mse_loss(reconstruction, pixels)
        return {
            "vae/squared": squared,
            "vae/absolute": 0.2 * F.l1_loss(reconstruction, pixels),
            "vae/kl": settings.kl_weight * kl,
        }

    folder = Path(config.work_dir) / "vae_training"
    Training(accelerator, config, settings, folder).run([vae], optimizer, rows, terms, desc="VAE")
    return vae.eval()


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


def train_text_to_image(
    accelerator: Accelerator,
    config: TrainConfig,
    moments: Tensor,
    captions: list[str],
    tokenizer,
    scheduler,
    scale: float,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Noise prediction on cached latents; returns the averaged (EMA) text encoder and UNet."""
    settings = config.unet
    distinct = ["", *sorted(set(captions))]
    position = {text: index for index, text in enumerate(distinct)}
    token_ids = tokenize(tokenizer, distinct).to(accelerator.device)
    rows = TensorDataset(moments, torch.tensor([position[text] for text in captions]))
    text_encoder = build_text_encoder(config.text, tokenizer).train()
    unet = build_unet(config).to(memory_format=torch.channels_last).train()
    models = (unet, text_encoder)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    training = Training(accelerator, config, settings, Path(config.work_dir) / "unet_training")
    averages = [Averages(m.parameters(), decay=settings.ema_decay, use_ema_warmup=True, power=0.75) for m in models]
    for name, average in zip(("unet", "text_encoder"), averages, strict=True):
        average.to(accelerator.device)
        training.checkpoints.states[f"average_{name}"] = average

    def terms(batch: tuple[Tensor, Tensor], models: Sequence[nn.Module]) -> dict[str, Tensor]:
        batch_moments, caption_ids = batch
        latents = sample_latents(batch_moments, scale)
        drop = torch.rand(len(caption_ids), device=latents.device) < settings.caption_dropout
        used, inverse = caption_ids.masked_fill(drop, 0).unique(return_inverse=True)
        embeddings = models[1](token_ids[used]).last_hidden_state[inverse]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        prediction = models[0](scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        return {"unet/noise": F.mse_loss(prediction, noise)}

    def average_weights() -> None:  # before the next step, so that a checkpoint's averages lack its own weights
        for average, model in zip(averages, models, strict=True):
            average.step(model.parameters())

    training.run(models, optimizer, rows, terms, average_weights, desc="UNet")
    for average, model in zip(averages, models, strict=True):
        average.copy_to(model.parameters())
    return text_encoder.eval(), unet.eval()


def main(config: TrainConfig) -> None:
    """VAE -> latents -> text encoder and UNet -> pipeline folder."""
    dataset = load_image_text(config.train_data_dir, config.split, config.image_column, config.caption_column)
    vocabulary = find_clip_vocabulary(config.text.vocabulary_package)
    for folder in (config.output_dir, config.work_dir):
        require_writable(folder)
    accelerator = Accelerator(
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.work_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    output, work = Path(config.output_dir), Path(config.work_dir)
    accelerator.init_trackers("logs")
    set_seed(config.seed)
    if not (work / "vae" / "config.json").is_file():
        vae = train_vae(accelerator, config, dataset)
        if accelerator.is_main_process:
            with written_whole(work / "vae") as temporary:
                vae.save_pretrained(temporary)
        accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(accelerator.device).eval().requires_grad_(False)
    name = f"moments-{fingerprint(dataset._fingerprint, asdict(config.vae), config.seed)}.safetensors"
    moments = cached_tensors(
        work / name, lambda: {"moments": encode_moments(vae, dataset, config.image_column, config.resolution)}
    )["moments"]
    scale = 1 / sample_latents(moments[: 2**14], 1.0, torch.Generator().manual_seed(config.seed)).std().item()
    vae.register_to_config(scaling_factor=scale)
    captions = list(dataset[config.caption_column])
    text = (sorted(set(captions)), config.text.extra_words, config.text.max_length)
    tokenizer = cut_clip_vocabulary(vocabulary, *text, work / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    set_seed(config.seed + 1)
    text_encoder, unet = train_text_to_image(accelerator, config, moments, captions, tokenizer, scheduler, scale)
    if accelerator.is_main_process:
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
        pipeline.to(getattr(torch, config.save_dtype)).save_pretrained(output)
        write_json(output / "training_config.json", asdict(config))
        print(f"pipeline saved in {output}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, TrainConfig)
