"""The living objects of a class: how wrappers are found that keep no list of what they have wrapped."""

import gc
from collections.abc import Iterator
from typing import Any


def instances(cls: type) -> Iterator[Any]:
    """Yield the instances of ``cls`` that the garbage collector knows. A scan of 0.1 s: call it once."""
    return (o for o in gc.get_objects() if issubclass(type(o), cls))
