"""The arguments of a Trainer that unlearns: losses and BLUR's options, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blur_optim.integrations.trainer_step import blur_options
from blur_optim.losses.checks import check_positive

try:
    from transformers import TrainingArguments
except ImportError as error:
    raise ImportError(
        "`transformers` and `accelerate` must be installed for BLURTrainer. `pip install 'blur_optim[transformers]'`."
    ) from error

REFERENCE_FILE = "reference.safetensors"


@dataclass
class BLURArguments:
    """The losses and BLUR's options (arXiv:2506.08164), to be mixed into ``TrainingArguments``, before it in the bases.

    They are read when a run begins, so a hyperparameter search may set them, or a user between two runs.

    ``max_grad_norm`` is the Trainer's own clipping, of the update u: the Trainer takes that norm for its log whether it
    clips or not, so BLUR's closed form would save nothing, and this one works under every precision and wrapper. With
    ``metric="retain"`` the Trainer's default of 1 may clip every step, which is a smaller learning rate: it is then
    said, and ``max_grad_norm=0`` switches it off.

    Raises:
        ValueError: a value is out of range, or ``stash="recompute"``, which a Trainer's step does not allow.
        TypeError: a value is of the wrong type.
    """

    forget_loss: str = field(
        default="npo",
        metadata={
            "help": "'ga', 'npo', 'simnpo', 'dpo', 'idk', or 'margin', which goes with the metric 'retain' or a gamma "
            "of about 0.01; a function goes to BLURTrainer."
        },
    )
    retain_loss: str = field(default="nll", metadata={"help": "'nll' or 'kl'; a function goes to BLURTrainer."})
    beta: float | None = field(
        default=None, metadata={"help": "Inverse temperature of npo and dpo (default 0.1), simnpo (default 2.5)."}
    )
    simnpo_delta: float = field(default=0.0, metadata={"help": "Reward margin of simnpo."})
    gamma: float = field(
        default=1.0,
        metadata={"help": "Weight of the forget gradient, >= 0; in the metric 'retain' its step in units of the rate."},
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain gradient, the paper's alpha."})
    rule: str = field(default="blur", metadata={"help": "How the two gradients combine; see docs/method.md."})
    normalize: bool = field(default=False, metadata={"help": "Apply the rule to gradients of length 1."})
    scope: str = field(default="global", metadata={"help": "Over what to compare: 'global', 'group', 'parameter'."})
    stash: str = field(
        default="reference", metadata={"help": "Where forget gradients wait: 'reference', 'bfloat16', 'int8', 'cpu'."}
    )
    backend: str | None = field(default=None, metadata={"help": "Kernels to use; the fastest unless given."})
    metric: str = field(
        default="euclidean",
        metadata={"help": "In which gradients are compared: 'euclidean', 'retain'; docs/method.md."},
    )
    damping: float = field(default=0.01, metadata={"help": "Of the metric 'retain', >= 0."})
    epoch_over: str = field(
        default="longer", metadata={"help": "The data set that an epoch reads once: 'longer', 'forget', 'retain'."}
    )
    reference_file: str | None = field(
        default=None,
        metadata={"help": f"Keeps what npo and dpo compare with; output_dir/{REFERENCE_FILE} unless given."},
    )
    record: str | None = field(
        default=None,
        metadata={"help": "File of what each step saw, as 'run.jsonl'; python -m blur_optim.record.plot."},
    )
    record_every: int = field(default=1, metadata={"help": "Record each step whose number divides by this."})
    record_alignment: bool = field(
        default=False, metadata={"help": "Record the cosine within each parameter too; see blur_optim.record.recorder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.check_losses()
        self.blur_options()

    def check_losses(self) -> None:
        """Raises ValueError, TypeError: a loss is no name, or ``beta`` is not positive."""
        for name in ("forget_loss", "retain_loss"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"`{name}` must be a name in these arguments, which are saved with every checkpoint, got "
                    f"{getattr(self, name)!r}. Pass a function to the trainer: BLURTrainer({name}=...)."
                )
        if self.beta is not None:
            check_positive("beta", self.beta)

    def blur_options(self) -> dict[str, Any]:
        """What :class:`blur_optim.BLUR` is made with."""
        return blur_options(
            gamma=self.gamma,
            retain_weight=self.retain_weight,
            rule=self.rule,
            normalize=self.normalize,
            scope=self.scope,
            stash=self.stash,
            backend=self.backend,
            metric=self.metric,
            damping=self.damping,
        )


@dataclass
class BLURTrainingArguments(BLURArguments, TrainingArguments):
    """``TrainingArguments`` with those of :class:`BLURArguments`: the losses and BLUR's options (arXiv:2506.08164).

    Raises:
        ValueError, TypeError: as there.
    """


def check_best_model(args: TrainingArguments, eval_dataset: Any, forget_dataset: Any) -> None:
    """Refuse to choose the best checkpoint by a number that does not exist, or by how little was forgotten.

    Raises:
        ValueError: it is ``"loss"``, and there is one for each of several data sets; or it is the loss on the forget
            data, which should rise, and the lower counts as the better.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    if metric == "loss" and "" not in sets:
        raise ValueError(
            "`metric_for_best_model` must be one of "
            f"{[f'eval_{name}_loss' for name in sets]} with these evaluation sets, got {args.metric_for_best_model!r} "
            "(the default of load_best_model_at_end). What is kept should forget and keep: 'eval_retain_loss' alone "
            "takes the checkpoint that did least; a score of your own goes through compute_metrics."
        )
    forgets = [n for n, rows in sets.items() if n == "forget" or (rows is forget_dataset and rows is not None)]
    if metric in [f"{name}_loss".lstrip("_") for name in forgets] and not args.greater_is_better:
        raise ValueError(
            f"`greater_is_better` must be True for the loss on the forget data, got {args.greater_is_better!r} with "
            f"metric_for_best_model={args.metric_for_best_model!r}: the checkpoint that forgot least would be the best."
        )
