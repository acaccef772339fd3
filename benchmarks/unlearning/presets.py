"""The settings by track and form: short and full on two cores, and the paper's for a GPU."""

from dataclasses import replace

from shared_lib.errors import InputError

from .presets_text import MUSE_PAPER, TEXT_PRESETS
from .settings import Learning, Settings

KEPT = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}  # what the hub's models are named by
FORMS = ("short", "full", "held-out", "pretrained", "paper")

NPO = ("weighted_sum", "blur", "normalized", "blur-normalized", "averaged-dots", "bloop", "blur-metric")
NPO_MORE = (
    "conflict",
    "barrier",
    "retain_first",
    "blur-per-parameter",
    "upgrad",
)
SHORT_METHODS = (
    "ga/forget-only",
    "ga+nll/weighted_sum",
    "ga+nll/blur",
    "npo+nll/weighted_sum",
    "npo+nll/blur",
    "npo+nll/normalized",
    "npo+nll/blur-normalized",
    "npo+nll/averaged-dots",
    "npo+nll/blur-metric",
)
FULL_METHODS = (
    "ga/forget-only",
    "ga+nll/weighted_sum",
    "ga+nll/blur",
    "ga+nll/normalized",
    "ga+nll/blur-metric",
    *(f"npo+nll/{combine}" for combine in (*NPO, *NPO_MORE)),
    "npo+kl/weighted_sum",
    "npo+kl/blur",
    "simnpo+nll/weighted_sum",
    "simnpo+nll/blur",
    "simnpo+nll/normalized",
    "simnpo+nll/blur-metric",
    "dpo+nll/weighted_sum",
    "dpo+nll/blur",
    "dpo+nll/blur-metric",
    "rmu+rmu/weighted_sum",
    "rmu+rmu/blur",
    "rmu+rmu/blur-metric",
    "hinge+nll/weighted_sum",
)

HELD_OUT = (
    *("weighted_sum", "blur", "conflict", "normalized", "blur-metric", "metric-per-parameter"),
    *("dual-moments", "retain-normal", "forget-gain"),
)
HELD_OUT_METHODS = (
    *(f"npo+nll/{combine}" for combine in HELD_OUT),
    *(f"simnpo+nll/{combine}" for combine in HELD_OUT),
    "npo+nll/primal-dual",
    "margin+nll/primal-dual",
    "ga+nll/dampening",
)

TOFU = Settings("tofu", "short", "tofu", "", "forget10", methods=SHORT_METHODS)
PRESETS: dict[tuple[str, str], Settings] = {
    # 600 rows, the last 40 forgotten: two models of 0.9M parameters a target learn them in three minutes.
    ("tofu", "short"): replace(
        TOFU,
        name="invented-short",
        subset="forget01",
        authors=30,
        model="0.8m",
        batch_size=8,
        looks=4,
        look_rows=40,
        judged_rows=100,
        generated_rows=40,
        lrs=(3e-4, 1e-3),
        tuning_weights=(1.0, 0.3),
        weights=(1.0, 0.3, 0.1),
    ),
    ("tofu", "full"): replace(
        TOFU,
        name="invented-forget10",
        form="full",
        learning=Learning(lr=2e-3, epochs=30, batch_size=16, known=0.95),
        methods=FULL_METHODS,
        batch_size=8,
        looks=4,
        look_rows=80,
        judged_rows=200,
        generated_rows=60,
        lrs=(3e-4, 1e-3),
        tuning_weights=(1.0, 0.3),
        weights=(1.0, 0.3),
    ),
    # Who wins, and by how much: tuned on the authors of one block, compared on those of three others, five seeds each.
    # 100 steps of 4 rows are ten epochs of what is forgotten.
    ("tofu", "held-out"): replace(
        TOFU,
        name="invented-held-out",
        form="held-out",
        subset="forget01",
        authors=20,
        blocks=(180, 40, 80, 120),
        targets=4,
        model="0.8m",
        methods=HELD_OUT_METHODS,
        steps=100,
        batch_size=4,
        looks=10,
        line=True,
        tuned_at=(0.98, 0.95, 0.9),
        look_rows=40,
        judged_rows=40,
        generated_rows=20,
        lrs=(3e-4, 1e-4),
        tuning_weights=(3.0, 1.0, 0.3),
        weights=(),
        unit_scale=1.0,
        seeds=tuple(seed for seed in range(20) if seed % 4),
        judged_seeds=(1, 2, 3),
    ),
    # A real pretrained model of 135M parameters, given by --model: one row costs it what a hundred cost the small ones.
    ("tofu", "pretrained"): replace(
        TOFU,
        name="invented-pretrained",
        form="pretrained",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        learning=Learning(lr=2e-4, epochs=8, batch_size=8, known=0.9),
        subset="forget01",
        authors=5,
        methods=tuple(f"npo+nll/{combine}" for combine in ("weighted_sum", "blur", "normalized", "blur-metric")),
        steps=24,
        batch_size=4,
        looks=6,
        tuned_at=(0.98, 0.95, 0.9),
        look_rows=20,
        judged_rows=20,
        generated_rows=0,
        relearning_steps=0,
        lrs=(1e-4, 3e-5),
        tuning_weights=(1.0, 0.3, 0.1),
        weights=(),
        unit_scale=1.0,
        judged_seeds=(1,),
    ),
    # arXiv:2506.08164: NPO, beta 0.1, 10 epochs of 400 rows, accumulation 4, AdamW; the model is the benchmark's own.
    ("tofu", "paper"): replace(
        TOFU,
        name="tofu-forget10-paper",
        form="paper",
        data="locuslab/TOFU",
        model="open-unlearning/tofu_Llama-2-7b-chat-hf_full",
        retrained="open-unlearning/tofu_Llama-2-7b-chat-hf_retain90",
        learning=None,
        methods=FULL_METHODS,
        batch_size=4,
        accumulation=4,
        steps=250,
        lrs=(1e-5,),
        layers=(5, 6, 7),
        device="cuda",
        dtype="bfloat16",
        threads=8,
    ),
}
PRESETS |= TEXT_PRESETS


def preset(track: str, form: str, subset: str | None = None) -> Settings:
    """Return the settings of a track in a form. The paper's on MUSE depend on the subset, books or news.

    Raises:
        InputError: there are none.
    """
    if (track, form) not in PRESETS:
        known = ", ".join(f"{t}/{f}" for t, f in PRESETS)
        raise InputError(f"--track and --form must be one of {known}, got {track}/{form}.")
    if (track, form) == ("muse", "paper") and subset in MUSE_PAPER:
        return MUSE_PAPER[subset]
    found = PRESETS[track, form]
    if (track, form) == ("tofu", "paper") and subset in KEPT:
        retrained = found.retrained.replace(KEPT[found.subset], KEPT[subset])
        return replace(found, name=f"tofu-{subset}-paper", retrained=retrained)
    return found
