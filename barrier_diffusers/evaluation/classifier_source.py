"""Where the classifier that judges images comes from: a folder of an AttributeClassifier, or a folder or hub id of an
image classifier of transformers, or of a CLIP-like model that is asked with texts (zero-shot, arXiv 2103.00020).

Shapes: N images, H height, W width, K labels of the network, J labels that are judged, D embedding features.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from barrier_diffusers.evaluation.classifier import (
    AttributeClassifier,
    ImageClassifier,
    JointClassifier,
    joint_attributes,
    with_joint,
)
from barrier_diffusers.utils.failures import one_line
from barrier_diffusers.utils.files import reading_tensors
from barrier_diffusers.utils.hub import require_on_hub
from barrier_diffusers.utils.words import as_compared, same_name

LABEL = "class"  # the one attribute of a classifier that has no others
TEMPLATE = "a photo of a {}"  # what a CLIP is asked for a label without a text of its own

Labels = Mapping[str, Sequence[str]]


def first_names(own: Sequence[str]) -> list[str]:
    """The labels of a network as people say them: the first of several synonyms ("tench, Tinca tinca"), the whole
    where that is another label's, too, and with its number where even that is.

    >>> first_names(["tench, Tinca tinca", "crane, crane bird", "crane", "nail", "nail"])
    ['tench', 'crane, crane bird', 'crane', 'nail', 'nail (4)']
    """
    short = [label.split(",")[0].strip() for label in own]
    counts = Counter(as_compared(name) for name in short)
    names = [label if counts[as_compared(name)] > 1 else name for label, name in zip(own, short, strict=True)]
    return [f"{name} ({row})" if name in names[:row] else name for row, name in enumerate(names)]


def groups_of(own: Sequence[str], names: Labels) -> dict[str, list[int]]:
    """Label that is judged -> the numbers of the network's labels that mean it; labels without a name keep theirs.

    Args:
        own: the network's labels, synonyms separated by commas.
        names: label -> those of the network that mean it, none if one is called like it.

    Raises:
        ValueError: a label that the network does not have, or one that two names claim.
    """
    synonyms = [[label, *(part.strip() for part in label.split(","))] for label in own]
    groups: dict[str, list[int]] = {}
    owners: dict[int, str] = {}
    for name, members in names.items():
        groups[name] = []
        for member in members or [name]:
            whole = [row for row, label in enumerate(own) if same_name(label, member)]
            numbers = whole or [
                row for row, known in enumerate(synonyms) if any(same_name(word, member) for word in known)
            ]
            if not numbers:
                raise ValueError(f"it has no label {member!r}, which is to mean {name!r}")
            for number in numbers:
                if owners.setdefault(number, name) != name:
                    raise ValueError(f"its label {own[number]!r} would mean both {owners[number]!r} and {name!r}")
                groups[name].append(number)
    for row, label in enumerate(first_names(own)):
        if row not in owners:
            groups[f"{label} ({row})" if label in groups else label] = [row]
    return groups


class ProcessedClassifier(ImageClassifier):
    """A network of transformers, which is shown images as its own processor prepares them.

    Args:
        network: what is asked.
        processor: its image processor.
        labels: that it knows.
    """

    batch_size = 32

    def __init__(self, network: Any, processor: Any, labels: Sequence[str]):
        super().__init__()
        self.network, self._processor = network, processor
        self.attributes, self.resolution = {LABEL: list(labels)}, side_of_processor(processor)

    def pixels(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) as the network's own processor prepares them."""
        return self._processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]


class PretrainedClassifier(ProcessedClassifier):
    """An image classifier of transformers; the probability of a label is the sum over those of the network's that
    mean it.

    Args:
        network: of class AutoModelForImageClassification.
        processor: its image processor.
        groups: label -> numbers of the network's labels.
    """

    def __init__(self, network: nn.Module, processor: Any, groups: Mapping[str, Sequence[int]]):
        super().__init__(network, processor, list(groups))
        self._groups = list(groups.values())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Prepared images -> logits (N, J): of a label with several of the network's, their log-sum-exp."""
        logits_NK = self.network(pixel_values=pixels).logits
        return {LABEL: torch.stack([logits_NK[:, group].logsumexp(1) for group in self._groups], dim=1)}


class ZeroShotClassifier(ProcessedClassifier):
    """A CLIP-like model that is shown images beside texts; a label's texts count as the mean of their directions.

    Args:
        network: with `get_image_features`, `get_text_features` and `logit_scale`.
        processor: its image processor.
        tokenizer: its tokenizer.
        texts: label -> what it is asked with.
    """

    def __init__(self, network: Any, processor: Any, tokenizer: Any, texts: Labels):
        super().__init__(network, processor, list(texts))
        directions = []
        longest = network.config.text_config.max_position_embeddings
        with torch.no_grad():
            for text in texts.values():
                tokens = tokenizer(list(text), padding=True, truncation=True, max_length=longest, return_tensors="pt")
                directions.append(
                    nn.functional.normalize(embedding(network.get_text_features(**tokens)), dim=1).mean(0)
                )
        self.register_buffer("directions", nn.functional.normalize(torch.stack(directions), dim=1))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Prepared images -> logits (N, J): scaled cosines between an image and the labels' texts."""
        features = nn.functional.normalize(embedding(self.network.get_image_features(pixel_values=pixels)), dim=1)
        return {LABEL: self.network.logit_scale.exp() * features @ self.directions.T}


def embedding(output: Any) -> Tensor:
    """Projected embeddings (N, D), which transformers gives as a tensor or inside an output, by version."""
    return output if isinstance(output, Tensor) else output.pooler_output


