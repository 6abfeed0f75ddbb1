"""Draft states scored on texts, as drafting with them would compute. Knows engines and examples, no
store and no verdict's rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected, SpecLoraError
from specl.shared.learning.examples import Example
from specl.shared.learning.judge import Agreement
from specl.shared.learning.learner import Learner, agreement
from specl.shared.runtime import log

DEPTHS = 3  # of a head's own steps that are scored
UNSCORED = Agreement(np.zeros(0), np.zeros(0))
_log = log.get("training")


@dataclass(frozen=True, slots=True)
class Scores:
    """The agreement of one draft state on held-out generations and on the regression slice."""

    held_out: Agreement
    general: Agreement = UNSCORED


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores on one set of texts. `pause` is called between pieces: it waits while inference is
    busy, or raises to stop.
    """

    engine: EngineCore
    held_out: Sequence[Example]
    general: Sequence[Example]
    pause: Callable[[], object]

    def with_adapter(self, adapter: LoadedAdapter | None) -> Scores:
        """Scores of the pristine draft with `adapter`, or without any."""
        self.engine.use_adapter(adapter)
        learner = learner_of(self.engine)
        return Scores(self.on_held_out(learner), self.on_general(learner))

    def pristine(self) -> float:
        """Agreement on the regression slice without any adapter."""
        self.engine.use_adapter(None)
        return self.on_general(learner_of(self.engine)).value

    def on_held_out(self, learner: Learner) -> Agreement:
        """Agreement of the learner's draft on held-out generations, at every depth."""
        return agreement(learner, self.held_out, DEPTHS, pause=self.pause)

    def on_general(self, learner: Learner) -> Agreement:
        """Agreement on the regression slice at depth 1, the only depth that is used."""
        return agreement(learner, self.general, pause=self.pause)


def learner_of(engine: EngineCore) -> Learner:
    """A learner for the engine's draft. Raises SpecLoraError where there
    is none.
    """
    if engine.draft is None:
        raise SpecLoraError("there is no draft model to train", "set models.draft.name")
    return Learner(engine.draft)


def load_active_adapter(adapters: Adapters, engine: EngineCore) -> LoadedAdapter | None:
    """The adapter that CURRENT names; None where there is none, or none that fits this draft."""
    current = adapters.current()
    if not current:
        return None
    try:
        return load_adapter(adapters, adapters.folder / current, engine)[0]
    except AdapterRejected as error:
        _log.warning("adapter.unusable", adapter=current, reason=str(error))
        return None
