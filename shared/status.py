"""One typed view of the whole system: every daemon, the store's figures, and what is wrong. `specl-ctl status` and the page show it.

Useful with every daemon down: the store, CURRENT and the locks are read from disk then. Imports no MLX, and sqlalchemy only
where the collector does not answer.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specl.shared.errors import START_HINT, StoreError
from specl.shared.messaging.client import Client, DaemonStatuses
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.daemon_status import (
    AdapterStatus,
    CollapseCheckStatus,
    DaemonStatus,
    LastRun,
    ModelsStatus,
    QueueStatus,
    StoreSummary,
    TrainerStatus,
)
from specl.shared.paths import DAEMONS, ROLES, Paths
from specl.shared.runtime.locks import holder_of, is_locked

if TYPE_CHECKING:
    from specl.shared.settings.schema import Settings


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One daemon's process; `uptime_s` is None where it does not answer."""

    state: DaemonState
    pid: int | None
    uptime_s: float | None


@dataclass(frozen=True, slots=True)
class GatewayView:
    """The gateway's process, and where it listens. `problem` says why it does not."""

    state: DaemonState
    pid: int | None
    uptime_s: float | None
    address: str | None
    enabled: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class OutboxView:
    """Records on their way to the store; `pending` is None where no producer answers."""

    pending: int | None
    by_producer: dict[str, int]
    refused: dict[str, int]


@dataclass(frozen=True, slots=True)
class AcceptanceView:
    """Accepted / drafted by the model drafter: of the last 50 generations, of all, and by adapter."""

    rolling: float | None
    lifetime: float | None
    by_adapter: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class FailuresView:
    """Stored failures, those that no run has used, and how many start a run."""

    total: int
    pending: int
    trigger: int


@dataclass(frozen=True, slots=True)
class StoreView:
    """The store's file and how much it holds."""

    path: str
    generations: int
    disagreements: int


@dataclass(frozen=True, slots=True)
class AdapterView:
    """The active adapter, the one before it, and its collapse check."""

    active: str
    previous: str
    form: str
    watch: CollapseCheckStatus | None


@dataclass(frozen=True, slots=True)
class TrainingView:
    """What the trainer is doing, as in TrainingProgress, and how its last run ended."""

    state: str
    waits: str
    step: int
    total: int
    loss: float | None
    last_verdict: LastRun | None


@dataclass(frozen=True, slots=True)
class SpeedView:
    """Tokens a second, over the last 50 generations."""

    rolling: float | None


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """Everything that `status` shows. Its fields are the documented keys of `specl-ctl status --json`."""

    inference: ProcessView
    collector: ProcessView
    trainer: ProcessView
    queue: QueueStatus
    outbox: OutboxView
    acceptance: AcceptanceView
    failures: FailuresView
    store: StoreView
    adapter: AdapterView
    training: TrainingView
    tokens_per_second: SpeedView
    models: ModelsStatus
    problems: list[str]
    gateway: GatewayView

    def process(self, role: str) -> ProcessView:
        """The process of one role."""
        return {"inference": self.inference, "collector": self.collector, "trainer": self.trainer}[role]


def system_status(client: Client) -> SystemStatus:
    """Ask every daemon, and read from disk what none of them says."""
    paths, settings = client.paths, client.settings
    daemons = client.status()
    inference, trainer = daemons.inference, daemons.trainer
    problems: list[str] = []
    summary = _store_summary(daemons, paths, problems)
    gateway = _gateway(settings, paths)
    if gateway.problem:
        problems.append(f"gateway: {gateway.problem}")
    adapter = inference.adapter if inference else AdapterStatus(active=_current(paths))
    processes = {role: _process(daemons.get(role), role, paths) for role in ROLES}
    states = {role: process.state for role, process in processes.items()}
    # of daemons that answer from another machine only the bus is seen
    if settings.gateway.enabled and not _elsewhere(daemons, paths):
        states["gateway"] = gateway.state
    return SystemStatus(
        inference=processes["inference"],
        collector=processes["collector"],
        trainer=processes["trainer"],
        queue=inference.queue if inference else QueueStatus(),
        outbox=_outbox(daemons),
        acceptance=AcceptanceView(summary.rolling_acceptance, summary.lifetime_acceptance, summary.by_adapter),
        failures=FailuresView(summary.failures, summary.pending_failures, settings.training.min_failure_cases),
        store=StoreView(str(paths.store), summary.generations, summary.disagreements),
        adapter=AdapterView(adapter.active, adapter.previous, adapter.form, adapter.watch),
        training=_training(trainer, summary.last_verdict),
        tokens_per_second=SpeedView(summary.rolling_tokens_per_second),
        models=inference.models if inference else _models(settings),
        problems=problems + _unfinished_purge(paths) + _problems(daemons, states, summary),
        gateway=gateway,
    )


def state_and_context(client: Client, timeout_s: float = 1.0) -> tuple[DaemonState, int | None]:
    """The state of inference and the context length that it serves, without a look at anything else."""
    inference = client.status(timeout_s, ("inference",)).inference
    state = _process(inference, "inference", client.paths).state
    return state, inference.models.context_length if inference else None


