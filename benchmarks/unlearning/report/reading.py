"""Sentences that follow from the numbers by fixed rules, and say nothing that these do not."""

from collections import Counter
from collections.abc import Iterable, Iterator

from .compare import BETTER, NO_PAIR, ONE_SEED, TAUS, TIE, WORSE, Paired
from .gradients import Alignment, alignment
from .names import WEIGHTED_SUM, Method
from .numbers import fixed, percent
from .summary import MethodSummary, Summary

MAIN_TAU = 0.95
ORTHOGONAL = 0.1  # a mean cosine no larger than this leaves 1 % of a gradient's squared norm to project away
SATURATED, GROWN = 0.1, 10.0  # last ‖g_f‖ over the first
PHRASES = {ONE_SEED: "no interval from one seed", NO_PAIR: "not compared"}


def reading(summary: Summary) -> list[str]:
    """Return the sentences in the order of the report."""
    compared = [m for m in summary.methods if summary.baseline(m)]
    sentences = [sentence for m in compared for sentence in [_method(summary, m)]]
    return [
        *_yardsticks(summary),
        *_counts(summary, compared),
        *sentences,
        *_divergence(summary),
        *_gradients(summary),
    ]


def _yardsticks(summary: Summary) -> Iterator[str]:
    levels = [y.final.forget for y in summary.setting.retrained.values()]
    if levels:
        log_prob = sum(level.log_prob for level in levels) / len(levels)
        yield (
            f"The retrained model has log p_forget {fixed(log_prob, 2)}. A method that reaches this has forgotten as "
            "much as if it had never seen the rows; what it forgets beyond is no merit in itself."
        )


def _counts(summary: Summary, compared: list[MethodSummary]) -> Iterator[str]:
    """Count verdicts over pairs of losses for every way of combining that occurs with at least two."""
    by_combination: dict[str, list[str]] = {}
    for method in compared:
        found = summary.at_equal_retain(method, MAIN_TAU)
        if found:
            by_combination.setdefault(method.method.combine_label, []).append(found.verdict)
    for label, verdicts in by_combination.items():
        if len(verdicts) > 1:
            count = Counter(verdicts)
            named = [f"{verdict} {count[verdict]}" for verdict in (BETTER, TIE, WORSE)]
            named += [f"{PHRASES[verdict]} {count[verdict]}" for verdict in PHRASES if count[verdict]]
            yield (
                f"{label} beside the weighted sum, keeping {percent(MAIN_TAU)}, over {len(verdicts)} pairs of losses: "
                f"{', '.join(named)}."
            )


def _method(summary: Summary, method: MethodSummary) -> str:
    found = summary.at_equal_retain(method, MAIN_TAU)
    assert found is not None
    taus = [tau for tau in TAUS if tau != MAIN_TAU]
    others = [f"keeping {percent(tau)}: {_verdict(summary.at_equal_retain(method, tau))}" for tau in taus]
    others.append(f"hypervolume: {_verdict(summary.of_hypervolume(method))}")
    return f"**{method.method.label}**: {difference(found)}. ({'; '.join(others)}{_incomplete(summary, method)}.)"


def difference(found: Paired) -> str:
    """Say what one comparison at equal retain found, with its verdict in bold."""
    parts = [_gain(found) if found.pairs else "no seed in which it and the weighted sum both keep enough"]
    parts += [
        f"{who} {count} of {found.seeds} seeds"
        for who, count in (
            ("the weighted sum does not keep enough, and it does, in", found.only_ours),
            ("it does not keep enough, and the weighted sum does, in", found.only_theirs),
            ("neither keeps enough in", found.neither),
            ("still to run:", found.not_run),
        )
        if count
    ]
    return "; ".join(parts) + f" → **{PHRASES.get(found.verdict, found.verdict)}**"


def _gain(found: Paired) -> str:
    assert found.mean is not None
    if found.mean == 0:
        return f"the same log p_forget at equal retain as the weighted sum, in {_seeds(found.pairs)}"
    sign, word = (-1, "lower") if found.mean < 0 else (1, "higher")
    between = ""
    if found.low is not None and found.high is not None:
        low, high = sorted((sign * found.low, sign * found.high))
        between = f" [{fixed(low, 3)}, {fixed(high, 3)}]"
    return (
        f"{word} log p_forget at equal retain than the weighted sum by {fixed(sign * found.mean, 3)}{between}, "
        f"better in {found.wins} of {_seeds(found.pairs)}"
    )


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _verdict(found: Paired | None) -> str:
    return PHRASES[NO_PAIR] if found is None else PHRASES.get(found.verdict, found.verdict)


def _incomplete(summary: Summary, method: MethodSummary) -> str:
    baseline = summary.baseline(method)
    both = [method, baseline] if baseline else [method]
    missing = sum(len(m.missing) for m in both)
    return f"; incomplete: {missing} of {sum(len(m.expected) for m in both)} runs are missing" if missing else ""


def _divergence(summary: Summary) -> Iterator[str]:
    named = [f"{m.method.label} {m.diverged} of {len(m.runs)}" for m in summary.methods if m.diverged]
    if named:
        yield f"Runs that diverged: {', '.join(named)}. What they had reached before counts, as for everyone."


def _gradients(summary: Summary) -> Iterator[str]:
    """Say how gradients met for the weighted sum and BLUR."""
    for losses in summary.losses:
        for method in summary.of_losses(losses):
            if method.method.combine in (WEIGHTED_SUM, "blur") and method.selected_runs:
                found = list(_alignment(method.method, alignment(method.selected_runs)))
                if found:
                    yield " ".join(found)


def _alignment(method: Method, found: Alignment) -> Iterable[str]:
    if found.cosine and found.opposed:
        if abs(found.cosine.mean) <= ORTHOGONAL:
            word = "nearly orthogonal on average: there is little to project away"
        else:
            word = "opposed on average" if found.cosine.mean < 0 else "aligned on average"
        yield (
            f"{method.label}, at the selected weight: the gradients are {word} (mean cosine "
            f"{fixed(found.cosine.mean, 2)}, opposed in {percent(found.opposed.mean)} of the steps)."
        )
    if found.first_norm and found.last_norm and found.first_norm.mean > 0:
        ratio = found.last_norm.mean / found.first_norm.mean
        word = "saturates" if ratio < SATURATED else "grows" if ratio > GROWN else "neither saturates nor explodes"
        yield f"‖g_f‖ {word}: at the end it is {ratio:.2g} of its first value."
