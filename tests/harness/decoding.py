"""The decode thread without a thread: a test takes its turns, and sees what it sends."""

import time

from specl.daemons.inference.decode_thread import DecodeThread
from specl.daemons.inference.recorder import Recorder
from specl.shared.messaging.messages import Ask, Done
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.redaction import Redactor
from specl.shared.sampling_params import SamplingParams
from tests.harness.waiting import wait_until

CLIENT = b"peer"


def request(id, prompt="", messages=(), max_tokens=4, sampling=None, **more):
    """A request of the client `me`."""
    sampling = SamplingParams(**sampling or {})
    return Ask(request_id=id, messages=list(messages), prompt=prompt, max_tokens=max_tokens, sampling=sampling,
               mode="detailed", client_id="me", **more)  # fmt: skip


class Decoding:
    """A decode thread with fake models and a running recorder."""

    def __init__(self, root, settings):
        self.sent = []
        self.paths = Paths(root, root / "models")
        for folder in (root, self.paths.run, self.paths.adapters):
            folder.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(self.paths.outbox("inference"), 1 << 20)
        self.recorder = Recorder(self.outbox, HiddenSpool(self.paths.hidden, 0), Redactor(settings.records), self.emit)
        self.thread = DecodeThread(self.paths, settings, self.recorder, self.emit, lambda: None)
        self.scheduler, self.swap = self.thread.load()
        self.engine = self.thread.engine
        self.recorder.start()

    def emit(self, peer, message):
        if peer is not None:
            self.sent.append(message)

    def ask(self, id, prompt="", **more):
        """Queue a request; its job."""
        self.scheduler.add(CLIENT, request(id, prompt, **more), time.monotonic())
        return self.scheduler.waiting[-1]

    def start(self, id, prompt="", **more):
        """Queue a request and start it without a round; the running job."""
        self.ask(id, prompt, **more)
        self.scheduler.start_waiting()
        return self.scheduler.running[-1]

    def turn(self, count=1):
        for _ in range(count):
            self.thread.turn()

    def serve(self, id, prompt="", **more):
        """Answer a request completely; its running job."""
        running = self.start(id, prompt, **more)
        while self.thread.busy:
            self.turn()
        return running

    def wait_for_done(self, id):
        """The answer's last message, which the recorder sends."""
        done = lambda: [message for message in self.sent if isinstance(message, Done) and message.request_id == id]  # noqa: E731
        return wait_until(done, what=f"{id} is answered")[0]

    def outcomes(self):
        """(kind, request, code) of everything sent."""
        return [(type(message).__name__, message.request_id, getattr(message, "code", "")) for message in self.sent]
