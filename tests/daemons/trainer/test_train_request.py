"""What a user's request to train leads to, by the trainer's state."""

from dataclasses import replace

import pytest

from specl.daemons.trainer.train_request import TrainAction, TrainState, decide_train

READY = TrainState(True, None, False, False, "training, step 3", False, "", 5, 3)
RUNNING = replace(READY, is_running=True, has_begun=True)


@pytest.mark.parametrize(
    ("state", "now", "action", "part"),
    [
        (READY, False, TrainAction.QUEUE_RUN, "as soon as inference is idle"),
        (replace(READY, pending_failures=2), False, TrainAction.REFUSE, "2 of 3 failures are there"),
        (replace(READY, pending_failures=2), True, TrainAction.QUEUE_RUN, "as soon as inference is idle"),
        (replace(READY, keeps_texts=False), True, TrainAction.REFUSE, "no text is kept"),
        (replace(READY, record_problem="no room"), True, TrainAction.REFUSE, "no room"),
        (replace(READY, is_queued=True), True, TrainAction.REFUSE, "waits already"),
        (replace(READY, is_running=True), True, TrainAction.REFUSE, "waits already"),
        (RUNNING, True, TrainAction.REFUSE, "under way (training, step 3)"),
        (replace(RUNNING, reason_to_wait="on battery"), False, TrainAction.REFUSE, "under way"),
        (replace(RUNNING, reason_to_wait="on battery"), True, TrainAction.OVERRIDE_RUNNING, "on battery; the run"),
        (replace(READY, reason_to_wait="on battery"), False, TrainAction.QUEUE_RUN, "--now trains all the same"),
        (replace(READY, reason_to_wait="on battery"), True, TrainAction.QUEUE_RUN, "on battery, trains all the same"),
    ],
)
def test_decision_follows_from_the_state(state, now, action, part):
    decision = decide_train(state, now)
    assert decision.action == action and part in decision.text
