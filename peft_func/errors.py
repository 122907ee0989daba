"""Every error of the library, a `PeftFuncError` and the built-in that fits as well; and its warnings."""


class PeftFuncError(Exception):
    """Base of every error that peft_func raises itself."""

    def __str__(self) -> str:
        # KeyError prints the repr of its message; ours are sentences.
        return " ".join(str(arg) for arg in self.args)


class OptionError(PeftFuncError, ValueError):
    """An option has a value that cannot work (a rank of 0, an unknown init)."""


class SelectorError(PeftFuncError, ValueError):
    """A selector is malformed, or matches nothing that it could stand for."""


class TreeError(PeftFuncError, ValueError):
    """A tree has another structure, shape, dtype or device than it must have."""


class NameMismatchError(PeftFuncError, KeyError):
    """A mapping of names lacks a name, or has one too many."""


class ModuleRefusedError(PeftFuncError, ValueError):
    """A module that cannot become a pure function."""


class LeakError(PeftFuncError, RuntimeError):
    """An effective weight was used in a way that would lose its value or its gradient."""


class DensifyError(PeftFuncError, RuntimeError):
    """A structured weight had to be formed where that is forbidden."""


class RouteError(PeftFuncError, RuntimeError):
    """A model uses a weight that differs along the batch in a way that does not tell the samples apart."""


class FileFormatError(PeftFuncError, OSError):
    """A file is truncated, foreign, or not for this model."""


class MissingExtraError(PeftFuncError, ImportError):
    """An optional dependency is not installed."""


class AttributeRefusedError(PeftFuncError, AttributeError):
    """An attribute of a module that cannot be reached through a pure function of it."""


class AddinError(PeftFuncError, ValueError):
    """An add-in that cannot be where it is put, or an operation that knows weights only."""


class UnusedAddinWarning(UserWarning):
    """A call of the model did not run a module that has an add-in."""
