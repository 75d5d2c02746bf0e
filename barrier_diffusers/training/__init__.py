"""Trainer, steps, checkpoints and masks."""
