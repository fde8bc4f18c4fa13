"""Errors that are the user's to act on, and the exit codes they lead to.

Anything that is not one of these is a bug of ours and keeps its traceback.
"""

EXIT_OK = 0
EXIT_FAILED = 1  # a trial or a service failed
EXIT_BAD_CONFIG = 2  # nothing was deployed
EXIT_INVALID = 3  # complete, but at least one point is INVALID


class ConfigError(ValueError):
    """The request makes no sense; raised before anything is deployed."""


class ServiceError(RuntimeError):
    """A service could not be brought up, or stopped being one; says where its log is."""


class TrialError(RuntimeError):
    """A measurement could not be made; the run goes on with the next one."""


class RuleError(RuntimeError):
    """A rule for levels gave no level that can be measured; the run goes on with what it does not concern."""
