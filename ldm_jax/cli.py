"""What the entry points share: one-sentence errors and the compile cache."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, logging

BAD_INPUT = 2  # exit status of every error that the user can mend


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns an error about the user's input into one sentence and exit status 2; for what runs before any compile."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        if os.environ.get("LDM_JAX_TRACEBACK"):
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        fail(text)


def run(main: Callable[[list[str]], Any]) -> None:
    """absl's app.run, with plain errors for flags and config overrides."""

    def parse(argv):
        logging.set_verbosity(logging.WARNING)  # --verbosity=0 shows what the libraries tell
        with plain_errors():
            return app.parse_flags_with_usage(argv)

    app.run(main, flags_parser=parse)


def compile_cache() -> None:
    """Keeps compiled programs between processes: in $JAX_COMPILATION_CACHE_DIR, else in ~/.cache/ldm_jax."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/ldm_jax").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def fail(message: str) -> None:
    """Ends with one sentence and the exit status of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(BAD_INPUT)