def gateway_file(paths: Paths) -> Path:
    """Where the gateway says where it listens; its lock says whether that is still true."""
    return paths.run / "gateway.json"


def _process(status: DaemonStatus | None, role: str, paths: Paths) -> ProcessView:
    if status is not None:
        return ProcessView(status.state, holder_of(paths.run, role), status.uptime_s)
    if is_locked(paths.run, role):
        return ProcessView(DaemonState.STARTING, holder_of(paths.run, role), None)
    return ProcessView(DaemonState.STOPPED, None, None)


def _outbox(daemons: DaemonStatuses) -> OutboxView:
    producers = {"inference": daemons.inference, "trainer": daemons.trainer}
    outboxes = {name: status.outbox for name, status in producers.items() if status is not None}
    pending = {name: outbox.pending for name, outbox in outboxes.items()}
    refused = {name: outbox.refused for name, outbox in outboxes.items()}
    return OutboxView(sum(pending.values()) if pending else None, pending, refused)


def _training(trainer: TrainerStatus | None, last: LastRun | None) -> TrainingView:
    if trainer is None:
        return TrainingView("stopped", "", 0, 0, None, last)
    now = trainer.training
    return TrainingView(now.state, now.waits, now.step, now.total, now.loss, last)


def _models(settings: "Settings") -> ModelsStatus:
    return ModelsStatus(settings.models.target.name, settings.models.draft.name, loaded=False)


def _store_summary(daemons: DaemonStatuses, paths: Paths, problems: list[str]) -> StoreSummary:
    """The collector's figures, or, where it is down, figures read from the store (only then is sqlalchemy imported)."""
    if daemons.collector is not None and daemons.collector.summary is not None:
        return daemons.collector.summary
    if not paths.store.exists():
        return StoreSummary()
    from specl.shared.store import Store

    try:
        store = Store(paths.store, read_only=True)
        try:
            return store.summary()
        finally:
            store.close()
    except StoreError as error:
        problems.append(str(error))
        return StoreSummary()


def _problems(daemons: DaemonStatuses, states: dict[str, DaemonState], summary: StoreSummary) -> list[str]:
    problems = [f"{role} does not run; {START_HINT}" for role in DAEMONS if states.get(role) == DaemonState.STOPPED]
    inference, collector, trainer = daemons.inference, daemons.collector, daemons.trainer
    if inference is not None:
        if not inference.blas.fast:
            problems.append(f"slow BLAS in use ({inference.blas.bound}); `specl-ctl doctor` says what to do")
        if inference.outbox.trouble:
            problems.append(f"records refused ({inference.outbox.refused}): {inference.outbox.trouble}")
    if trainer is not None and trainer.outbox.trouble:
        problems.append(f"the trainer's records wait ({trainer.outbox.waiting}): {trainer.outbox.trouble}")
    if collector is not None and collector.trouble:
        problems.append(f"store: {collector.trouble}")
    if trainer is not None and trainer.trouble:
        problems.append(f"training: {trainer.trouble}")
    if inference is not None:
        problems += [f"adapter {id} refused: {reason}" for id, reason in inference.adapter.rejected.items()]
    if summary.quarantined:
        problems.append(f"{summary.quarantined} records in quarantine (table `quarantine` of the store)")
    return problems


def _unfinished_purge(paths: Paths) -> list[str]:
    """A purge that was stopped half-way has left text behind that its user wants gone."""
    if not paths.pending_purge.exists() or is_locked(paths.run, "purge"):
        return []
    return ["a purge was stopped half-way; `specl-ctl store purge --resume` finishes it"]


def _gateway(settings: "Settings", paths: Paths) -> GatewayView:
    enabled = settings.gateway.enabled
    pid = holder_of(paths.run, "gateway") if enabled and is_locked(paths.run, "gateway") else None
    if pid is None:  # switched off, its process only waits
        return GatewayView(DaemonState.STOPPED, None, None, None, enabled)
    try:
        state: dict[str, Any] = json.loads(gateway_file(paths).read_text())
    except (OSError, ValueError):
        state = {}
    if state.get("pid") != pid:  # written by an earlier process
        return GatewayView(DaemonState.STARTING, pid, None, None, enabled)
    uptime_s = round(time.time() - state["started"], 1)
    return GatewayView(DaemonState(state["state"]), pid, uptime_s, state["address"], enabled, state["problem"])


def _elsewhere(daemons: DaemonStatuses, paths: Paths) -> bool:
    """Whether daemons answer that do not run on this run directory. Reads no lock that is not there: reading would make one."""
    answering = daemons.answering()
    local = any((paths.run / f"{role}.lock").exists() and is_locked(paths.run, role) for role in answering)
    return bool(answering) and not local


def _current(paths: Paths) -> str:
    """The adapter that inference would draft with if it ran."""
    from specl.shared.adapters.registry import Adapters  # imports a validator, which is slow

    return Adapters(paths.adapters).current()
