"""`--codec.name X` on a command line: the fields of `codec` are those of kind X, with its defaults."""

import copy
from collections.abc import Iterator, Sequence

from moc_jax.config.base import ConfigError, Settings, field_kinds, kind_named, kinds_of, of_another_kind


def switched[S: Settings](settings: S, argv: Sequence[str]) -> S:
    """`settings` with the kinds that `argv` names; one that is of that kind already keeps its values.

    Not checked as a whole: what doesn't go together yet may do so with the other options in place.

    Raises:
        ConfigError: no such kind, or an option that is a setting of another kind.
    """
    for at, hint in field_kinds(type(settings)).items():
        if not (union := kinds_of(hint)):
            continue
        given = dict(_options(argv, f"--{at}."))
        name = given.get("name", getattr(settings, at).name)
        kind = kind_named(union, name, f"--{at}")
        if type(getattr(settings, at)) is not kind:
            settings = copy.copy(settings)
            object.__setattr__(settings, at, kind())
        for field in given:
            if problem := of_another_kind(union, kind, field):
                raise ConfigError(f"--{at}.{field}: {problem}")
    return settings


def _options(argv: Sequence[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Field and first value of each option that begins with `prefix`, as `--a.b x`, `--a.b=x` or `--a.b.c x`."""
    for word, following in zip(argv, [*argv[1:], ""]):
        option, equals, value = word.partition("=")
        if option.startswith(prefix):
            field, _, _ = option.removeprefix(prefix).partition(".")
            yield field.replace("-", "_"), value if equals else following
