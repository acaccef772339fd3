"""BLUR in axolotl: a plugin that its configuration names.

.. code-block:: yaml

    plugins:
      - blur_optim.integrations.axolotl.BLURPlugin
    datasets:                      # to keep, in any of axolotl's formats
      - path: retain.jsonl
        type: chat_template
    blur:
      forget_datasets:
        - path: forget.jsonl
          type: chat_template
      forget_loss: npo             # and whatever else BLURTrainingArguments take
      gamma: 1.0

Templates, masks, LoRA, FSDP2, DeepSpeed, schedulers and checkpoints are axolotl's; losses, pairs of batches and the
step are those of :class:`blur_optim.integrations.transformers.BLURTrainer`.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from blur_optim.integrations.arguments import BLURArguments
from blur_optim.integrations.pairs import PairedDataset
from blur_optim.integrations.transformers import BLURTrainer

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, ConfigDict, create_model
except ImportError as error:
    raise ImportError("`axolotl` must be installed for BLURPlugin, as its own documentation says.") from error

#: Options of axolotl that BLUR's step would pass over in silence, and what to do instead.
_REFUSED = {
    "sample_packing": "NPO, SimNPO and DPO compare whole answers, of which a packed row has several. Leave it out",
    "eval_sample_packing": "the data sets are not packed. Leave it out",
    "activation_offloading": "it wraps the Trainer's own step. Use gradient_checkpointing",
    "layer_offloading": "it wraps the Trainer's own step. Use FSDP2 or DeepSpeed",
    "pretraining_dataset": "a stream has no length. Use datasets",
    "rl": "BLUR has two losses of its own. Leave it out",
    "trainer_cls": "the plugin brings its own. Leave it out",
    "curriculum_sampling": "pairs are drawn at random. Leave it out",
    "reward_model": "BLUR trains language models. Leave it out",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")
    forget_datasets: list[dict[str, Any]]


#: The section ``blur`` of the configuration: ``forget_datasets``, as ``datasets``, and the fields of ``BLURArguments``.
BLURSection = create_model(
    "BLURSection",
    __base__=_Section,
    **{f.name: (Any, None) for f in fields(BLURArguments)},
)


class BLURInput(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    blur: BLURSection | None = None  # type: ignore[valid-type]


class BLURPlugin(BasePlugin):
    """Unlearn ``blur.forget_datasets`` while keeping ``datasets``; without a section ``blur`` it does nothing."""

    def register(self, cfg: Any) -> None:
        """Refuse what would be passed over in silence.

        Raises:
            ValueError: an option is set that does not go with two losses, or there is nothing to forget.
        """
        section = cfg.get("blur")
        if section is None:
            return
        if not section.get("forget_datasets"):
            raise ValueError("`blur.forget_datasets` must name at least one data set, as `datasets` do, got none.")
        for name, remedy in _REFUSED.items():
            if cfg.get(name):
                raise ValueError(f"`{name}` must not be set with BLUR, got {cfg.get(name)!r}: {remedy}.")

    def get_input_args(self) -> str:
        """The section ``blur``."""
        return f"{__name__}.{BLURInput.__name__}"

    def get_training_args_mixin(self) -> str:
        """The arguments of the losses and of BLUR."""
        return f"{BLURArguments.__module__}.{BLURArguments.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Those that the section ``blur`` sets."""
        section = cfg.blur or {}
        names = {f.name for f in fields(BLURArguments)}
        return {name: value for name, value in section.items() if name in names and value is not None}

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
        """axolotl's trainer with BLUR's step and pairs of batches."""
        return _trainer_class() if cfg.blur else None

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Load both data sets as axolotl loads one, in pairs."""
        if not cfg.blur:
            return None
        from axolotl.common.datasets import TrainDatasetMeta, load_datasets
        from axolotl.utils.dict import DictDefault

        retain = load_datasets(cfg=cfg)
        forget_cfg = DictDefault(
            {**cfg, "datasets": cfg.blur.forget_datasets, "val_set_size": 0, "test_datasets": None}
        )
        forget = load_datasets(cfg=forget_cfg)
        pairs = PairedDataset(forget.train_dataset, retain.train_dataset, cfg.blur.epoch_over or "longer")
        steps = math.ceil(len(pairs) / cfg.batch_size) * cfg.num_epochs
        return TrainDatasetMeta(pairs, retain.eval_dataset, cfg.max_steps or math.ceil(steps))


def _trainer_class() -> type[Any]:
    # Not before it is asked for: this import makes axolotl's arguments, of all plugins that are there by then.
    from axolotl.core.trainers import AxolotlTrainer

    class AxolotlBLURTrainer(BLURTrainer, AxolotlTrainer):
        """BLURTrainer over axolotl's, which gives it the pairs as ``train_dataset``."""

        def __init__(
            self, model: Any, args: Any, data_collator: Any = None, *, train_dataset: Any, **kwargs: Any
        ) -> None:
            pairs = {"forget_dataset": train_dataset.forget, "retain_dataset": train_dataset.retain}
            super().__init__(model, args, data_collator, **pairs, **kwargs)

    return AxolotlBLURTrainer
