"""An error on the terminal: its traceback, and nothing of what users wrote."""

import subprocess
import sys

import pytest

CODE = """
import logging
from specl.shared.runtime import log
log.set_up("test", None)
def fail(prompt):
    raise OverflowError("too large")
try:
    fail("a private" + " sentence")
except OverflowError:
    logging.getLogger("uvicorn.error").exception("broken")
    log.get("test").exception("test.failed")
"""


@pytest.mark.process
def test_a_traceback_shows_no_variables():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stderr.count("OverflowError: too large") == 2, done.stderr
    assert "a private sentence" not in done.stderr
