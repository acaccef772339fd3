"""Forget losses (GA, NPO, SimNPO, DPO/IDK, RMU), retain losses (NLL, KL, RMU) and what they compare with.

Small functions on logits, labels, log-probabilities and activations, so that they serve any causal model.
Position t of the logits predicts label t + 1, as in transformers; a label of -100 takes no part. Whatever the
model's dtype, they compute and return float32 (float64 stays float64). A reference gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100

# The "I don't know" answers that DPO prefers to the answer to forget.
IDK_ANSWERS = (
    "I have no information about that.",
    "That is something I don't know.",
    "I'm afraid I can't answer this one.",
    "I never learned anything about this.",
    "Sorry, this is outside what I know.",
    "I couldn't tell you.",
)

# What a batch may hold for the model; every other key stays here. Labels too: a Hugging Face model that sees
# them computes a loss that nobody reads, on a float32 copy of the logits.
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Sum the log-probabilities of each sequence's answer tokens.

    .. math:: \log \pi(y \mid x) = \sum_{t : y_t \neq -100} \log \pi(y_t \mid x, y_{<t})

    Args:
        logits: [B, T, V], floating point; position t predicts label t + 1.
        labels: [B, T] int64; -100 marks what takes no part (prompt, padding).
    Returns:
        [B] float32, <= 0; 0 for a sequence without labels.
    Raises:
        TypeError: the logits aren't floating point or the labels aren't int64.
        ValueError: the shapes aren't [B, T, V] and [B, T].
    Cost: up to two float32 copies of the logits, one of which is kept for backward.
    """
    return -_token_nll(logits, labels).sum(dim=-1)


def token_counts(labels: Tensor) -> Tensor:
    r"""Count the answer tokens that each sequence predicts.

    .. math:: |y| = \#\{t \geq 1 : y_t \neq -100\}

    Args:
        labels: [B, T] int64. The first label is never counted: nothing predicts it.
    Returns:
        [B] int64.
    Raises:
        TypeError: the labels aren't int64.
        ValueError: the shape isn't [B, T].
    """
    return _predicted(labels).sum(dim=-1)


def nll_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Average the negative log-likelihood over all answer tokens of the batch: the usual retain loss.

    .. math:: L_{NLL} = -\frac{1}{\sum_i |y_i|} \sum_i \log \pi(y_i \mid x_i)

    The same number as ``model(**batch).loss`` in transformers, except that a batch without any label gives 0
    and a zero gradient, not NaN.

    Args:
        logits: [B, T, V], floating point.
        labels: [B, T] int64; -100 marks what takes no part.
    Returns:
        0-d float32.
    Raises:
        TypeError, ValueError: as :func:`sequence_log_probs`.
    """
    return _masked_mean(_token_nll(logits, labels), _predicted(labels))


def ga_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Negate :func:`nll_loss`, so that descending it is gradient ascent on the answers to forget.

    .. math:: L_{GA} = -L_{NLL}      (arXiv:2210.01504)

    It has no lower bound: alone, it destroys the model (arXiv:2404.05868, section 2.1).

    Args:
        logits: [B, T, V], floating point.
        labels: [B, T] int64; -100 marks what takes no part.
    Returns:
        0-d float32, <= 0.
    Raises:
        TypeError, ValueError: as :func:`sequence_log_probs`.
    """
    return -nll_loss(logits, labels)


