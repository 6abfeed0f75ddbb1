"""Words that records and messages carry as codes. The sentence for people always stands in another field beside the code.

The values are on the wire and in the store: a value is never renamed or given another meaning, only added.
"""

from enum import StrEnum


class DaemonState(StrEnum):
    """A daemon's state. `status` says `stopped` of a daemon that does not run."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    STOPPED = "stopped"
    FAILED = "failed"


class FailureCode(StrEnum):
    """Why a request has no answer."""

    BUSY = "busy"  # too many requests wait; asking again later may help
    REJECTED = "rejected"  # the request itself cannot be served
    CONTEXT_LENGTH = "context_length_exceeded"  # the prompt is too long
    CANCELLED = "cancelled"  # by its client, or because the client was silent
    DEADLINE = "deadline"  # its deadline passed before the first token
    STOPPED = "stopped"  # the daemon was told to stop
    LOST = "lost"  # the daemon does not know the request: it was restarted meanwhile
    INTERNAL = "internal"


class ActivationEvent(StrEnum):
    """What happened to the active adapter."""

    ACTIVATED = "activated"
    UNLOADED = "unloaded"  # drafting goes on without an adapter
    REJECTED = "rejected"  # verification refused it; the active adapter stays
    ROLLED_BACK = "rolled_back"


class ActivationReason(StrEnum):
    """Why it happened."""

    ANNOUNCED = "announced"  # CURRENT names it: the judge has promoted it
    RESTART = "restart"  # the daemon was restarted, and the same adapter as before is active
    BY_HAND = "by_hand"
    BY_HAND_AGAIN = "by_hand_again"  # it had been rolled back, and a user wants it all the same
    ROLLED_BACK_BY_HAND = "rolled_back_by_hand"  # a user went back to the previous adapter
    ROLLBACK = "rollback"  # it takes the place of one that was rolled back
    REINSTATED = "reinstated"  # a re-evaluation found its rollback wrong
    VERIFICATION = "verification"  # event `rejected`: its files cannot be used
    LIVE_ACCEPTANCE = "live_acceptance"  # event `rolled_back`: hardly any of its drafts were accepted on live traffic
    REEVALUATION = "reevaluation"  # event `rolled_back`: its predecessor did better on the same answers
    OTHER = "other"  # a sentence of an earlier version that no code stands for


class CollapseCheckState(StrEnum):
    """What the collapse check or the trainer has decided about a newly activated adapter."""

    WATCHING = "watching"  # the check is under way
    PASSED = "kept"  # it passed the collapse check
    ROLLED_BACK = "rolled_back"
    REINSTATED = "reinstated"


class RunTrigger(StrEnum):
    """What set off a run of the trainer."""

    FAILURES = "failures"  # enough of them were pending
    BY_HAND = "by_hand"
    BY_HAND_NOW = "by_hand_now"  # without waiting for idleness or for the machine's leave
    IMPORT = "import"  # an adapter made elsewhere, evaluated by the judge; trains nothing
    REEVALUATION = "reevaluation"  # of a promoted adapter against its predecessor; trains nothing
    OTHER = "other"  # a sentence of an earlier version that no code stands for


class RunVerdict(StrEnum):
    """How a run of the trainer ended."""

    PROMOTED = "promoted"
    REJECTED = "rejected"
    NO_VERDICT = "no_verdict"  # too little to judge by
    NO_DATA = "no_data"  # too little to train on
    FAILED = "failed"
    CANCELLED = "cancelled"
    REINSTATED = "reinstated"  # of a re-evaluation: the rollback was wrong
    CONFIRMED = "confirmed"  # of a re-evaluation: the rollback stays
    KEPT = "kept"  # of a re-evaluation: the active adapter stays
    ROLLED_BACK = "rolled_back"  # of a re-evaluation: its predecessor is better
