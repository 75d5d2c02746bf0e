"""Retraining from scratch on the retained images: what every other method is measured against."""

from classification_ext.methods.base import METHODS, Method

METHODS.register(Method("retrain"))  # new weights, the recipe and epochs of the settings: see unlearn.py
