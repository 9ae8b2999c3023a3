"""How good a table is: whole steps that it had no part in, measured against its predictions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from kwsearch.latency.measure import Timed, measure
from kwsearch.latency.predict import Predictor
from kwsearch.latency.profiling import Step
from kwsearch.latency.subjects import Mode, Subject
from kwsearch.latency.table import DRIFT, Check, Table, TableError
from kwsearch.verdict import kendall
from kwsearch.wording import one_line

# Where prediction and measurement are further apart, the measurement is in doubt; and how many more
# are made then.
_DOUBT, _AGAIN = 0.15, 2


def check(
    table: Table, steps: Iterable[Step], note: Callable[[Subject, Mode, str], None]
) -> Iterator[Check]:
    """Predict each step, measure it, and yield both. Steps that the table has as wholes are left
    out, and with a note those that it says nothing about or that cannot run. Measured times are
    those of a machine on which the anchor takes as long as it usually did for the table. Where the
    machine was slow, and where prediction and measurement do not agree, it is measured twice more,
    and the median counts, whatever it is.
    """
    predictor, known = Predictor(table), {whole.key for whole in table.wholes}
    device = str(table.circumstances["device"])
    usual = 1e-9 * table.anchor()
    for step in steps:
        if step.key in known:
            continue
        making = partial(step.subject.whole, step.mode)
        try:
            predicted = predictor.step(step.calls, step.mode.batch, step.mode.training)
            ms, slow = _measured(making, device, usual)
            agrees = abs(predicted.ms / ms - 1) <= _DOUBT and predicted.low <= ms <= predicted.high
            if slow or not agrees:
                more = (_measured(making, device, usual)[0] for _ in range(_AGAIN))
                ms = statistics.median((ms, *more))
        except (TableError, RuntimeError, MemoryError) as error:
            note(step.subject, step.mode, one_line(error))
            continue
        yield Check(
            step.name,
            step.mode.batch,
            step.mode.training,
            ms,
            predicted.ms,
            predicted.low,
            predicted.high,
        )


def _measured(making: Callable[[], Timed], device: str, usual: float) -> tuple[float, bool]:
    """Milliseconds at the usual speed, and whether the machine was slow. usual: of the anchor."""
    (times,) = measure([making], device)
    return 1e3 * times.median * usual / times.anchor, times.anchor > (1 + DRIFT) * usual


def summary(checks: Sequence[Check]) -> dict[str, float]:
    """Median and worst error, as parts of what was measured; the part of the steps within their
    interval; Kendall's tau of predicted and measured times.
    """
    errors = [abs(one.error) for one in checks]
    within = [one.low_ms <= one.measured_ms <= one.high_ms for one in checks]
    found = {
        "median": statistics.median(errors),
        "worst": max(errors),
        "within": sum(within) / len(within),
    }
    ranked = kendall([(one.predicted_ms, one.measured_ms) for one in checks])
    return found if ranked.tau is None else {**found, "tau": ranked.tau}
