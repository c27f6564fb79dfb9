"""What can be wrong with the simulator rather than with the program."""


class SimulatorError(RuntimeError):
    """The simulator cannot render, or the scene cannot be demonstrated; the message is one line for the user."""