def npo_loss(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    r"""Push answers below their reference probability, ever more gently (negative preference optimization).

    .. math:: L_{NPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \, \log \sigma\Big(
        -\beta \log \frac{\pi(y_i \mid x_i)}{\pi_{ref}(y_i \mid x_i)}\Big)      (arXiv:2404.05868)

    Its gradient is that of ascent on the answers' summed NLL, each example weighted by
    :math:`2 \pi^\beta / (\pi^\beta + \pi_{ref}^\beta)`: 1 at the reference or for beta -> 0, 0 if forgotten.

    Args:
        log_probs: [B], the model's :func:`sequence_log_probs` on the answers to forget.
        reference_log_probs: [B], the same of the model before unlearning; gets no gradient.
        beta: inverse temperature, > 0; the larger, the sooner a forgotten example is left alone.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: an input isn't floating point.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    _check_per_example(log_probs=log_probs, reference_log_probs=reference_log_probs)
    _check_positive("beta", beta)
    return _preference_loss(-beta * (_upcast(log_probs) - _upcast(reference_log_probs.detach())), beta)


def simnpo_loss(log_probs: Tensor, token_counts: Tensor, beta: float = 2.5, delta: float = 0.0) -> Tensor:
    r"""Push answers to a low probability per token, without a reference (simple NPO).

    .. math:: L_{SimNPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \,
        \log \sigma\Big(-\frac{\beta}{|y_i|} \log \pi(y_i \mid x_i) - \delta\Big)      (arXiv:2410.07163)

    For beta -> 0 (and delta = 0) it is gradient ascent on the mean log-probability per token.

    Args:
        log_probs: [B], the model's :func:`sequence_log_probs` on the answers to forget.
        token_counts: [B] integers, :func:`token_counts` of the same labels. 0 is taken as 1: no gradient.
        beta: inverse temperature, > 0; 2.5 is the authors' choice for TOFU forget05 (4.5 for forget10).
        delta: reward margin, the paper's gamma (0 there), outside beta. The authors' code and open-unlearning
            put theirs inside, log sigma(beta * (-log pi / |y| - d)): delta = beta * d.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: the log-probabilities aren't floating point or the counts aren't integers.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    _check_per_example(log_probs=log_probs)
    _check_int64("token_counts", token_counts)
    _check_shape("token_counts", token_counts, log_probs.shape, "log_probs")
    _check_positive("beta", beta)
    return _preference_loss(-beta * _upcast(log_probs) / token_counts.clamp(min=1) - delta, beta)


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor,
    reference_rejected_log_probs: Tensor,
    beta: float = 0.1,
) -> Tensor:
    r"""Prefer an "I don't know" answer y+ to the answer y- to forget (direct preference optimization).

    .. math:: L_{DPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \, \log \sigma\Big(
        \beta \log \frac{\pi(y^+_i \mid x_i)}{\pi_{ref}(y^+_i \mid x_i)}
        - \beta \log \frac{\pi(y^-_i \mid x_i)}{\pi_{ref}(y^-_i \mid x_i)}\Big)      (arXiv:2305.18290)

    The DPO paper has no factor 2/beta; unlearning code has (that of NPO, arXiv:2404.05868, open-unlearning).
    With it the gradient at the reference is grad log pi(y-) - grad log pi(y+) for any beta, and NPO is this
    loss without y+, on the same scale, so that gamma keeps its meaning. Times beta/2 it is the paper's loss.

    Args:
        chosen_log_probs: [B], :func:`sequence_log_probs` of "I don't know" answers (:data:`IDK_ANSWERS`).
        rejected_log_probs: [B], the same on the answers to forget.
        reference_chosen_log_probs: [B], those of the model before unlearning; get no gradient.
        reference_rejected_log_probs: [B], likewise.
        beta: inverse temperature, > 0.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: an input isn't floating point.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    _check_per_example(
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        reference_chosen_log_probs=reference_chosen_log_probs,
        reference_rejected_log_probs=reference_rejected_log_probs,
    )
    _check_positive("beta", beta)
    chosen = _upcast(chosen_log_probs) - _upcast(reference_chosen_log_probs.detach())
    rejected = _upcast(rejected_log_probs) - _upcast(reference_rejected_log_probs.detach())
    return _preference_loss(beta * (chosen - rejected), beta)


def kl_loss(logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Average the forward KL divergence from the reference over all answer tokens: a retain loss.

    .. math:: L_{KL} = \frac{1}{\sum_i |y_i|} \sum_{i,t} \sum_v \pi_{ref}(v \mid x_i, y_{i,<t})
        \log \frac{\pi_{ref}(v \mid x_i, y_{i,<t})}{\pi(v \mid x_i, y_{i,<t})}      (arXiv:2401.06121)

    Args:
        logits: [B, T, V], floating point.
        reference_logits: [B, T, V], those of the model before unlearning; get no gradient.
        labels: [B, T] int64; only positions that predict a label other than -100 count.
    Returns:
        0-d float32, >= 0 up to rounding; 0 for a batch without labels.
    Raises:
        TypeError: the logits aren't floating point or the labels aren't int64.
        ValueError: the shapes aren't [B, T, V], the same, and [B, T].
    """
    _check_logits(logits, labels)
    _check_floating("reference_logits", reference_logits)
    _check_shape("reference_logits", reference_logits, logits.shape, "logits")
    log_probs = F.log_softmax(_upcast(logits), dim=-1)
    reference = F.log_softmax(_upcast(reference_logits.detach()), dim=-1)
    divergence = F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(dim=-1)
    return _masked_mean(divergence, _predicted(labels))


def steering_vector(
    hidden_size: int,
    coefficient: float = 6.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw the fixed random vector to which RMU steers the activations on forget data.

    .. math:: c \cdot u / \|u\|, \quad u_j \sim \mathrm{Uniform}[0, 1)      (arXiv:2403.03218)

    Args:
        hidden_size: H, the width of the steered layer.
        coefficient: c, the vector's norm, > 0. The paper's 6.5 is for Zephyr-7B; wider activations need more.
        generator: source of randomness, on any device; without one, the CPU's global generator.
        device: where the vector lies; torch's default device unless given.
        dtype: of the vector; the direction is the same for each.
    Returns:
        [H], no gradient.
    Raises:
        ValueError: the hidden size or the coefficient isn't positive.
    """
    _check_positive("hidden_size", hidden_size)
    _check_positive("coefficient", coefficient)
    # Drawn in one dtype and on the generator's device: a seed means one direction wherever it is used.
    source = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(hidden_size, generator=generator, device=source, dtype=torch.float32).cpu().double()
    vector: Tensor = coefficient * uniform / torch.linalg.vector_norm(uniform)
    return vector.to(device or torch.get_default_device(), dtype)


def rmu_forget_loss(activations: Tensor, steering_vector: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Average the squared distance of one layer's activations on forget data to the steering vector.

    .. math:: \frac{1}{|M| H} \sum_{(i,t) \in M} \|h_{i,t} - c \, u / \|u\|\|^2      (arXiv:2403.03218)

    The paper's equations have no 1/H, its code has: here and in :func:`rmu_retain_loss`.

    Args:
        activations: [B, T, H], see :func:`capture_activations`.
        steering_vector: [H], see :func:`steering_vector`; gets no gradient.
        mask: [B, T] bool or integers, nonzero where a token takes part (such as ``attention_mask``); None
            for every token.
    Returns:
        0-d float32; 0 where the mask is empty.
    Raises:
        TypeError: an input isn't floating point, or the mask is.
        ValueError: the shapes aren't [B, T, H], [H] and [B, T].
    """
    _check_activations(activations)
    _check_floating("steering_vector", steering_vector)
    _check_shape("steering_vector", steering_vector, activations.shape[2:], "activations[0, 0]")
    return _activation_loss(activations, steering_vector, mask)


def rmu_retain_loss(activations: Tensor, frozen_activations: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Average the squared distance of one layer's activations on retain data to the frozen model's.

    .. math:: \frac{1}{|M| H} \sum_{(i,t) \in M} \|h_{i,t} - h^{frozen}_{i,t}\|^2      (arXiv:2403.03218)

    Args:
        activations: [B, T, H], see :func:`capture_activations`.
        frozen_activations: [B, T, H], those of the model before unlearning; get no gradient.
        mask: [B, T] bool or integers, nonzero where a token takes part; None for every token.
    Returns:
        0-d float32; 0 where the mask is empty.
    Raises:
        TypeError, ValueError: as :func:`rmu_forget_loss`.
    """
    _check_activations(activations)
    _check_floating("frozen_activations", frozen_activations)
    _check_shape("frozen_activations", frozen_activations, activations.shape, "activations")
    return _activation_loss(activations, frozen_activations, mask)


class CapturedActivations:
    """Hold what a module returned last; made by :func:`capture_activations`."""

    def __init__(self) -> None:
        self._output: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """Return the last forward's output, [B, T, H] for a decoder layer, attached to its graph.

        Raises:
            RuntimeError: the module hasn't run yet.
        """
        if self._output is None:
            raise RuntimeError(
                "`output` must be read after a forward of the captured module, got none so far. "
                "Run the model inside `with capture_activations(module)`."
            )
        return self._output

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            raise TypeError(
                f"`module` must return a tensor or a tuple that starts with one, got {type(first).__name__} "
                f"from {type(module).__name__}. Capture a layer, not the whole model."
            )
        self._output = first


@contextmanager
def capture_activations(module: nn.Module) -> Iterator[CapturedActivations]:
    r"""Record what a module returns, with its gradient, for the RMU losses (arXiv:2403.03218).

    .. math:: h_{i,t} = M_\ell(x_{i,\leq t})

    Layers above the module still run, but a loss on ``output`` sends them no gradient.

    Args:
        module: layer l, such as ``model.model.layers[7]``; returns [B, T, H], or a tuple that starts with it.
    Returns:
        A context manager. Its value's ``output`` is the last forward's output, readable after the block too;
        the hook is gone by then, also after an exception.
    Raises:
        TypeError: in the forward, if the module returns neither a tensor nor a tuple that starts with one.
        RuntimeError: if ``output`` is read before any forward.
    """
    captured = CapturedActivations()
    handle = module.register_forward_hook(captured._record)
    try:
        yield captured
    finally:
        handle.remove()


def reference_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    r"""Compute the logits of the reference, for :func:`kl_loss`.

    .. math:: \log \pi_{ref}(\cdot \mid x, y_{<t}) + \mathrm{const}

    The reference is the model itself before unlearning, a frozen copy, or the base of a PEFT model: where the
    model (or the one inside a DDP wrapper) offers ``disable_adapter()``, its adapter is off. Runs without
    gradients and in eval mode; afterwards every submodule's mode and every parameter's ``requires_grad`` are
    as before, also after an exception.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``; what it returns has ``logits``.
        batch: ``input_ids`` [B, T], and where present ``attention_mask`` and ``position_ids``, on the model's
            device. Other keys don't reach the model.
    Returns:
        [B, T, V] in the model's dtype, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids``.
    """
    _check_keys(batch, "input_ids")
    inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
    with _reference_mode(model):
        logits: Tensor = model(**inputs).logits
    return logits


def reference_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    r"""Compute the answers' log-probabilities under the reference, for :func:`npo_loss` and :func:`dpo_loss`.

    .. math:: \log \pi_{ref}(y \mid x) = \sum_{t : y_t \neq -100} \log \pi_{ref}(y_t \mid x, y_{<t})

    Args:
        model: the reference, see :func:`reference_logits`.
        batch: as :func:`reference_logits`, and ``labels`` [B, T] int64.
    Returns:
        [B] float32 on the model's device, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids`` or ``labels``, or their shapes differ.
        TypeError: the labels aren't int64.
    """
    _check_keys(batch, "input_ids", "labels")
    with torch.no_grad():
        return sequence_log_probs(reference_logits(model, batch), batch["labels"])


def stored_reference_log_probs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Callable[[Iterable[Mapping[str, Tensor]]], Iterable[Mapping[str, Tensor]]] | None = None,
) -> Tensor:
    r"""Compute every example's reference log-probability once, so that training holds no second model.

    .. math:: s_i = \log \pi_{ref}(y_i \mid x_i)

    In training, ``stored[batch["index"]]`` is the reference of a batch (move it to the device).

    Args:
        model: the model before its first unlearning step, or any reference, see :func:`reference_logits`.
        batches: as :func:`reference_log_probs`, and ``index`` [B] int64, each example's row; together the
            rows 0..n-1, each once, in any order.
        progress: wraps the iterable, such as ``tqdm``.
    Returns:
        [n] float32 on the CPU, by row.
    Raises:
        ValueError: there are no batches, a batch lacks a key, or a row is negative, missing or given twice.
        TypeError: ``index`` isn't int64.
    """
    stored: dict[int, float] = {}
    for position, batch in enumerate(batches if progress is None else progress(batches)):
        rows = _batch_rows(batch, position, stored)
        stored.update(zip(rows, reference_log_probs(model, batch).tolist(), strict=True))
    if not stored:
        raise ValueError("`batches` must yield at least one example, got none. Is it an exhausted iterator?")
    missing = [row for row in range(len(stored)) if row not in stored]
    if missing:
        raise ValueError(
            f"`batches` must hold every row from 0 to {max(stored)}, got none for row {missing[0]}. "
            "Pass the whole data set: no drop_last, no DistributedSampler."
        )
    return torch.tensor([stored[row] for row in range(len(stored))], dtype=torch.float32, device="cpu")


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _targets(labels: Tensor) -> Tensor:
    # What position t predicts. The labels are shifted, not the logits: a slice of those would be copied.
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _predicted(labels: Tensor) -> Tensor:
    _check_labels(labels)
    return _targets(labels) != IGNORE_INDEX


def _token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    _check_logits(logits, labels)
    flat = _upcast(logits).reshape(-1, logits.shape[-1])
    nll = F.cross_entropy(flat, _targets(labels).reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return nll.view(labels.shape)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _preference_loss(margins: Tensor, beta: float) -> Tensor:
    return -2.0 / beta * F.logsigmoid(margins).mean()


def _activation_loss(activations: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = activations.new_ones(activations.shape[:2], dtype=torch.bool)
    if mask.is_floating_point():
        raise TypeError(f"`mask` must be bool or integers, got {mask.dtype}. Pass `mask != 0`.")
    _check_shape("mask", mask, activations.shape[:2], "activations[..., 0]")
    distance = (_upcast(activations) - _upcast(target.detach())).square().mean(dim=-1)
    return _masked_mean(distance, mask != 0)


@contextmanager
def _reference_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # PEFT's disable_adapter() leaves every adapter parameter trainable, also one that was frozen before.
    flags = [(param, param.requires_grad) for param in model.parameters()]
    try:
        model.eval()
        with torch.no_grad(), _adapter_off(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for param, requires_grad in flags:
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)


def _adapter_off(model: nn.Module) -> AbstractContextManager[Any]:
    for candidate in (model, getattr(model, "module", None)):  # DistributedDataParallel hides the PEFT model
        disable_adapter = getattr(candidate, "disable_adapter", None)
        if callable(disable_adapter):
            context: AbstractContextManager[Any] = disable_adapter()
            return context
    return nullcontext()


def _batch_rows(batch: Mapping[str, Tensor], position: int, seen: Container[int]) -> list[int]:
    _check_keys(batch, "index", "input_ids", "labels")
    name = f"batches[{position}]['index']"
    _check_int64(name, batch["index"])
    _check_shape(name, batch["index"], batch["labels"].shape[:1], "labels[:, 0]")
    rows: list[int] = batch["index"].tolist()
    for place, row in enumerate(rows):
        if row < 0 or row in seen or row in rows[:place]:
            raise ValueError(f"`{name}` must hold rows >= 0 that no example had before, got {row}.")
    return rows


def _check_keys(batch: Mapping[str, Tensor], *names: str) -> None:
    if not all(name in batch for name in names):
        raise ValueError(f"`batch` must have the keys {list(names)}, got {sorted(batch)}.")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {tensor.dtype}.")


def _check_int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"`{name}` must have dtype torch.int64, got {tensor.dtype}.")


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)} like `{like}`, got {tuple(tensor.shape)}.")


def _check_labels(labels: Tensor) -> None:
    _check_int64("labels", labels)
    if labels.dim() != 2:
        raise ValueError(f"`labels` must have shape [B, T], got {tuple(labels.shape)}.")


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    _check_floating("logits", logits)
    _check_labels(labels)
    if logits.dim() != 3:
        raise ValueError(f"`logits` must have shape [B, T, V], got {tuple(logits.shape)}.")
    _check_shape("labels", labels, logits.shape[:2], "logits[..., 0]")


def _check_activations(activations: Tensor) -> None:
    _check_floating("activations", activations)
    if activations.dim() != 3:
        raise ValueError(f"`activations` must have shape [B, T, H], got {tuple(activations.shape)}.")


def _check_per_example(**tensors: Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    if first.dim() != 1 or first.numel() == 0:
        raise ValueError(f"`{first_name}` must have shape [B] with B >= 1, got {tuple(first.shape)}.")
    for name, tensor in tensors.items():
        _check_floating(name, tensor)
        _check_shape(name, tensor, first.shape, first_name)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value!r}.")
