"""Where the trials of a study run: the executor that its recipe asks for."""

from __future__ import annotations

from collections.abc import Callable

from kwsearch import train_step
from kwsearch.executors import Executor, ExecutorError
from kwsearch.recipe import Proxy, Search
from kwsearch.storage import PROXY, Place


def executor_of(
    search: Search,
    proxy: Proxy,
    nbytes: Callable[[], int],
    say: Callable[[str], object],
    place: Place,
    address: str | None = None,
) -> Executor:
    """nbytes: the memory of one trial, asked where it decides how many fit. place: of the study.
    address: of a cluster.

    Raises executors.ExecutorError where there is none, or none that can run a trial, and
    database.StorageError.
    """
    slots = None if search.workers == "auto" else search.workers
    if search.executor == "queue":
        from kwsearch.executors.queue import QueueExecutor
        from kwsearch.worker import encode

        if place.url is None or place.url.startswith(PROXY):
            what = "" if place.url is None else f", which {place.url} is only a proxy of"
            raise ExecutorError(
                f"search.executor queue: workers take trials from a database{what}: give "
                "--storage, such as postgresql+psycopg://user@host/database"
            )
        return QueueExecutor(place.url, place.study, slots, encode, say)
    if search.executor == "ray":
        from kwsearch.executors.ray import RayExecutor

        cpus, gpus = resources_of(search, proxy)
        return RayExecutor(slots, cpus, gpus, address)

    from kwsearch.executors.local import LocalExecutor

    return LocalExecutor(slots_of(search, proxy, nbytes), proxy.threads, train_step.gpus(proxy))


def slots_of(search: Search, proxy: Proxy, nbytes: Callable[[], int]) -> int:
    """Trials at a time on this machine. nbytes: the memory of one, for `auto` on GPUs."""
    return train_step.slots(proxy, nbytes) if search.workers == "auto" else search.workers


def planned_slots(search: Search, proxy: Proxy, nbytes: Callable[[], int]) -> int | None:
    """Trials at a time, without asking any cluster; None for as many as it will have room for."""
    if search.executor == "local":
        return slots_of(search, proxy, nbytes)
    return None if search.workers == "auto" else search.workers


def resources_of(search: Search, proxy: Proxy) -> tuple[float, float]:
    """CPUs and GPUs that a cluster keeps for each trial."""
    cpus, gpus = search.resources.cpus, search.resources.gpus
    return (
        float(proxy.threads or 1) if cpus is None else cpus,
        float(proxy.device == "cuda") if gpus is None else gpus,
    )
