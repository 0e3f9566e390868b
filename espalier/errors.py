"""The errors that end a command with one line. Imports nothing, so that every module may import it."""


class UserError(ValueError):
    """An error in what the user gave. The message is one line: what was given; what is accepted; what to try."""


class MachineError(Exception):
    """What neither user nor code did wrong (a full disk, a NaN or infinite loss), in one line; exit code 1."""
