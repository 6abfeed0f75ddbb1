"""A run directory as a user has it: daemons under honcho with the real built-in model, everything through `specl-ctl`."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fakes import ROOT
from tests.harness.waiting import wait_until

MODELS = Path(os.environ.get("SPECL_MODELS") or ROOT / "var" / "models")
BIN = Path(sys.executable).parent

SETTINGS = """
speculative: {temperature: 0.0, max_tokens: 48, ngram: false}
training:
  enabled: false
  on_battery: true
  lora: {rank: 16, alpha: 32}
  learning_rate: 8.0e-4
  batch_size: 3
  replay_ratio: 0.34
  num_epochs: 6
  max_minutes: 1.0
  heldout_share: 0.4
  min_heldout_generations: 4
  regression_prompts: 0 # not what is tested here, and it takes a minute
  replay_buffer_size: 96 # all 442 texts take minutes on a slow machine
  threads: 1
  idle_seconds: 0.1
serving: {client_timeout_s: 3}
"""


@dataclass(slots=False)
class CliInstance:
    """A run directory that tests work on through `specl-ctl` and honcho only."""

    var: Path
    environment: dict

    def run(self, *arguments, timeout=180, input=None):
        """specl-ctl with these arguments."""
        command = [str(BIN / "specl-ctl"), *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, input=input
        )

    def popen(self, *arguments, **more):
        """specl-ctl with these arguments, left running."""
        return subprocess.Popen(
            [str(BIN / "specl-ctl"), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    def status(self):
        """`specl-ctl status --json`."""
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, prompt, *more):
        """`specl-ctl ask --json`."""
        done = self.run("ask", "--json", *more, "--", prompt)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self):
        """`honcho start` in the repository, ready to answer."""
        log = open(self.var / "honcho.out", "ab")
        process = subprocess.Popen(
            [str(BIN / "honcho"), "start"],
            cwd=ROOT,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        ready = ("ready", "busy")

        def up():
            assert process.poll() is None, (self.var / "honcho.out").read_text()[-3000:]
            found = self.status()
            return all(found[role]["state"] in ready for role in ("inference", "collector", "trainer"))

        wait_until(up, 120, "all three daemons ready")
        return process


def make_cli_instance(settings=SETTINGS):
    """A fresh run directory with a short path (socket paths are limited)."""
    var = Path(tempfile.mkdtemp(prefix="e2e-"))
    (var / "settings.yaml").write_text(settings)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECL_")}
    environment |= {"SPECL_VAR": str(var), "SPECL_MODELS": str(MODELS), "SPECL_CONFIG": str(var / "settings.yaml")}
    environment |= {"PYTHONUNBUFFERED": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    return CliInstance(var, environment)


def stop(process, number=signal.SIGINT):
    """Ctrl-C on honcho; seconds until it was gone."""
    start = time.monotonic()
    os.kill(process.pid, number)
    process.wait(timeout=15)
    return time.monotonic() - start
