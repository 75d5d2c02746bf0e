"""The pipelines that can be unlearned, a file per family; `models/architectures.py` is the table of all of them."""
