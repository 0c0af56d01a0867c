"""What a server is told: where it listens, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass

from mp2.engine.onnx.plugins import PLUGINS
from mp2.limits import MAX_THREADS
from mp2.options import check, option


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of ``mp2 serve``."""

    bundle: str = option(help="Bundle of 'mp2 export --run'; or an engine folder: tensors only.", kind="path")
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network.")
    port: int = option(8000, "Port; 0 takes a free one.", at_least=0, at_most=65535)
    device: str = option("cpu", "What computes.", choices=("cpu", "cuda", *PLUGINS))
    threads: int | None = option(
        None, "Threads of the forward.", default_text="the cores", at_least=1, at_most=MAX_THREADS
    )
    max_batch: int = option(32, "Sequences of one forward, at most.", at_least=1, at_most=4096)
    max_wait_ms: float = option(
        2.0, "How long a sequence may wait for others when nothing computes.", at_least=0, at_most=10_000
    )
    mix_tasks: bool = option(True, "Keep tasks in batches of their own, to compare.", flag="no-mix-tasks")
    queue: int = option(256, "Sequences that may wait; more get 429.", at_least=1, at_most=1_000_000)
    timeout_s: float = option(
        30.0, "A request's longest time: to arrive (408), to be answered (504).", above=0, at_most=86_400
    )
    max_body_mib: float = option(16.0, "Largest request body (413).", above=0, at_most=65_536)

    def __post_init__(self) -> None:
        """Refuse values that no server can have."""
        check(self)

    @property
    def max_body_bytes(self) -> int:
        """Largest body."""
        return int(self.max_body_mib * 2**20)
