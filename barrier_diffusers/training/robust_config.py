"""RobustConfig: what training does so that an attacker cannot bring the concept back (docs/method.md section 8).

Annotations are evaluated at once, as in run_config.py.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar, Literal

from barrier_diffusers.utils.checks import ABOVE_0, SHARE, Checked, Range, at_least, rules


@dataclass
class MetaStep(Checked):
    """The meta step against relearning, off by default, of whatever model is trained."""

    # a relearner fine-tunes the network on a few forget images (a classifier on as many others, too) for so many
    # steps, one of these numbers at a time, and the gradient of the erasing loss after it is added to the one before;
    # empty: none does
    meta_steps: list[int] = field(default_factory=list)
    # how often one relearner is met, one of these numbers at a time: it goes on from where it was, so that a few steps
    # each time lead far, while the weights move beneath it; [1]: a new one each time
    meta_lives: list[int] = field(default_factory=lambda: [1])
    meta_every: int = 1  # it does so in every so many steps
    meta_weight: float = 1.0  # of the gradient after relearning
    # of the relearner's optimizer (Adam; a classifier's SGD), one at a time
    meta_learning_rates: list[float] = field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3])
    meta_num_images: int = 10  # forget images that it learns from, drawn anew each time

    SECTION = "robust."
    NOT_EMPTY: ClassVar[tuple[str, ...]] = ("meta_lives", "meta_learning_rates")
    RULES = rules(
        meta_steps=at_least(1),
        meta_lives=at_least(1),
        meta_every=at_least(1),
        meta_weight=ABOVE_0,
        meta_learning_rates=ABOVE_0,
        meta_num_images=at_least(1),
    )

    @property
    def has_lives(self) -> bool:
        """Whether a relearner is met more than once, so that it travels with a checkpoint."""
        return any(life > 1 for life in self.meta_lives)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.NOT_EMPTY:
            if not getattr(self, name):
                raise ValueError(f"robust.{name} is empty, but must hold at least one value")


@dataclass
class RobustConfig(MetaStep):
    """Robust training, in parts that are off by default. Each works beside every objective that trains."""

    # what the relearner moves: the weights that train here; the factors of a LoRA adapter that is thrown away, which
    # takes a third less time and no copy; or one of the two at random
    meta_weights: Literal["trained", "adapter", "either"] = "trained"
    meta_adapter_learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # where it has one
    meta_adapter_rank: int = 8  # of that adapter
    # maps that the adapter is on, named as barrier.targets
    meta_adapter_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    meta_token_share: float = 0.0  # of the relearners whose captions have a learned token in place of the name
    # new tokens are learned against the network as it is, once after every so many steps; forget prompts then have one
    # of them, or the concept's name
    token_rounds: int = 0  # tokens that are learned in all; 0: none
    token_interval: int = 60  # steps from one to the next, and before the first
    token_share: float = 0.5  # of the forget prompts that have a learned token
    # where they start, in turn: name (the concept's), random (tokens of the vocabulary), or words of your own
    token_starts: list[str] = field(default_factory=lambda: ["name", "random"])
    token_count: int = 1  # new tokens that stand for the concept together
    token_num_steps: int = 100  # of AdamW, that a round learns for
    token_batch_size: int = 32  # forget images in each of them
    token_learning_rate: float = 1e-2  # of the embeddings
    # steps that follow the run's own, at most: training goes on, token_interval steps at a time, as long as by the
    # concept's name or a learned one half or more of the objective's loss is left; 0: it ends, erased or not
    extra_steps: int = 0
    # share of a fresh initialisation in the weights at the start, from where the base is distilled back; 0: none
    fresh_share: float = 0.0
    # the objective's gradient is taken at weights that lie this far (Euclidean distance over all that trains) towards
    # the forget images; 0: at the weights themselves
    sharpness: float = 0.0
    # forget prompts are perturbed against the objective, by at most this share of each token embedding's length; 0: no
    context_radius: float = 0.0
    # where the gradient of the erasing parts points against the retain loss's, that component is taken out
    project_conflicts: bool = False

    NOT_EMPTY = (*MetaStep.NOT_EMPTY, "meta_adapter_learning_rates", "meta_adapter_targets", "token_starts")
    RULES = rules(
        meta_adapter_learning_rates=ABOVE_0,
        meta_adapter_rank=Range(1, 4096),
        meta_token_share=SHARE,
        token_rounds=at_least(0),
        token_interval=at_least(1),
        token_share=Range(0, 1, without_low=True),
        token_count=at_least(1),
        token_num_steps=at_least(1),
        token_batch_size=at_least(1),
        token_learning_rate=ABOVE_0,
        extra_steps=at_least(0),
        fresh_share=SHARE,
        sharpness=at_least(0),
        context_radius=at_least(0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(start.strip() for start in self.token_starts):
            raise ValueError("robust.token_starts holds empty words: write name, random, or some words")
        if self.meta_token_share and not (self.meta_steps and self.token_rounds):
            raise ValueError("robust.meta_token_share needs robust.meta_steps and robust.token_rounds")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        for name in (one.name for one in fields(self)):
            part = next((part for prefix, part in self.READ_BY.items() if name.startswith(prefix)), None)
            made = type(self).__dataclass_fields__[name].default_factory
            default = getattr(type(self), name) if made is MISSING else made()
            if part is None or name in self.PARTS or getattr(self, name) == default:
                continue
            if not getattr(self, part) and not getattr(self, self.ALSO_READ_BY.get(name, part)):
                raise ValueError(f"robust.{name} is set, but nothing reads it: it is for robust.{part}, which is off")
            if name.startswith("meta_adapter_") and self.meta_weights == "trained":
                raise ValueError(f"robust.{name} is set, but nothing reads it: robust.meta_weights is 'trained'")
            if name == "meta_learning_rates" and self.meta_weights == "adapter":
                raise ValueError(f"robust.{name} is set, but nothing reads it: robust.meta_weights is 'adapter'")

    def check_rounds(self, num_steps: int) -> None:
        """A ValueError if the last token would be learned when a run of so many steps has ended."""
        last = self.token_rounds * self.token_interval
        if last >= num_steps:
            raise ValueError(
                f"the last of robust.token_rounds is after step {last}, but the run has {num_steps}: lower "
                "robust.token_rounds or robust.token_interval"
            )

    READ_BY: ClassVar = {"meta_": "meta_steps", "token_": "token_rounds"}  # what settings begin with -> their part
    ALSO_READ_BY: ClassVar = {"meta_num_images": "sharpness", "token_interval": "extra_steps"}
    PARTS: ClassVar = ("meta_steps", "token_rounds", "fresh_share", "sharpness", "context_radius", "project_conflicts")

    @property
    def parts(self) -> list[str]:
        """The settings that are switched on."""
        return [name for name in self.PARTS if getattr(self, name)]

    @property
    def summary(self) -> str:
        """What a run's announcement adds."""
        return f"; robust: {', '.join(self.parts)}" if self.parts else ""

    @property
    def has_adapter(self) -> bool:
        """Whether a relearner may train an adapter."""
        return bool(self.meta_steps) and self.meta_weights != "trained"

    @property
    def learns_images(self) -> bool:
        """Whether a part fine-tunes the network on forget images."""
        return bool(self.meta_steps) or self.sharpness > 0

    @property
    def reads_forget_images(self) -> bool:
        """Whether a part learns from forget images, also beside an objective that needs none."""
        return self.learns_images or self.token_rounds > 0
