"""The fixtures of the host tier, for the nodes."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("host_fixtures", Path(__file__).parents[1] / "host" / "conftest.py")
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)

threads, tiny = fixtures.threads, fixtures.tiny
