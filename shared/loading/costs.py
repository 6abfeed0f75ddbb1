"""Measured costs as JSON files, one for each pair of models, so that calibration runs once.

Knows where costs lie and what tells one measurement from another (models, precision, custom
drafter, machine, library versions). Measures nothing itself: engine/calibration.py does. A file
that cannot be read is measured again.
"""

import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from specl.shared.engine.calibration import WIDTHS, calibrate
from specl.shared.engine.core import EngineCore
from specl.shared.engine.costs import Costs
from specl.shared.engine.custom_drafter import DrafterFactory
from specl.shared.runtime.atomic_files import write_file


def load_or_calibrate(engine: EngineCore, folder: Path) -> Costs:
    """Give `engine` its costs, read from `folder` or measured (seconds) and written there."""
    costs = load_costs(engine, folder)
    if costs is None:
        result = calibrate(engine)
        costs = result.costs
        if result.complete:
            write_costs(_file(engine, folder), costs)
    engine.costs = costs
    return costs


def load_costs(engine: EngineCore, folder: Path) -> Costs | None:
    """The costs that were measured here before, or None. Neither measures nor changes `engine`."""
    return read_costs(_file(engine, folder), engine.max_draft_tokens, engine.has_drafter)


def read_costs(path: Path, most: int, has_drafter: bool) -> Costs | None:
    """Costs of a file; None unless they reach `most` tokens and cover a draft if there is one."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        document = json.loads(path.read_text())
        verify, draft = ({int(k): float(v) for k, v in document[name].items()} for name in ("verify", "draft"))
        if max(verify) >= min(most + 1, WIDTHS[-1]) and bool(draft) == has_drafter:
            return Costs(verify, draft)
    return None


def write_costs(path: Path, costs: Costs) -> None:
    """Write costs by rename. A disk that fails is no error: they are measured again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"verify": costs.verify, "draft": costs.draft}, indent=1), sync=False)


def costs_key(engine: EngineCore) -> str:
    """A name for the engine's models, the machine and the library versions together."""
    factory = engine.drafter_factory
    parts = [
        engine.target.fingerprint,
        engine.draft_fingerprint,
        engine.options.precision,
        engine.target.kernels.description,
    ]
    parts += drafter_identity(factory) if factory is not None else []
    parts += [platform.machine(), platform.node(), str(os.cpu_count()), version("mlx"), version("mlx-lm")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _file(engine: EngineCore, folder: Path) -> Path:
    return folder / f"{costs_key(engine)}.json"


def drafter_identity(factory: DrafterFactory) -> list[str]:
    """Names a custom drafter's costs: module, name and the hash of its source file."""
    module = getattr(factory, "__module__", "") or ""
    names = [module, getattr(factory, "__qualname__", type(factory).__qualname__)]
    file = getattr(sys.modules.get(module), "__file__", None)
    with suppress(OSError):
        names += [hashlib.sha256(Path(file).read_bytes()).hexdigest()] if file else []
    return names
