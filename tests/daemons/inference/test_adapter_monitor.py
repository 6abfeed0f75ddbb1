"""What `status` shows of the watch."""

from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.shared.learning.live_check import Depths, Watch


def test_status_is_shown_though_the_watch_ends_meanwhile():
    class Ending(AdapterMonitor):
        """Its watch is gone when it is read a second time, as when the MLX thread ends it."""

        reads = 0

        @property
        def watch(self):
            self.reads += 1
            return Watch("000001", "", Depths([4] * 16, [2] * 16)) if self.reads == 1 else None

        @watch.setter
        def watch(self, value):
            pass

    assert Ending().status()["state"] == "watching"
