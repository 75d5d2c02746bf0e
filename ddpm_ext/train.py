"""Train a class-conditional DDPM with label dropout, so that it can be guided.

    accelerate launch -m ddpm_ext.train --config ddpm_ext/configs/train_fashion.yaml

Any field of `TrainConfig` is a dotted flag. output_dir becomes a pipeline folder (pipeline.py) with manifest.json and
the loss curve beside it. `--exclude_labels '[sneaker]'` trains the model that never saw a label: the yardstick of
unlearning.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from barrier_diffusers.data.labelled_images import LabelledImages, LabelledSource, as_pixels, load_labelled
from barrier_diffusers.evaluation.pictures import loss_curves
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.training.trainer import Averages, Trainer, open_run
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME, manifest
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import TrainConfig


def build_unet(config: TrainConfig, num_labels: int) -> UNet2DModel:
    """A UNet with random weights and one class embedding per label plus one for "no label"."""
    unet, channels = config.unet, config.num_channels * config.unet.patch_size**2
    return UNet2DModel(
        sample_size=config.resolution // unet.patch_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(unet.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in unet.attention_levels),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(unet.attention_levels)),
        layers_per_block=unet.layers_per_block,
        attention_head_dim=unet.attention_head_dim,
        norm_num_groups=unet.norm_num_groups,
        dropout=unet.dropout,
        num_class_embeds=num_labels + 1,
    )


def training_rows(config: TrainConfig) -> LabelledImages:
    """The training images, without those of excluded labels; the labels' names and numbers stay as they are.

    Raises:
        ValueError: an excluded label that there is not, or nothing left to train on.
    """
    data = config.data
    source = LabelledSource(data.source, data.split, data.image_column, data.label_column)
    rows = load_labelled(source, config.resolution, config.num_channels)
    excluded = torch.tensor([rows.index_of(label) for label in config.exclude_labels], dtype=torch.long)
    kept = rows[(~torch.isin(rows.labels, excluded)).nonzero().flatten()]
    if len(kept) < config.train_batch_size:
        raise ValueError(f"{len(kept)} images are left to train on, fewer than train_batch_size")
    return kept


def drop_labels(labels_B: Tensor, share: float, null_label: int) -> Tensor:
    """Each label replaced by `null_label` with probability `share`."""
    return torch.where(torch.rand(labels_B.shape, device=labels_B.device) < share, null_label, labels_B)


def plain_attention(unet: nn.Module) -> None:
    """Attention as matrix products: the backward pass of PyTorch's fused one takes half of a bf16 step on a CPU."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def shuffled(rows: LabelledImages, config: TrainConfig) -> DataLoader:
    """Shuffled (bytes, labels) in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    pairs = TensorDataset(rows.images, rows.labels)
    return DataLoader(pairs, config.train_batch_size, shuffle=True, drop_last=True, generator=generator)


@in_output_folder()
def main(config: TrainConfig) -> None:
    """Load -> train -> save the averaged weights as a pipeline."""
    trainer = Trainer(open_run(config), config)
    accelerator, output = trainer.accelerator, Path(config.output_dir)
    with accelerator.main_process_first():
        rows = training_rows(config)
    set_seed(config.seed)
    unet = build_unet(config, len(rows.names))
    if accelerator.device.type == "cpu" and config.mixed_precision == "bf16":
        plain_attention(unet)
    noising = DDPMScheduler(num_train_timesteps=config.num_train_timesteps)
    sampler = DDIMScheduler.from_config(noising.config, timestep_spacing="trailing")
    pipeline = ClassConditionalDDPMPipeline(unet, sampler, rows.names, config.unet.patch_size)
    if accelerator.process_index:
        set_seed(config.seed + accelerator.process_index)
    unet.to(accelerator.device)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    averages = Averages(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    averages.to(accelerator.device)
    optimizer.register_step_post_hook(lambda *_: averages.step(parameters))
    trainer.checkpoints.states["averages"] = averages
    trainer.checkpoints.inputs = {"data": rows.digest()}
    (batches,) = trainer.prepare(
        models=[unet], parameters=parameters, optimizer=optimizer, loaders=[shuffled(rows, config)]
    )
    model = trainer.models[0].train()

    def noise_error(step: int) -> dict[str, Tensor]:
        images, labels = next(batches)
        pixels = as_pixels(images)
        if config.random_flip:
            mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        clean = pipeline.to_patches(pixels)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(config.num_train_timesteps, (len(clean),), device=clean.device)
        condition = drop_labels(labels, config.label_dropout, pipeline.null_label)
        prediction = model(noising.add_noise(clean, noise, timesteps), timesteps, class_labels=condition).sample
        return {"loss": F.mse_loss(prediction.float(), noise)}

    seconds = trainer.fit(noise_error, desc="training")
    if accelerator.is_main_process:
        averages.copy_to(parameters)
        last = trainer.history.values["loss"][-100:]
        facts = {
            "num_steps": trainer.max_steps,
            "seconds_training": seconds,
            "num_images": len(rows),
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "loss_of_the_last_100_steps": round(sum(last) / len(last), 5),
        }
        pipeline.to(getattr(torch, config.save_dtype))
        save_whole(pipeline.save_pretrained, output, last="model_index.json")
        loss_curves(trainer.history.values, output / "loss_curves.png")
        hashes = {"data": rows.digest(), **module_hashes(pipeline)}
        write_json(output / MANIFEST_NAME, manifest(config, hashes, **facts))
        print(f"pipeline: {output}")
    trainer.end_run()


if __name__ == "__main__":
    run_script(main, TrainConfig)
