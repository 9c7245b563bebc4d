"""What every setting is checked with."""


class ConfigError(ValueError):
    """A setting that can't be: the message names the value, the limit and the fix."""


def check(ok: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)
