"""What `status` shows of the collapse check."""

from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.daemons.inference.collapse import CollapseCheck
from specl.shared.messaging.codes import CollapseCheckState


def test_status_is_shown_though_the_check_ends_meanwhile():
    class Ending(AdapterMonitor):
        """Its check is gone when it is read a second time, as when the MLX thread ends it."""

        reads = 0

        @property
        def check(self):
            self.reads += 1
            return CollapseCheck("000001") if self.reads == 1 else None

        @check.setter
        def check(self, value):
            pass

    assert Ending().status().state == CollapseCheckState.WATCHING
