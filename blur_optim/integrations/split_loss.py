"""The two losses inside one ``compute_loss``: what a weighted-sum trainer says of its forget and its retain loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: What may be done to a retain loss that was not computed: the result stays linear in it. A property is a ``__get__``.
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "sub", "rsub", "__sub__", "__rsub__", "__isub__", "sum", "mean"}
_SUMS |= {"neg", "__neg__", "positive", "__pos__", "stack", "hstack", "vstack", "cat", "__getitem__"}
_SHAPES = {"to", "float", "double", "clone", "squeeze", "unsqueeze", "reshape", "view", "dim", "size", "numel"}
_SHAPES |= {"__get__"}  # A property.
_PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__"}
_QUOTIENTS = {"div", "true_divide", "__truediv__", "__itruediv__"}


class RetainLossNeeded(Exception):
    """A method looked at the value of its retain loss; never leaves this module."""


class UncomputedLoss(Tensor):
    """Stands for a retain loss of unknown value in a sum, so that its forward pass can be left out.

    Raises:
        RetainLossNeeded: anything but a linear function with constant weights is made of it, or its value is read.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        is_linear = _is_weighted(name, args) if name in _PRODUCTS | _QUOTIENTS else name in _SUMS | _SHAPES
        if not is_linear:
            raise RetainLossNeeded
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _is_weighted(name: str, args: Any) -> bool:
    """Whether a product or quotient is one of an uncomputed loss and something that no gradient is wanted of."""
    one, other = args[0], args[1]
    if name in _QUOTIENTS and isinstance(other, UncomputedLoss):
        return False
    weight = other if isinstance(one, UncomputedLoss) else one
    is_constant = not isinstance(weight, Tensor) or not weight.requires_grad or hasattr(weight, "_is_weight")
    return is_constant and not isinstance(weight, UncomputedLoss)


