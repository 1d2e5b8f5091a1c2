"""How the commands on the login node take their arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn

from job.common.errors import InputError


class Parser(argparse.ArgumentParser):
    """Whose errors are those of wrong input, with the usage and where to read more."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[0]  # a subcommand's help is in the command's
        raise InputError(f"{message}\n{self.format_usage()}see {command} --help")
