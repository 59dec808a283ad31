"""What can go wrong beyond one request."""


class LoadError(Exception):
    """The model cannot be served; the message says why and what to do."""


class DownloadFailed(LoadError):
    """There are no weights to load: not where they are said to be, or not to be had from there."""


class EngineDead(Exception):
    """The device or the engine is lost; the message says how. Nothing more is served."""


class GrammarError(Exception):
    """A grammar that cannot be followed, and why."""


class TemplateError(Exception):
    """The model's chat template does not take these messages, and why."""
