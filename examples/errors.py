"""What can be wrong with the simulator rather than with the program."""


class SimulatorError(RuntimeError):
    """The simulator cannot render, or the scene cannot be demonstrated; the message is one line for the user."""


class SceneError(SimulatorError):
    """A task's scene cannot be built, for want of a mesh or a texture; those of other tasks may be."""
