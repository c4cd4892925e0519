"""Every error sparsec raises on purpose: one paragraph that says what was found, what was expected, what to do."""


class SparsecError(Exception):
    """The work failed or a check did not hold. The command line exits with `exit_code`."""

    exit_code = 1


class UsageError(SparsecError):
    """The request itself is wrong: an unknown name, an option of the wrong type, a path that is not there."""

    exit_code = 2


class PatternError(UsageError):
    """A sparsity pattern that cannot be read, or does not fit the weight it is asked for."""


class RecipeError(UsageError):
    """A recipe or pass text that cannot be read, or asks for passes in an order that cannot work."""


class TraceError(SparsecError):
    """The model could not be turned into a sparsec graph."""


class GraphError(SparsecError):
    """A graph is not well formed, or uses an operator outside the allow-list."""


class PassError(SparsecError):
    """A pass failed, or did not keep to its contract: a fault of the pass, not of the program it was given."""


class ArtifactError(SparsecError):
    """A program or artifact folder that is damaged, foreign, or cannot be written."""


class VerificationError(SparsecError):
    """A proof that sparsec makes of its own output did not hold."""


class TrainingError(SparsecError):
    """Training went wrong on the way: a loss that is no number."""
