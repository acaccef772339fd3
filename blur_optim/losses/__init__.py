"""Forget losses (GA, NPO, SimNPO, DPO/IDK, logit margin, RMU), retain losses (NLL, KL, RMU) and what they compare with.

Small functions on logits, labels, log-probabilities and activations, so that they serve any causal model.
"""

from blur_optim.losses.forward import model_logits, run_model
from blur_optim.losses.reference import (
    adapter_changes,
    reference_log_probs,
    reference_logits,
    stored_reference_log_probs,
)
from blur_optim.losses.rmu import (
    CapturedActivations,
    capture_activations,
    rmu_forget_loss,
    rmu_retain_loss,
    steering_vector,
)
from blur_optim.losses.stored_log_probs import ReferenceLogProbs
from blur_optim.losses.text import (
    IDK_ANSWERS,
    IGNORE_INDEX,
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    sequence_log_probs,
    simnpo_loss,
    token_counts,
)

__all__ = [
    "IDK_ANSWERS",
    "IGNORE_INDEX",
    "CapturedActivations",
    "ReferenceLogProbs",
    "adapter_changes",
    "capture_activations",
    "dpo_loss",
    "ga_loss",
    "kl_loss",
    "logit_margin_loss",
    "model_logits",
    "nll_loss",
    "npo_loss",
    "reference_log_probs",
    "reference_logits",
    "rmu_forget_loss",
    "rmu_retain_loss",
    "run_model",
    "sequence_log_probs",
    "simnpo_loss",
    "steering_vector",
    "stored_reference_log_probs",
    "token_counts",
]
