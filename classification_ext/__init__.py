"""Thin adapter: BARRIER on image classifiers. train.py, unlearn.py, evaluate.py; the method is in barrier_diffusers."""
