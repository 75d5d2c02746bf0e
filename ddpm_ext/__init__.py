"""Thin adapter: BARRIER on class-conditional DDPMs. train.py, unlearn.py, sample.py, evaluate.py."""
