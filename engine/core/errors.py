"""The engine's exceptions."""


class LoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


class DownloadFailed(LoadError):
    """The model's files are not at the given place, or could not be downloaded."""


class EngineDead(Exception):
    """The device or the engine is lost; the message says how. Nothing more is served."""


class GrammarError(Exception):
    """A grammar that cannot be compiled or followed; the message says why."""


class TemplateError(Exception):
    """The model's chat template refuses these messages; the message says why."""
