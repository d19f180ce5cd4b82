"""The flag by which an entry point takes a config file."""

from absl import flags
from ml_collections import config_flags


def config_flag(name: str, text: str, own: flags.FlagValues) -> flags.FlagHolder:
    """--NAME FILE.py, whose entries --NAME.ENTRY=VALUE changes; a typo is an error."""
    return config_flags.DEFINE_config_file(name, None, text, flag_values=own, lock_config=True)
