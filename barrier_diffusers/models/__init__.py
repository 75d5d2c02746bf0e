"""Pipelines as training sees them: architectures, denoiser, noising, generation, loading and publishing."""
