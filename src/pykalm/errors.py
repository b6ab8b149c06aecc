"""The errors that kalm raises on purpose. Each says what was wanted, what was found and what to do.

KalmError
├── UsageError        the command line or a call was used wrongly (exit code 2)
├── ConfigError       a setting has a wrong name or value
├── GraphError        the files of a graph, or a question about a graph, are wrong
├── ModelError        a language model cannot be loaded or used
├── RunError          a run folder is missing, damaged or of another version
├── OutOfMemoryError  memory ran out while a model was loaded or read texts
├── TrainingError     training cannot go on: not a number, out of memory, disk full
├── ProcessError      another process of the launch has ended or cannot be reached
└── FetchError        a download failed or is not what was promised
"""


class KalmError(Exception):
    """Stand for every error that a user can cause and mend; the command line shows it without a traceback."""

    exit_code = 1


class UsageError(KalmError):
    """Report a command or call with wrong arguments."""

    exit_code = 2


class ConfigError(KalmError):
    """Report every problem of a configuration at once."""

    exit_code = 2


class GraphError(KalmError):
    """Report a graph whose files are wrong, or a name that the graph lacks."""


class ModelError(KalmError):
    """Report a language model that cannot be loaded or cannot do what is asked."""


class RunError(KalmError):
    """Report a run folder that is missing, damaged or of another version."""


class OutOfMemoryError(KalmError):
    """Report that memory ran out outside of training's steps, and which setting to lower."""


class TrainingError(KalmError):
    """Report a training that cannot go on; the last good checkpoint is kept."""


class ProcessError(KalmError):
    """Report that another process of the launch has ended or cannot be reached."""


class FetchError(KalmError):
    """Report a download that failed or whose content is not what was promised."""
