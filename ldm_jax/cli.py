"""What the entry points share: their own flags, one-sentence errors and the compile cache."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

BAD_INPUT = 2  # exit status of every error that the user can mend


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns an error about the user's input into one sentence and exit status 2; for what runs before any compile.

    With LDM_JAX_TRACEBACK in the environment the traceback is shown instead.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, OSError, flags.Error) as error:
        if os.environ.get("LDM_JAX_TRACEBACK"):
            raise
        text = str(error)
        if isinstance(error, KeyError | AttributeError) and error.args:
            text = str(error.args[0])
            while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
                text = text[
                    1:-1
                ]  # a KeyError's text is quoted, and ml_collections quotes it once more
            text = text.replace("\\'", "'").replace("\\n", "\n").replace("\n", ". ")
        fail(text)


def parse(own: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Sets the flags of an entry point and returns the arguments that are not among them.

    An entry point keeps its flags to itself, so that several can be imported together.
    """
    with plain_errors():
        _check_config_file(own, argv)
        own.set_gnu_getopt(True)  # flags may follow other arguments
        return own(list(argv), known_only=True)


def _check_config_file(own: flags.FlagValues, argv: Sequence[str]) -> None:
    """ml_collections tells of a missing file late, and in four lines."""
    for given, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = given.lstrip("-").partition("=")
        if given.startswith("-") and name == "config" and name in own:
            path = (value if equals else following).split(":")[0]
            if not Path(path).is_file():
                raise FileNotFoundError(f"there is no config file {path!r}; see the folder configs")


def required(*holders: flags.FlagHolder) -> None:
    """Raises ValueError unless these flags were given."""
    for holder in holders:
        if holder.value is None:
            raise ValueError(f"--{holder.name} is missing; --help shows all flags")


def texts(given: Sequence[str]) -> list[str]:
    """Prompts as they are, and those in files, one a line.

    Raises:
      FileNotFoundError: a name that ends in .txt and is no file.
      ValueError: no prompt in a file.
    """
    found = []
    for prompt in given:
        short = len(prompt) < 255  # what is longer is no file name
        if not (short and Path(prompt).is_file()):
            if short and prompt.endswith(".txt"):
                raise FileNotFoundError(f"there is no file of prompts {prompt!r}")
            found.append(prompt)
            continue
        lines = [line.strip() for line in Path(prompt).read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"the file {prompt!r} holds no prompt; write one a line")
        found += lines
    return found


def whole_numbers(holder: flags.FlagHolder) -> list[int] | None:
    """The whole numbers of a flag that lists them, or None; ValueError if they are none."""
    try:
        return None if holder.value is None else [int(text) for text in holder.value]
    except ValueError as error:
        raise ValueError(
            f"--{holder.name}={','.join(holder.value)} must be whole numbers, such as 8,8,0,16"
        ) from error


def weights(holder: flags.FlagHolder) -> dict[str, float]:
    """What a flag says as WORD=FACTOR, once or several times; ValueError if it is something else."""
    found = {}
    for text in holder.value:
        word, _, factor = text.rpartition("=")
        try:
            found[word] = float(factor)
        except ValueError:
            word = ""
        if not word:
            raise ValueError(f"--{holder.name}={text} must be a word and a number, such as red=2")
    return found


def nothing_more(argv: Sequence[str], hint: str) -> None:
    """Raises ValueError if arguments are left that are no flags."""
    if len(argv) > 1:
        raise ValueError(f"unknown arguments {list(argv[1:])}; {hint}")


def run(main: Callable[[list[str]], Any], own: flags.FlagValues | None = None) -> None:
    """absl's app.run, with plain errors for flags and config overrides."""

    def parse_all(argv):
        if own is not None:
            if {"--help", "-help", "--helpshort", "-h"} & set(argv):
                print(f"{sys.modules['__main__'].__doc__}{own.get_help()}")
                sys.exit(0)
            flags.FLAGS.append_flag_values(own)  # for "did you mean"
            argv = parse(own, argv)
        with plain_errors():
            return flags.FLAGS(list(argv))

    def quiet_main(argv):
        if not flags.FLAGS["verbosity"].present:  # --verbosity=0 shows what the libraries tell
            logging.set_verbosity(logging.WARNING)
        return main(argv)

    app.run(quiet_main, flags_parser=parse_all)


def compile_cache() -> None:
    """Keeps compiled programs between processes: in $JAX_COMPILATION_CACHE_DIR, else in ~/.cache/ldm_jax."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/ldm_jax").expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def fail(message: str) -> None:
    """Ends with one sentence and the exit status of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(BAD_INPUT)
