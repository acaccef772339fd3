"""What one run of the benchmark is, from data to seeds: everything that decides a result."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from shared_lib.errors import InputError

from .small_models import SIZES


@dataclass(frozen=True)
class Learning:
    """How the target and the retrained model are trained; see ``shared_lib.training.Recipe``."""

    lr: float = 2e-3
    epochs: int = 40
    batch_size: int = 16
    known: float = 0.98


@dataclass(frozen=True)
class Settings:
    """One setting of the benchmark.

    Args:
        name: of its folder and its report.
        form: "short", "full", "pretrained" or "paper"; see ``presets``.
        track: "tofu", "muse" or "wmdp".
        data: a folder in the benchmark's own layout, or a data set of the hub.
        subset: what is forgotten: forget01, forget05, forget10; books, news; the track says.
        model: a size of ``SIZES``, trained from nothing; or a folder or a name of the hub. ``gguf_file`` names the
            file in that folder where it holds one.
        learning: of target and retrained model. None: ``model`` knows the data already, and ``retrained`` is a second
            model that does not.
        authors, passages: how much of the data is taken, from its end; 0 for all.
        blocks: of TOFU: the first author of each target's own block of ``authors``, of which the last are forgotten;
            so the seeds that take another target in turn forget other authors. Empty: the end of the data for all.
        max_length: tokens of a passage.
        targets: how many targets are trained, with seeds of their own; the seeds of unlearning take them in turn.
        methods: ids, as ``methods.parse_method`` reads them.
        lrs, tuning_weights: what the tuning seed tries, each with each.
        weights: what the held-out seeds try: w = gamma with alpha = 1 (for the weighted sum, lambda = 1 / w), in units
            of the largest that may be of use, see ``methods.weight_scale``.
        tuned_at: shares of the target's probability that are kept: learning rate and weight are chosen together, by the
            mean over these of the lowest log p_forget. Empty: see ``stages.select``.
        judged_seeds: of the held-out seeds, those whose chosen runs get full scores and are relearned; empty: all.
        unit_scale: that largest weight for what sees unit gradients; the more steps, the smaller.
        steps, batch_size, accumulation: of unlearning; ``batch_size`` is of each of the two losses.
        looks: how often probabilities are measured along the way, on ``look_rows`` rows of a kind.
        line: whether the straight line from the target to the end of the run is looked at too.
        stop: whether a run ends at the first look at which the rows to forget are as improbable as rows that nobody
            learned are to the target; needs such rows.
        judged_rows, generated_rows: at most so many rows of a kind, beside those to forget, for the benchmark's scores,
            and so many answers.
        relearned_rows, relearning_steps: the attack on every model that gets full scores; 0: none.
        warm_up: share of the steps over which the learning rate rises to what it then stays at.
        lora_rank: of adapters that are trained in place of the model's own weights; 0: none.
        embeddings: "frozen": the token embeddings are not trained; "only": nothing else is; "trained": they too,
            beside adapters. Empty: as all weights are, and with adapters not.
        beta: of NPO and DPO; ``simnpo_beta`` and ``steering`` likewise.
        layers: of RMU: the trained ones, ending with the steered one.
        device, dtype: of the models while they unlearn and are judged; training is in float32.
        prefix: of the muse track: tokens of a passage that are shown before the model says the rest.
        retain_data, questions, utility_questions: of the wmdp track: other sources than ``data`` for what is kept, and
            for the questions about either.
    """

    name: str
    form: str
    track: str
    data: str
    subset: str
    model: str = "1m"
    gguf_file: str = ""
    retrained: str = ""
    learning: Learning | None = Learning()
    authors: int = 0
    blocks: tuple[int, ...] = ()
    passages: int = 0
    max_length: int = 256
    targets: int = 1
    methods: tuple[str, ...] = ()
    lrs: tuple[float, ...] = (3e-4, 1e-3)
    tuning_weights: tuple[float, ...] = (0.3, 0.03)
    weights: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01)
    unit_scale: float = 3.0
    tuned_at: tuple[float, ...] = ()
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    judged_seeds: tuple[int, ...] = ()
    steps: int = 50
    batch_size: int = 16
    accumulation: int = 1
    looks: int = 5
    look_rows: int = 100
    line: bool = False
    stop: bool = False
    judged_rows: int = 400
    generated_rows: int = 100
    relearned_rows: int = 10
    relearning_steps: int = 20
    warm_up: float = 0.1
    lora_rank: int = 0
    embeddings: str = ""
    beta: float = 0.1
    simnpo_beta: float = 2.5
    steering: float = 6.5
    layers: tuple[int, ...] = (0, 1)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    prefix: int = 32
    retain_data: str = ""
    questions: str = ""
    utility_questions: str = ""

    @property
    def is_small(self) -> bool:
        """Whether the model is trained from nothing, with a tokenizer of its own."""
        return self.model in SIZES

    def trained_at(self, lr: float) -> "Settings":
        """Return the same with another learning rate for target and retrained model.

        Raises:
            InputError: none is trained.
        """
        if self.learning is None:
            raise InputError(f"--training-lr must be left out with --form {self.form}, whose models know their data.")
        return replace(self, learning=replace(self.learning, lr=lr))

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` takes."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Settings":
        """Return the settings that ``to_json`` gave."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        learning = values.pop("learning")
        return replace(Settings(**values), learning=Learning(**learning) if learning else None)
