"""Which of an engine's places a request takes: the one that has read most of its prompt already."""

from __future__ import annotations

from collections.abc import Sequence


class Slots:
    """Places whose keys and values stay where they are until somebody else takes the place.

    They are the prefix cache: what a prompt shares with what its place holds is not read again. Keys and values
    depend on the adapter, so only a place that had the same one counts.
    """

    def __init__(self, count: int) -> None:
        self._held: list[tuple[str | None, Sequence[int]]] = [(None, ())] * count
        self._free = list(range(count))  # the least recently used one first

    def take(self, adapter: str | None, prompt: Sequence[int]) -> int:
        """A place that nobody has."""
        best, longest = self._free[0], 0
        for place in self._free:
            by, held = self._held[place]
            if by == adapter and (shared := common(held, prompt)) > longest:
                best, longest = place, shared
        self._free.remove(best)
        return best

    def give(self, place: int, adapter: str | None, held: Sequence[int]) -> None:
        self._held[place] = (adapter, held)
        self._free.append(place)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
