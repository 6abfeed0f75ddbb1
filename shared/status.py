"""What `specl-ctl status` and the page show: every daemon's own view, the store's figures, and what is wrong. No MLX.

Useful with every daemon down: the store, CURRENT and the locks are read from disk then.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specl.shared.messaging.client import START, Client
from specl.shared.paths import DAEMONS, ROLES, Paths
from specl.shared.runtime.locks import holder_of, is_locked

if TYPE_CHECKING:
    from specl.shared.settings.schema import Settings


def _daemon(body: dict[str, Any] | None, role: str, paths: Paths) -> dict[str, Any]:
    if body is not None:
        return {"state": body["state"], "pid": body["pid"], "uptime_s": body["uptime_s"]}
    held = is_locked(paths.run, role)
    return {
        "state": "starting" if held else "stopped",
        "pid": holder_of(paths.run, role) if held else None,
        "uptime_s": None,
    }


def state_of(client: Client, role: str, timeout_s: float = 1.0) -> str:
    """One daemon's state, without a look at anything else."""
    return _daemon(client.status(timeout_s, (role,)).get(role), role, client.paths)["state"]


def _store_summary(answers: dict[str, Any], paths: Paths, problems: list[str]) -> dict[str, Any]:
    """The collector's view, or our own where it is down (only then is sqlalchemy imported)."""
    if answers.get("collector", {}).get("summary"):
        return answers["collector"]["summary"]
    if not paths.store.exists():
        return {}
    from dataclasses import asdict

    from specl.shared.errors import StoreError
    from specl.shared.store import Store

    try:
        store = Store(paths.store, read_only=True)
        try:
            return asdict(store.summary())
        finally:
            store.close()
    except StoreError as error:
        problems.append(str(error))
        return {}


def _problems(answers: dict[str, Any], daemons: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    found = [f"{role} does not run; {START}" for role in DAEMONS if daemons[role]["state"] == "stopped"]
    inference, collector, trainer = (answers.get(role, {}) for role in ROLES)
    if inference.get("blas", {}).get("fast") is False:
        found.append(f"slow BLAS in use ({inference['blas']['bound']}); `specl-ctl doctor` says what to do")
    if trouble := inference.get("outbox", {}).get("trouble"):
        found.append(f"records refused ({inference['outbox']['refused']}): {trouble}")
    if trouble := trainer.get("outbox", {}).get("trouble"):
        found.append(f"the trainer's records wait ({trainer['outbox']['waiting']}): {trouble}")
    if collector.get("trouble"):
        found.append(f"store: {collector['trouble']}")
    if trainer.get("trouble"):
        found.append(f"training: {trainer['trouble']}")
    for id, reason in inference.get("adapter", {}).get("rejected", {}).items():
        found.append(f"adapter {id} refused: {reason}")
    if summary.get("quarantined"):
        found.append(f"{summary['quarantined']} records in quarantine (table `quarantine` of the store)")
    return found


def _unfinished_purge(paths: Paths) -> list[str]:
    """A purge that was stopped half-way has left text behind that its user wants gone."""
    if not paths.pending_purge.exists() or is_locked(paths.run, "purge"):
        return []
    return ["a purge was stopped half-way; `specl-ctl store purge --resume` finishes it"]


def gateway_file(paths: Paths) -> Path:
    """Where the gateway says where it listens; its lock says whether that is still true."""
    return paths.run / "gateway.json"


def _gateway(settings: "Settings", paths: Paths) -> dict[str, Any]:
    runs = settings.gateway.enabled and is_locked(paths.run, "gateway")  # switched off, its process only waits
    pid = holder_of(paths.run, "gateway") if runs else None
    found = {"state": "stopped", "pid": pid, "uptime_s": None, "address": None, "enabled": settings.gateway.enabled}
    if pid is None:
        return found
    try:
        said = json.loads(gateway_file(paths).read_text())
    except (OSError, ValueError):
        said = {}
    if said.get("pid") != pid:  # an earlier one's words
        return found | {"state": "starting"}
    up = round(time.time() - said["started"], 1)
    return found | {"state": said["state"], "uptime_s": up, "address": said["address"], "problem": said["problem"]}


def _elsewhere(answers: dict[str, Any], paths: Paths) -> bool:
    """Whether daemons answer that do not run on this run directory. Looks at no lock that is not there: that would make one."""
    here = any((paths.run / f"{role}.lock").exists() and is_locked(paths.run, role) for role in answers)
    return bool(answers) and not here


def _current(paths: Paths) -> str:
    """The adapter that inference would draft with if it ran."""
    from specl.shared.adapters.registry import Adapters  # with it comes a validator, and who is up says it anyway

    return Adapters(paths.adapters).current()


def collect(client: Client) -> dict[str, Any]:
    """Everything that `status` shows, under its documented keys."""
    paths, settings = client.paths, client.settings
    answers = client.status()
    problems: list[str] = []
    summary = _store_summary(answers, paths, problems)
    daemons = {role: _daemon(answers.get(role), role, paths) for role in ROLES}
    inference, trainer = answers.get("inference", {}), answers.get("trainer", {})
    adapter = inference.get("adapter") or {"active": _current(paths), "previous": ""}
    gateway = _gateway(settings, paths)
    if gateway.get("problem"):
        problems.append(f"gateway: {gateway['problem']}")
    # of daemons that answer from another machine only the bus is seen
    expected = gateway if settings.gateway.enabled and not _elsewhere(answers, paths) else {"state": "off"}
    pending = {name: answers[name]["outbox"]["pending"] for name in ("inference", "trainer") if name in answers}
    return {
        **daemons,
        "queue": inference.get("queue", {"depth": 0, "in_flight": 0}),
        "outbox": {
            "pending": sum(pending.values()) if pending else None,
            "by_producer": pending,
            "refused": {name: answers[name]["outbox"]["refused"] for name in pending},
        },
        "acceptance": {
            "rolling": summary.get("rolling_acceptance"),
            "lifetime": summary.get("lifetime_acceptance"),
            "by_adapter": summary.get("by_adapter", {}),
        },
        "failures": {
            "total": summary.get("failures", 0),
            "pending": summary.get("pending_failures", 0),
            "trigger": settings.training.min_failure_cases,
        },
        "store": {
            "path": str(paths.store),
            "generations": summary.get("generations", 0),
            "disagreements": summary.get("disagreements", 0),
        },
        "adapter": {name: adapter.get(name, "") for name in ("active", "previous", "form")}
        | {"watch": adapter.get("watch") or {}},
        "training": {
            **(trainer.get("training") or {"state": "stopped", "step": 0, "loss": None}),
            "last_verdict": summary.get("last_verdict"),
        },
        "tokens_per_second": {"rolling": summary.get("rolling_tokens_per_second")},
        "models": inference.get("models", {"target": settings.models.target.name, "draft": settings.models.draft.name}),
        "problems": problems + _unfinished_purge(paths) + _problems(answers, daemons | {"gateway": expected}, summary),
        "gateway": gateway,
    }
