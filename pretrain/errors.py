"""The errors a user can cause. Each message names the field, the value and the remedy."""


class PretrainError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it without a traceback."""


class ConfigError(PretrainError):
    """A configuration value is unusable; raised before any hardware is held."""


class DataError(PretrainError):
    """Shards, manifests or samples are missing, changed or unreadable."""


class UnreadableShard(DataError):
    """A shard that stayed unreadable until the deadline, or is not the one that was indexed.

    Attributes:
        url: of the shard.
    """

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url

    def __reduce__(self) -> tuple[type["UnreadableShard"], tuple[str, str]]:
        return UnreadableShard, (str(self), self.url)  # it crosses from a worker to the rank


class TokenizerMismatch(PretrainError):
    """The tokenizer at hand is not the one the weights were trained with."""


class CheckpointError(PretrainError):
    """A checkpoint is missing, uncommitted, damaged or made for another run."""


class NonFiniteError(PretrainError):
    """The loss stayed NaN or infinite for longer than the configuration allows, or what a trained
    model says is not finite."""


class ExportError(PretrainError):
    """Exported weights are incomplete, or do not reproduce the outputs they were made from."""


class RegistryError(PretrainError):
    """A model version is missing, damaged, or does not keep what its card promises."""
