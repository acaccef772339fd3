"""The stages, in their order: what is worth most comes first, for the time with a GPU may end at any moment."""

from typing import NamedTuple


class Stage(NamedTuple):
    """One process.

    Args:
        name: of the module in this folder, and of its files.
        minutes: after which it is ended, whatever it does.
        least: minutes that the stages before it leave it, where all of these fit into what there is: a stage that takes
            all of its time then costs the later ones a part of theirs, and none of them all.
        what: for the report.
        csv: whether its numbers are many enough for a file of their own: at most eight files come out of all stages.
    """

    name: str
    minutes: float
    what: str
    least: float = 0.0
    csv: bool = False


#: Without a GPU the toys take turns on cores that may be busy: the limits are for what hangs.
CPU_PATIENCE = 5.0

#: The least of all is eight minutes, which is what there is by default.
STAGES = (
    Stage("build", 1.5, "the extension for this device alone, and its variants for the tuning sweep", 1.5),
    Stage("tests", 2.0, "`pytest -m gpu`", 1.5),
    Stage("kernels", 1.5, "each operation by backend, dtype and stash; the tuning sweep", 1.2, csv=True),
    Stage("step", 1.0, "the optimizer step: time on the device and on the host", 0.6, csv=True),
    Stage("memory", 0.5, "peak memory of a training step by stash", 0.3, csv=True),
    Stage("seven", 2.0, "a training step of Llama-2-7B's shapes, and one of 1B under ZeRO-3", 1.2, csv=True),
    Stage("unlearn", 2.0, "unlearning for real: train, tune, unlearn, judge", 1.2, csv=True),
    Stage("sanitizer", 1.0, "compute-sanitizer on a native driver of the kernels", 0.5),
)
