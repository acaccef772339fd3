"""Method ids, and what people call their parts."""

import re
from dataclasses import dataclass
from typing import Any

WEIGHTED_SUM = "weighted_sum"
FORGET_ONLY = "forget-only"

LOSSES = {
    "ga": "GA",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "dpo": "DPO",
    "rmu": "RMU",
    "hinge": "hinge",
    "margin": "logit margin",
    "nll": "NLL",
    "kl": "KL",
}
COMBINATIONS = {
    FORGET_ONLY: "forget loss alone",
    WEIGHTED_SUM: "weighted sum",
    "blur": "BLUR",
    "normalized": "normalized sum",
    "blur-normalized": "BLUR, normalized",
    "conflict": "conflict",
    "conflict-normalized": "conflict, normalized",
    "barrier": "barrier",
    "retain_first": "retain first",
    "blur-per-parameter": "BLUR per parameter",
    "averaged-dots": "BLUR, averaged dots",
    "averaged-cosine": "BLUR, averaged cosine",
    "bloop": "Bloop",
    "upgrad": "UPGrad",
    "pcgrad": "PCGrad",
    "dual-moments": "DualOptim",
    "retain-normal": "GU",
    "forget-gain": "HAMU",
    "primal-dual": "PDU",
    "dampening": "SSD",
    "blur-metric": "BLUR in the retain metric",
    "metric-per-parameter": "BLUR in the retain metric, by tensor",
    "sum-metric": "weighted sum in the retain metric",
    "normalized-metric": "normalized sum in the retain metric",
    "metric-of-sum": "metric of the sum",
    "metric-power-1": "metric with power 1",
    "metric-no-floor": "metric without a floor",
    "metric-damping-0.1": "metric, δ = 0.1",
    "metric-damping-0.001": "metric, δ = 0.001",
    "metric-damping-0": "metric, δ = 0",
    "metric-beta-0.9": "metric, β₂ = 0.9",
    "metric-beta-0.999": "metric, β₂ = 0.999",
    "metric-damped-by-tensor": "metric damped by tensor",
    "metric-warm-v": "metric, v warm at the start",
}
_ID = re.compile(r"(?P<forget>[\w-]+)(\+(?P<retain>[\w-]+))?/(?P<combine>[\w.-]+)")

# Parts of names of scores that are not plain words.
_WORDS = {
    "rouge": "ROUGE",
    "l": "L",
    "mia": "MIA",
    "auc": "AUC",
    "zlib": "zlib",
    "loss": "loss",
    "es": "ES",
    "em": "EM",
    "ppl": "perplexity",
    "privleak": "PrivLeak",
    "verbmem": "VerbMem",
    "knowmem": "KnowMem",
    "wmdp": "WMDP",
    "mmlu": "MMLU",
    "ks": "KS",
}
P_VALUES = ("forget_quality", "p_value")


@dataclass(frozen=True)
class Method:
    """A forget loss, a retain loss (None: there is none), and how their gradients meet."""

    id: str
    forget_loss: str
    retain_loss: str | None
    combine: str

    @classmethod
    def parse(cls, name: Any) -> "Method":
        """Read an id such as ``npo+nll/blur`` or ``ga/forget-only``.

        Raises:
            ValueError: it has another form.
        """
        match = _ID.fullmatch(name) if isinstance(name, str) else None
        if not match:
            raise ValueError(f"a method must be named like `npo+nll/blur` or `ga/forget-only`, got {name!r}.")
        return cls(name, match["forget"], match["retain"], match["combine"])

    @property
    def losses(self) -> str:
        """Return the id's first part; methods that share it are compared."""
        return self.id.partition("/")[0]

    @property
    def baseline(self) -> str | None:
        """Return the id of the weighted sum of the same losses; None for itself and without a retain loss."""
        if self.retain_loss is None or self.combine == WEIGHTED_SUM:
            return None
        return f"{self.losses}/{WEIGHTED_SUM}"

    @property
    def losses_label(self) -> str:
        return " + ".join(LOSSES.get(part, part) for part in self.losses.split("+"))

    @property
    def combine_label(self) -> str:
        return COMBINATIONS.get(self.combine, self.combine.replace("_", " "))

    @property
    def label(self) -> str:
        return f"{self.losses_label}: {self.combine_label}"


def score_label(name: str) -> str:
    """Return the name of a score in words: ``forget_rouge_l`` is "forget ROUGE-L"."""
    words = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return words.replace("ROUGE L", "ROUGE-L")


def is_p_value(name: str) -> bool:
    """Tell whether a score is the p-value of a test, and so is spread over orders of magnitude."""
    return name.endswith(P_VALUES)
