"""Thin adapter: BARRIER on image classifiers. The method itself is in barrier_diffusers."""
