"""What every run of the trainer works with, and the rule that judges trained and imported
adapters alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

from specl.daemons.trainer.data_loader import DataLoader
from specl.daemons.trainer.regression import RegressionSlice
from specl.daemons.trainer.run_report import RunReport
from specl.daemons.trainer.scoring import Scores
from specl.daemons.trainer.training_loop import RunProgress
from specl.shared.adapters.registry import Adapters
from specl.shared.engine.core import EngineCore
from specl.shared.errors import ModelError
from specl.shared.learning.examples import Example
from specl.shared.learning.judge import Lineage, Regression, Verdict, expected_rate, judge, lineage_problems
from specl.shared.loading.costs import load_costs
from specl.shared.messaging.codes import RunTrigger
from specl.shared.paths import Paths
from specl.shared.runtime import log
from specl.shared.settings.schema import Settings

_log = log.get("training")


@dataclass(frozen=True, slots=True)
class RunContext:
    """`pause` is called between pieces of work: it waits while inference is busy, gives the
    seconds, and raises Interrupted to stop.
    """

    engine: EngineCore
    data_loader: DataLoader
    adapters: Adapters
    paths: Paths
    settings: Settings
    progress: RunProgress
    pause: Callable[[], float]

    def report(self, trigger: RunTrigger, cause: str) -> RunReport:
        """An empty report of a run that begins now."""
        return RunReport(trigger, cause, self.settings.training)

    def lineage(self, parent: str) -> Lineage:
        """The lineage of an adapter that starts from `parent` on this draft and target."""
        return Lineage(self.engine.draft_fingerprint, self.engine.target.tokenizer_fingerprint, parent)

    def regression_slice(self) -> list[Example]:
        """The regression slice, made where it is missing; empty for a target that cannot be run in
        batches.
        """
        count = self.settings.training.regression_prompts
        try:
            return RegressionSlice(self.paths.regression, self.engine, count, self.pause).examples()
        except ModelError as error:
            _log.warning("regression.impossible", reason=str(error))
            return []

    def judge(self, before: Scores, after: Scores, pristine: float, parent: str) -> Verdict:
        """The verdict on a candidate that was compared with `parent`, with the tokens a second that
        measured costs expect.
        """
        costs, most = load_costs(self.engine, self.paths.costs), self.settings.speculative.max_draft_tokens
        has_slice = len(before.general.hits) > 0
        return judge(
            before.held_out,
            after.held_out,
            self.settings.training.min_heldout_generations,
            Regression(before.general.value, after.general.value, pristine) if has_slice else None,
            (
                expected_rate(costs, before.held_out.by_depth, most),
                expected_rate(costs, after.held_out.by_depth, most),
            ),
            lineage_problems(self.lineage(parent), self.lineage(self.adapters.current())),
        )
