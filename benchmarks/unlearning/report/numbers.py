"""Numbers as a person reads them."""

from .compare import Paired, Spread

NOTHING = "-"


def plain(value: float) -> str:
    """Return about three significant digits; what is tiny keeps its magnitude, as 2e-06."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e5:
        return f"{value:.0e}"
    digits = 3 if size < 10 else 1 if size < 100 else 0
    return _unsigned_zero(f"{value:.{digits}f}")


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Return so many decimals, and no "-0.00"."""
    text = _unsigned_zero(f"{value:.{digits}f}")
    return f"+{text}" if sign and float(text) > 0 else text.replace("-", "−")


def _unsigned_zero(text: str) -> str:
    return text.removeprefix("-") if float(text) == 0 else text


def weight(value: float | None) -> str:
    """Return a learning rate or a weight, which were typed with few digits."""
    return NOTHING if value is None else f"{value:.3g}"


def spread(value: Spread | None, digits: int | None = None) -> str:
    """Return mean ± standard deviation; the mean alone for one value. ``digits`` None: as ``plain``."""
    if value is None:
        return NOTHING
    if digits is None:
        return plain(value.mean) if value.sd is None else f"{plain(value.mean)} ± {plain(value.sd)}"
    mean = fixed(value.mean, digits)
    return mean if value.sd is None else f"{mean} ± {fixed(value.sd, digits)}"


def p_value(value: Spread | None) -> str:
    """Return median and range: values that differ by orders of magnitude have no useful mean."""
    if value is None:
        return NOTHING
    median = plain(value.median)
    return median if value.n == 1 else f"{median} [{plain(value.low)}, {plain(value.high)}]"


def span(value: tuple[float, float] | None, digits: int = 2) -> str:
    """Return "least to largest"."""
    if value is None:
        return NOTHING
    low, high = (fixed(end, digits) if abs(end) < 1e5 else plain(end).replace("-", "−") for end in value)
    return f"{low} to {high}"


def interval(value: Paired, digits: int) -> str:
    """Return the mean difference and its interval: "−0.42 [−0.73, −0.11]"."""
    if value.mean is None:
        return NOTHING
    mean = fixed(value.mean, digits, sign=True)
    if value.low is None or value.high is None:
        return mean
    return f"{mean} [{fixed(value.low, digits, sign=True)}, {fixed(value.high, digits, sign=True)}]"


def percent(value: float) -> str:
    """Return whole percents."""
    return f"{100 * value:.0f} %"
