"""Measure one case: check each entrant, then time it on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tokenyard.activations import up_rows
from tokenyard.measure.breakdown import break_down
from tokenyard.measure.kinds import KINDS
from tokenyard.measure.memory import peak_bytes
from tokenyard.measure.timing import Stages
from tokenyard.measure.trace import trace
from tokenyard.tolerance import relative_error
from tokenyard_bench.dense import DenseMatmuls
from tokenyard_bench.entrant import COARSE
from tokenyard_bench.exchange.entrant import Candidate, RankEntrant, judge_rank
from tokenyard_bench.exchange.rank_case import RankCase
from tokenyard_bench.exchange.sent import sent_bytes
from tokenyard_bench.exchange.times import Timer
from tokenyard_bench.exchange.world import World
from tokenyard_bench.oracle import Results, Verdict
from tokenyard_bench.sweep import release_memory
from tokenyard_cli.results import Record

DENSE = "dense"
DENSE_BUSIEST = "dense, busiest rank"

_IN_FP8 = 0.1  # the relative error of FP8 is some percent in every dtype
_PROFILED = 3  # steps, for the kinds of work
_KINDS = (*KINDS, "other", "host")


class Checked(NamedTuple):
    """A correct entrant on this rank, and what the check gave."""

    entrant: RankEntrant
    results: Results
    verdict: Verdict
    allowed: float  # error
    difference: float  # from the first entrant, the largest of all results


def _allowed(candidate: Candidate, verdict: Verdict) -> float:
    """Return the largest error of a correct entrant."""
    if candidate.in_fp8:
        return max(_IN_FP8, COARSE * verdict.allowed)
    return verdict.allowed * (COARSE if candidate.group == "peer" else 1)


class CaseMeasurement:
    """The measurement of one case. Its first correct entrant is what others are compared with."""

    def __init__(self, case: RankCase, world: World, timer: Timer):
        self.case = case
        self.world = world
        self.timer = timer
        self.first: Results | None = None

    def dense(self) -> Iterator[Record]:
        """Measure the matmuls of a rank as dense ones: of its mean rows, and of the busiest's."""
        busiest_rank = self.case.busiest()[1]
        rows = {DENSE: 1.0, DENSE_BUSIEST: busiest_rank}
        for name, multiple in rows.items():
            matmuls = DenseMatmuls(self.case.workload, round(self.case.slots * multiple))
            yield {"contestant": name, "group": "dense", "note": None} | self._times(
                matmuls.stages()
            )

    def entrant(self, candidate: Candidate) -> Record:
        """Check an entrant, and time it if it is correct on every rank."""
        head: Record = {"contestant": candidate.name, "group": candidate.group, "note": None}
        reason = self.world.agree(candidate.unusable)
        if reason is not None:
            return head | {"note": reason}
        checked = self._try(candidate)
        fault = self.world.agree(checked if isinstance(checked, str) else None)
        if fault is not None or isinstance(checked, str):
            self.world.renew_group()
            release_memory()
            return head | {"note": fault}
        if self.first is None:
            self.first = checked.results
        head |= self._facts(checked)
        return head | self._times(checked.entrant.stages()) | self._breakdown(checked.entrant)

    def _try(self, candidate: Candidate) -> Checked | str:
        """Run an entrant. Return what it computed, or its fault.

        Catches every exception: a rank that raises would leave the others waiting.
        """
        try:
            entrant = candidate.build()
            results = entrant.results()
            verdict = judge_rank(self.case, results)
            allowed = _allowed(candidate, verdict)
            if verdict.error > allowed:
                return (
                    f"wrong: {verdict.worst} is off by {verdict.error:.2e} from float64, "
                    f"and {allowed:.2e} is allowed"
                )
            difference = max(
                relative_error(results[name], want)
                for name, want in (self.first or results).items()
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            return f"failed: {type(error).__name__}: {reason}"
        return Checked(entrant, results, verdict, allowed, difference)

    def _facts(self, checked: Checked) -> Record:
        """Return the worst error, difference, memory and bytes sent of all ranks."""
        errors = self.world.gather([checked.verdict.error, checked.allowed])
        error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
        # All ranks run these steps: a rank whose result is wrong would leave the others waiting.
        stages = checked.entrant.stages()
        own_peak = peak_bytes(stages, self.world.device)
        sent = sent_bytes(stages, self.case.rank)
        ((difference, peak, *most),) = self.world.largest([[checked.difference, own_peak, *sent]])
        return {
            "error": error,
            "allowed": allowed,
            "difference": difference,
            "peak_bytes": round(peak),
            "sent_bytes": dict(zip(("forward", "backward"), map(round, most))),
        }

    def _times(self, stages: Stages) -> Record:
        """Return the times, and TFLOP/s of a rank's share of the layer."""
        workload = self.case.workload
        width = up_rows(workload.activation, workload.ffn_dim) + workload.ffn_dim
        gigaflop = 2 * self.case.slots * workload.dim * width / 1e9  # of a forward pass
        forward, backward = self.timer.idle(stages)
        step = self.timer.back_to_back(stages)
        return {
            "forward_ms": forward._asdict(),
            "backward_ms": backward._asdict(),
            "step_ms": step._asdict(),
            "forward_tflops": round(gigaflop / forward.median, 6),
            "backward_tflops": round(2 * gigaflop / backward.median, 6),
            "step_tflops": round(3 * gigaflop / step.median, 6),
        }

    def _breakdown(self, entrant: RankEntrant) -> Record:
        """Return the stages of an exchange, its kinds of work, and how long the host waits."""
        if entrant.marked is None:
            return {}
        device = self.world.device
        stages = self.timer.stages(entrant.marked, entrant.backward)
        forward, step = (
            self._kinds(part, stages["rank"]) for part in (entrant.stages()[:1], entrant.stages())
        )
        record: Record = {"stages": stages, "kinds_ms": {"forward": forward, "step": step}}
        if device.type == "cuda":
            profile = trace(entrant.stages(), device)
            record |= {"launches": profile.launches, "waits": profile.waits}
            ((record["host_wait_ms"],),) = self.world.largest([[profile.wait_ms]])
        return record

    def _kinds(self, stages: Stages, rank: int) -> dict[str, float]:
        """Return the milliseconds of each kind of work on a rank, under the profiler."""
        kinds = break_down(stages, self.world.device, _PROFILED).kinds
        values = self.world.gather([kinds.get(name, 0.0) for name in _KINDS])[rank]
        return {name: round(value, 5) for name, value in zip(_KINDS, values) if value}
