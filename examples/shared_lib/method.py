"""The options of BLUR that several command lines have: how the two gradients are compared."""

import argparse

from .arguments import not_negative

RULES = ("blur", "retain_first", "conflict", "barrier", "weighted_sum", "normalized")
METRICS = ("euclidean", "retain")
SCOPES = ("global", "group", "parameter")
WITHOUT_BETA = ("ga", "margin")
DAMPING = 0.01


def add_rule_and_metric(group: argparse._ArgumentGroup) -> None:
    """Add ``--rule``, ``--scope``, ``--metric`` and ``--damping``."""
    group.add_argument("--rule", choices=RULES, default="blur", help="how the two gradients meet (default: blur)")
    group.add_argument(
        "--scope",
        choices=SCOPES,
        default="global",
        help="over what the gradients are compared; with --metric retain, parameter lets every tensor forget "
        "(default: global)",
    )
    group.add_argument(
        "--metric",
        choices=METRICS,
        default="euclidean",
        help="retain: steps that cost the retain loss least, by the second moments of its gradient. Weights are then "
        "steps in units of --lr, 1 the usual; docs/method.md (default: euclidean, the paper)",
    )
    group.add_argument("--damping", type=not_negative, metavar="X", help=f"of --metric retain (default: {DAMPING:g})")


def coefficient_text(value: float | list[float]) -> str:
    """Write a coefficient of a step, or the range of those of its groups or tensors."""
    return f"{min(value):.3g} to {max(value):.3g}" if isinstance(value, list) else f"{value:.3g}"


def check_beta(parser: argparse.ArgumentParser, options: argparse.Namespace, loss: str) -> None:
    """Leave where ``--beta`` was given to a forget loss that has none; ``loss`` is the option that names it."""
    chosen = getattr(options, loss.replace("-", "_"))
    if options.beta is not None and chosen in WITHOUT_BETA:
        parser.error(f"argument --beta: --{loss} {chosen} has none; leave it out")


def check_metric(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the damping; leave where options were given that the metric does not go with."""
    if options.damping is not None and options.metric != "retain":
        parser.error("argument --damping: needs --metric retain, which was not given")
    if options.metric == "retain" and getattr(options, "stash", None) == "recompute":
        parser.error(
            "argument --stash: recompute never has the whole retain gradient, which --metric retain needs; int8 does"
        )
    options.damping = DAMPING if options.damping is None else options.damping
