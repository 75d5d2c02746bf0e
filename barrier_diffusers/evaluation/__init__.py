"""Judges, protocols, attacks, certificate runs and reports."""
