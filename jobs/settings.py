"""Where the broker and the job store are, and the limits both sides must agree on."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs import redis_url
from jobs.errors import SettingsError


def _check_redis_url(url: SecretStr) -> SecretStr:
    redis_url.checked(url.get_secret_value())
    return url


class JobsSettings(BaseSettings):
    """Read by the API and by the workers; the two must see the same values."""

    model_config = SettingsConfigDict(
        env_prefix="THROUGHLINE_", frozen=True, extra="ignore", populate_by_name=True
    )

    redis_url: Annotated[SecretStr, AfterValidator(_check_redis_url)] = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        validation_alias=AliasChoices("THROUGHLINE_REDIS_URL", "REDIS_URL"),
    )
    key_prefix: str = Field(default="tl:", pattern=r"^[A-Za-z0-9:_-]*$")
    """Put before every key of ours, so that several installations can share a database."""
    lease_seconds: float = Field(default=9.0, ge=1.0, le=3600.0)
    """A worker not heard from for so long loses its jobs to others."""
    result_ttl_seconds: int = Field(default=24 * 3600, ge=60)
    """How long a finished job and its result are kept."""
    socket_timeout_seconds: float = Field(default=5.0, gt=0.0)

    @property
    def renew_seconds(self) -> float:
        """How often a worker renews: two renewals may fail before the lease is lost."""
        return self.lease_seconds / 3

    @property
    def visibility_timeout_seconds(self) -> float:
        """The broker's redelivery of a silent worker's messages.

        One renewal longer than the lease, so that a redelivered job is never found still leased.
        """
        return self.lease_seconds + self.renew_seconds


Settings = TypeVar("Settings", bound=BaseSettings)


def read_settings(settings_class: type[Settings], **overrides: Any) -> Settings:
    """Build settings from the environment.

    Raises:
        SettingsError: names each variable, its value (unless it is a secret) and the rule it breaks.
    """
    try:
        return settings_class(**overrides)
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(settings_class, fault) for fault in error.errors())) from None


def _describe(settings_class: type[BaseSettings], fault: Any) -> str:
    name = str(fault["loc"][0])
    variable = name if name.isupper() else f"{settings_class.model_config['env_prefix']}{name}".upper()
    field = settings_class.model_fields.get(name.removeprefix("THROUGHLINE_").lower())
    is_secret = "URL" in variable or (field is not None and field.annotation is SecretStr)
    value = "(hidden)" if is_secret else repr(fault["input"])
    rule = fault["msg"].removeprefix("Value error, ")
    return f"{variable}={value}: {rule}"
