"""Optimisation profiles: which shapes a TensorRT plan accepts, and which it is tuned for.

The sizes are the graphs' own names. Of a whole backbone: ``N`` rows, ``P`` prompts, ``T`` tokens, ``m``
prompt rows, ``S`` segments. Of a graph of the chain, which ONNX Runtime's TensorRT provider runs: ``N``
examples, ``P_hidden`` and ``P_prefix`` candidates of the text and of the prefix, ``N_prefix`` examples of the
prefix, ``P`` candidates where a graph has one kind only. A `Profile` gives each a range and the value that
matters most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mp2.errors import UsageError

Range = tuple[int, int, int]
"""Smallest, best (what the kernels are tuned for), largest."""

Sizes = Mapping[str, int]
Shape = Sequence[int | str]
_SEGMENTS = 4  # text fields of a row that heads pool over, at most
_STEP = 32  # lengths are rounded up to this where a plan must grow
_CLASS_STEP = 16  # and a task's classes end at multiples of this


@dataclass(frozen=True)
class Profile:
    """A range for each named size of a graph's inputs."""

    ranges: Mapping[str, Range]

    def __post_init__(self) -> None:
        """Raise UsageError unless 1 <= smallest <= best <= largest."""
        for name, (low, best, high) in self.ranges.items():
            if not 1 <= low <= best <= high:
                raise UsageError(
                    f"profile of '{name}' is {(low, best, high)}, expected 1 <= min <= opt <= max"
                )

    def covers(self, sizes: Sizes) -> bool:
        """Tell whether every size lies in its range."""
        return all(self.ranges[name][0] <= size <= self.ranges[name][2] for name, size in sizes.items())

    def distance(self, sizes: Sizes) -> float:
        """Tell how far ``sizes`` are from what the kernels are tuned for (product of ratios, less 1)."""
        ratios = (max(size, self.ranges[n][1]) / min(size, self.ranges[n][1]) for n, size in sizes.items())
        total = 1.0
        for ratio in ratios:
            total *= ratio
        return total - 1.0

    def shapes(self, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return smallest, best and largest shape of an input declared as ``shape`` (names and numbers)."""
        return (self._shape(shape, 0), self._shape(shape, 1), self._shape(shape, 2))

    def _shape(self, shape: Shape, which: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else self.ranges[size][which] for size in shape)


@dataclass(frozen=True, kw_only=True)
class TaskShapes:
    """The batches of one task: what profiles are made for.

    ``lengths`` are the longest sequences of the length classes, ascending (a class starts where the one below
    ends); ``prompt_tokens`` prefix rows, or rows in the sequence if ``shallow``.
    """

    candidates: int = 20
    examples: int = 32
    lengths: tuple[int, ...] = (64, 128, 256)
    prompt_tokens: int = 50
    shallow: bool = field(default=False)

    def __post_init__(self) -> None:
        """Raise UsageError for sizes below 1 or lengths that do not ascend."""
        for name in ("candidates", "examples", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise UsageError(f"lengths are {self.lengths}, expected ascending numbers of tokens")

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        *,
        candidates: int,
        prompt_tokens: int,
        shallow: bool = False,
        n_classes: int = 3,
    ) -> TaskShapes:
        """Return the shapes for sequences of ``lengths``: at most ``n_classes`` classes of even fill."""
        ordered = sorted(-(-length // _CLASS_STEP) * _CLASS_STEP for length in lengths)
        edges = [ordered[-(-len(ordered) * k // n_classes) - 1] for k in range(1, n_classes + 1)]
        return cls(
            candidates=candidates,
            examples=len(ordered),
            lengths=tuple(sorted(set(edges))),
            prompt_tokens=prompt_tokens,
            shallow=shallow,
        )

    def whole_profiles(self) -> tuple[Profile, ...]:
        """Return the profiles of a plan of a whole backbone: one for each class of lengths.

        Each row has a prompt of its own, of at least one row, if only filling.
        """
        m, n = self.prompt_tokens, _up_to(self.examples)
        rows = {"P": n, "N": n, "m": (1, m, m), "S": (1, 1, _SEGMENTS)}
        edges = zip((0, *self.lengths), self.lengths, strict=False)
        return tuple(Profile({**rows, "T": (low + 1, high, high)}) for low, high in edges)

    def chain_profile(self, graph: str) -> Profile:
        """Return the profile of a graph of the chain (``embed.onnx``, ``layer_03.onnx``, ``head.onnx``)."""
        m, p, n = self.prompt_tokens, _up_to(self.candidates), _up_to(self.examples)
        t = _up_to(self.lengths[-1] + (m if self.shallow else 0))
        if graph == "embed_inline.onnx":
            return Profile({"P": p, "m": (1, m, m)})
        if graph == "embed.onnx":
            return Profile({"N": n, "T": t})
        if graph.endswith("_plain.onnx") or graph == "head.onnx":
            return Profile({"P": p, "N": n, "T": t})
        own = n if self.shallow else (1, 1, 1)  # the last layer: each example of a candidate has its own rows
        return Profile({"P_hidden": p, "P_prefix": p, "N": n, "N_prefix": own, "T": t, "m": (1, m, m)})


def grown(profiles: Sequence[Profile], sizes: Sizes) -> tuple[Profile, ...]:
    """Return ``profiles`` and one more, for ``sizes`` that none of them covers and all smaller ones.

    Its lengths reach as far as the others' and its examples to a power of two: a test set comes in many
    sizes, and each growth is a build.
    """
    ranges = {}
    for name, size in sizes.items():
        high = size
        if name == "T":
            high = max([-(-size // _STEP) * _STEP, *(profile.ranges["T"][2] for profile in profiles)])
        elif name in ("N", "N_prefix"):
            high = 1 << (size - 1).bit_length()
        ranges[name] = (1, size, high)
    return (*profiles, Profile(ranges))


def stretched(profile: Profile, sizes: Sizes) -> Profile:
    """Return ``profile`` with room for ``sizes``, too, as far as `grown` goes; still tuned for the same."""
    more = grown([profile], sizes)[-1].ranges
    return Profile(
        {
            name: (min(low, more[name][0]), best, max(high, more[name][2]))
            for name, (low, best, high) in profile.ranges.items()
        }
    )


def best_profile(profiles: Sequence[Profile], sizes: Sizes) -> int | None:
    """Return the index of the covering profile that is tuned nearest to ``sizes``, None if none covers."""
    fits = [index for index, profile in enumerate(profiles) if profile.covers(sizes)]
    return min(fits, key=lambda index: profiles[index].distance(sizes), default=None)


def sizes_of(shapes: Mapping[str, Shape], given: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the named sizes of inputs ``given`` (name -> shape) to a graph declared with ``shapes``.

    Raises UsageError where an input contradicts the graph or another input.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        got = tuple(given[name])
        same = len(got) == len(shape)
        for size, declared in zip(got, shape, strict=False):
            same = same and size == (
                declared if isinstance(declared, int) else sizes.setdefault(declared, size)
            )
        if not same:
            raise UsageError(f"input '{name}' has shape {got}, expected {tuple(shape)} with {sizes}")
    return sizes


def _up_to(size: int) -> Range:
    return (1, size, size)