class SplitLoss:
    r"""Take the loss :math:`\gamma F + \alpha R` of a trainer apart, in one forward pass for each part.

    The trainer's ``compute_loss(model, {"forget": ..., "retain": ...})`` runs with its ``compute_retain_loss`` replaced
    by a leaf :math:`r` of the graph. What is left depends on the forget data alone; its derivative by :math:`r` is the
    weight of the retain loss, wherever the method keeps it. Where a method reads the value of its retain loss (as
    primal-dual ones do) that is computed without gradients. A method that calls no ``compute_retain_loss`` is
    evaluated with weights (gamma, 0) and (0, 1) instead, at twice the cost.

    Args:
        trainer: has ``gamma``, ``alpha``, ``compute_retain_loss``.
        method: its class, whose ``compute_loss`` is called.
        forget_only: ``compute_loss`` has no retain loss; it gets the forget half alone.
    """

    def __init__(self, trainer: Any, method: Any, forget_only: bool = False) -> None:
        self.trainer, self.method, self.forget_only = trainer, method, forget_only
        self._reads_retain_loss = False
        self._splits_by_weights = self._is_known = False
        self._is_weighted_by_gamma: bool | None = None
        #: Whether the method weighs its losses by something else than the attributes ``gamma`` and ``alpha``.
        self.has_own_weights = False
        # For each micro-batch of the step that the retain phase has not seen yet: the method's call, and its weight.
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._weights: list[Tensor] = []

    def begin(self) -> None:
        """Forget what an interrupted step has left."""
        self._calls, self._weights = [], []

    def forget(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The forget loss of a pair of batches, 0-d or [GPUs], without its weight unless that is the method's own.

        Raises:
            RuntimeError: the method's loss cannot be taken apart.
        """
        if self.forget_only:
            return self._unweighted(*self._evaluate(model, {"forget": inputs["forget"]}))
        if self._splits_by_weights:
            return self._by_weights(model, inputs, alpha=0.0)
        evaluated = self._evaluate(model, inputs)
        loss, leaves = evaluated
        if len(self._calls) - len(self._weights) != 1 or "r" not in leaves:
            return self._other_way(model, inputs, loss, leaves)
        if not self._is_known:
            self._is_known = True
            (by_alpha,) = _gradients(loss, leaves["alpha"])
            self.has_own_weights = by_alpha is None
        # One that changed its alpha on the way weighs by itself, too.
        self.has_own_weights |= self.trainer.alpha is not leaves["before"]
        (weight,) = _gradients(loss, leaves["r"])
        if weight is None:
            raise RuntimeError(f"{self._name} calls compute_retain_loss and does not use what it returns.")
        self._weights.append(weight)
        loss = loss - (weight * leaves["r"]).detach()
        return loss if self.has_own_weights else self._unweighted(loss, leaves)

    def retain_weight(self) -> Tensor:
        """The mean over the step's micro-batches of the weights that the method gives its retain loss, 0-d."""
        return torch.stack(self._weights).mean()

    def retain(self, model: Any, inputs: Mapping[str, Any], retain_weight: float = 1.0) -> Tensor:
        """The retain loss of the next pair in the order of :meth:`forget`, without its weight.

        Args:
            retain_weight: what the step multiplies with; where micro-batches have weights of their own, their mean.
        """
        if self._splits_by_weights:
            return self._by_weights(model, inputs, gamma=0.0, alpha=1.0)
        if self.forget_only:
            kept = {name: inputs["retain"][name] for name in ("input_ids", "attention_mask", "labels")}
            loss: Tensor = self.trainer.compute_retain_loss(model=model, retain_inputs=kept)
            return loss
        args, kwargs = self._calls.pop(0)
        weight = self._weights.pop(0)
        own: Tensor = self.trainer.compute_retain_loss(*args, **kwargs)
        return own * (weight / retain_weight) if self.has_own_weights and retain_weight else own

    # -- One evaluation of the method's loss -------------------------------------------------------------------------

    def _evaluate(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        known = len(self._calls)
        if not self._reads_retain_loss:
            try:
                return self._evaluate_once(model, inputs)
            except RetainLossNeeded:
                self._reads_retain_loss = True
                del self._calls[known:]
        return self._evaluate_once(model, inputs)

    def _evaluate_once(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        trainer = self.trainer
        leaves: dict[str, Any] = {"before": trainer.alpha}
        for name in ("gamma", "alpha"):
            value = float(getattr(trainer, name))
            # With a weight of 0 there is nothing to divide by.
            leaf = torch.tensor(1.0 if name == "gamma" and not value else value, device=trainer.args.device)
            leaf._is_weight = True  # type: ignore[attr-defined]
            leaves[name] = leaf.requires_grad_()

        def stand_in(*args: Any, **kwargs: Any) -> Tensor:
            self._calls.append((args, kwargs))
            value = torch.zeros((), device=trainer.args.device)
            if self._reads_retain_loss:
                with torch.no_grad():
                    value = self.method.compute_retain_loss(trainer, *args, **kwargs).detach().clone()
            leaves["r"] = value.requires_grad_()
            return value if self._reads_retain_loss else value.as_subclass(UncomputedLoss)

        with _attributes(trainer, gamma=leaves["gamma"], alpha=leaves["alpha"], compute_retain_loss=stand_in):
            loss: Tensor = self.method.compute_loss(trainer, model, inputs)
        return loss.as_subclass(Tensor), leaves

    def _unweighted(self, loss: Tensor, leaves: Mapping[str, Any]) -> Tensor:
        if self._is_weighted_by_gamma is None:
            self._is_weighted_by_gamma = _gradients(loss, leaves["gamma"])[0] is not None
        return loss / leaves["gamma"].detach() if self._is_weighted_by_gamma else loss

    # -- Methods that call no compute_retain_loss --------------------------------------------------------------------

    def _other_way(self, model: Any, inputs: Mapping[str, Any], loss: Tensor, leaves: Mapping[str, Any]) -> Tensor:
        self.begin()
        by_gamma, by_alpha = _gradients(loss, leaves["gamma"], leaves["alpha"])
        if by_gamma is not None and by_alpha is not None:
            self._splits_by_weights = True
            return self._by_weights(model, inputs, alpha=0.0)
        try:
            loss, leaves = self._evaluate(model, {"forget": inputs["forget"]})
        except KeyError:
            raise RuntimeError(
                f"{self._name}.compute_loss cannot be taken apart into a forget and a retain loss: it takes its retain "
                "loss neither from self.compute_retain_loss nor weighs it with self.alpha, and the forget loss with "
                "self.gamma. Let it do one of the two."
            ) from None
        self.forget_only = True
        return self._unweighted(loss, leaves)

    def _by_weights(self, model: Any, inputs: Mapping[str, Any], **weights: float) -> Tensor:
        with _attributes(self.trainer, **{"gamma": 1.0, **weights}):
            loss: Tensor = self.method.compute_loss(self.trainer, model, inputs)
        return loss

    @property
    def _name(self) -> str:
        return str(self.method.__name__)


def _gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(leaves)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss.mean(), leaves, retain_graph=True, allow_unused=True)
    return found


@contextmanager
def _attributes(target: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes for a while; one that is assigned meanwhile stays as assigned."""
    missing = object()
    before = {name: target.__dict__.get(name, missing) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in values.items():
            now = target.__dict__.get(name, missing)
            if now is not value:
                setattr(target, name, float(now) if isinstance(now, Tensor) else now)
            elif before[name] is missing:
                delattr(target, name)
            else:
                setattr(target, name, before[name])
