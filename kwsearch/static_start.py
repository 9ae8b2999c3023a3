"""The static weights that the trainings of a study start from: trained once, kept in a file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock
from torch import Tensor, nn

from kwsearch import checkpoint, proxy
from kwsearch.files import is_here
from kwsearch.recipe import Proxy


def weights(
    make_model: Callable[[], nn.Module],
    images: proxy.Examples,
    settings: Proxy,
    folder: Path,
    width: float | None,
) -> dict[str, Tensor]:
    """The state dict of the static network, trained for `settings.init_epochs` epochs.

    Whoever comes first trains it, after a kill from its last epoch; others wait. folder: where
    its files are. width: of the network, which names them; None is 1. Raises what
    `kwsearch.proxy.train` does.
    """
    name = f"static_{1.0 if width is None else width:g}"
    epochs = settings.init_epochs or settings.epochs
    own = settings.model_copy(update={"init": "scratch", "init_epochs": None, "epochs": epochs})
    key = f"static weights {own.model_dump_json(exclude={'threads', 'device'})}"
    # Object storage has no locks: there, who comes at the same time trains the same once more.
    lock = FileLock(folder / f"{name}.lock") if is_here(folder) else nullcontext()
    with lock:
        if (kept := checkpoint.load(folder / f"{name}.pt", key)) is not None:
            found: dict[str, Tensor] = kept["model"]
            return found
        half_done = folder / f"{name}.training.pt"

        def keep(model: nn.Module) -> None:
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            checkpoint.save(folder / f"{name}.pt", key, {"model": state})

        proxy.train(
            make_model,
            None,
            images,
            own,
            0,
            lambda epoch, accuracy: None,
            checkpoint=half_done,
            done=keep,
        )
        half_done.unlink(missing_ok=True)
        state = checkpoint.load(folder / f"{name}.pt", key)
        assert state is not None
        return state["model"]  # type: ignore[no-any-return]