def side_of_processor(processor: Any) -> int:
    """Side in pixels of the images that an image processor makes."""
    size = getattr(processor, "crop_size", None) or processor.size
    values = dict(size)
    return int(values.get("height") or values["shortest_edge"])


@dataclass(frozen=True)
class ClassifierSource:
    """A classifier by the name of its folder or hub repository, with what its labels are called here.

    Args:
        name: folder or hub id.
        labels: label -> the network's labels that mean it (an image classifier), or texts (CLIP); an empty list: the
            label called like it, or "a photo of a LABEL". An AttributeClassifier has its own.
        setting: that names it, for messages.
    """

    name: str
    labels: Labels = field(default_factory=dict)
    setting: str = "evaluation.classifier"

    def attributes(self, wanted: Sequence[str] = ()) -> dict[str, list[str]]:
        """Attribute -> its labels; no weights are read.

        Args:
            wanted: labels, spelled as they will be asked for.

        Raises:
            ValueError: nothing that judges images has this name, or its labels are not as the settings say.
        """
        own = self._own_attributes()
        if own is not None:
            joint = joint_attributes(own, wanted)
            return with_joint(own, joint) if joint else own
        config = self._config()
        return {LABEL: list(self._texts(config, wanted) if is_clip(config) else self._groups(config, wanted))}

    def load(self, wanted: Sequence[str] = ()) -> ImageClassifier:
        """The classifier in eval mode; draws no random number. Only safetensors are read.

        Raises:
            ValueError: as `attributes`, or weights that cannot be had.
        """
        with torch.random.fork_rng(), reading_tensors(Path(self.name).expanduser()):  # building draws first weights
            if self._own_attributes() is not None:
                own = AttributeClassifier.from_pretrained(str(self._path or self.name)).eval()
                joint = joint_attributes(own.attributes, wanted)
                return JointClassifier(own, joint).eval() if joint else own
            config, source = self._config(), str(self._path or self.name)
            options: dict[str, Any] = {"trust_remote_code": False}
            try:
                processor = AutoImageProcessor.from_pretrained(source, **options)
                loader = AutoModel if is_clip(config) else AutoModelForImageClassification
                network = loader.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **options)
                tokenizer = AutoTokenizer.from_pretrained(source, **options) if is_clip(config) else None
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.setting} {self.name!r} cannot be loaded: {one_line(error)}") from error
        if is_clip(config):
            made: ImageClassifier = ZeroShotClassifier(network, processor, tokenizer, self._texts(config, wanted))
        else:
            made = PretrainedClassifier(network, processor, self._groups(config, wanted))
        return made.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _path(self) -> Path | None:
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    def _own_attributes(self) -> dict[str, list[str]] | None:
        """Those of an AttributeClassifier; None of something else."""
        try:
            found = json.loads(((self._path or Path(self.name)) / "config.json").read_text(encoding="utf-8"))
            attributes = {str(key): [str(label) for label in value] for key, value in found["attributes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if self.labels:
            raise ValueError(
                f"{self.setting} {self.name!r} is an AttributeClassifier, which has its own labels: leave "
                f"{self._labels_setting} out"
            )
        return attributes

    @property
    def _labels_setting(self) -> str:
        return self.setting.rpartition(".")[0] + ".labels" if "." in self.setting else "labels"

    def _config(self) -> PreTrainedConfig:
        kinds = "an AttributeClassifier, an image classifier of transformers, or a CLIP"
        try:
            path = self._path
            config = hub_config(self.name) if path is None else read_config(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.setting} {self.name!r} is not {kinds}: {one_line(error)}") from error
        if is_clip(config) or any(name.endswith("ForImageClassification") for name in config.architectures or []):
            return config
        what = ", ".join(config.architectures or [type(config).__name__])
        raise ValueError(f"{self.setting} {self.name!r} holds {what}: name {kinds}")

    def _groups(self, config: PreTrainedConfig, wanted: Sequence[str]) -> dict[str, list[int]]:
        names: Any = config.id2label
        own = [str(names[number]) for number in range(len(names))]
        known = [word for label in own for word in (label, *label.split(","))]
        spelled: dict[str, list[str]] = {
            label: [] for label in wanted if label not in self.labels and any(same_name(label, w) for w in known)
        }
        try:
            return groups_of(own, {**spelled, **self.labels})
        except ValueError as error:
            raise ValueError(f"{self._labels_setting} does not fit {self.name!r}: {error}") from error

    def _texts(self, config: PreTrainedConfig, wanted: Sequence[str]) -> dict[str, list[str]]:
        if len(self.labels) < 2:
            raise ValueError(
                f"{self.setting} {self.name!r} is asked with texts: set {self._labels_setting}, two labels or more, "
                "each with a list of texts (an empty one: 'a photo of a LABEL')"
            )
        return {label: list(texts) or [TEMPLATE.format(label)] for label, texts in self.labels.items()}


def read_config(source: str) -> PreTrainedConfig:
    """The configuration of a folder or of a repository on the hub; none of its code runs."""
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


@functools.cache  # every check and every stage of a workflow asks for it, and the hub for a second each time
def hub_config(name: str) -> PreTrainedConfig:
    """The configuration of a repository on the hub, as it was when this process first asked.

    Raises:
        ValueError, OSError: it cannot be had; the next call asks again.
    """
    require_on_hub(name)
    return read_config(name)


def is_clip(config: PreTrainedConfig) -> bool:
    """Whether a model embeds images and texts in one space."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config")
