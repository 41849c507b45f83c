"""The exceptions that all Python functions of this package raise."""


class DsaError(Exception):
    """Base of all errors of this package."""


class ArgumentError(DsaError, ValueError):
    """An argument has the wrong rank, shape, dtype, device, layout or value.

    The message names the operator, the argument, what was expected and what was given.
    """


class LibraryError(DsaError, RuntimeError):
    """The compiled library is missing or damaged, has another ABI, or cannot run on this CPU."""


class KernelError(DsaError, RuntimeError):
    """A kernel failed although its arguments had passed every check: out of memory, for example."""


class BuildError(DsaError, RuntimeError):
    """Compiling or linking a library failed. The message has what the tool printed."""


class RecordError(DsaError, ValueError):
    """A tuning log cannot be read or written, or one of its records is damaged, foreign or implausible."""


class ModelError(DsaError, ValueError):
    """A model cannot be served: another family, a size or a projection that has no absorbed form, another Transformers.

    The message names what was expected and what came.
    """
