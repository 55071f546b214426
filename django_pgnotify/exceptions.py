"""Every error this package raises, in one tree.

PgNotifyError
 ├── InvalidArgument          (also a TypeError and a ValueError: bad input, refused early)
 │    ├── InvalidTopic
 │    ├── InvalidDelivery
 │    ├── InvalidAction
 │    ├── InvalidFields
 │    ├── InvalidTemplate
 │    ├── InvalidSetting
 │    ├── InvalidReceiver
 │    ├── DuplicateReceiver
 │    ├── UnknownConsumer
 │    └── EventDataError
 ├── UnsupportedDatabase
 ├── InvalidEpochTable
 ├── PublishError
 ├── FrameError
 └── ListenError
      ├── CannotConnect
      ├── StandbyServer
      └── ConnectionLost
"""

from __future__ import annotations


class PgNotifyError(Exception):
    """Base class of every error of django-pgnotify. Catch it to catch them all."""


class InvalidArgument(PgNotifyError, TypeError, ValueError):
    """An argument or setting has the wrong type or value; nothing was done.

    It is both a ``TypeError`` and a ``ValueError``, because whoever passes ``None`` for a topic
    and whoever passes ``""`` made the same mistake and catch it in the same place.
    """


class InvalidTopic(InvalidArgument):
    """A topic is not a non-empty string without NUL characters. Pass one that is."""


class InvalidDelivery(InvalidArgument):
    """A delivery tier is unknown. Pass one of those the message lists."""


class InvalidAction(InvalidArgument):
    """An action is unknown. Pass one of those the message lists."""


class InvalidFields(InvalidArgument):
    """``fields=`` names something that is not a concrete field of the model."""


class InvalidTemplate(InvalidArgument):
    """A group or key template cannot be formatted from an event. Name one of its fields."""


class InvalidSetting(InvalidArgument):
    """A ``PGNOTIFY_*`` setting is unknown or has a value that cannot work."""


class InvalidReceiver(InvalidArgument):
    """A receiver cannot be called with one event, or one of its options cannot work."""


class DuplicateReceiver(InvalidArgument):
    """A ``dispatch_uid`` is taken. Each receiver needs one of its own."""


class UnknownConsumer(InvalidArgument):
    """There is no durable consumer of that name. Name one of those the message lists."""


class EventDataError(InvalidArgument):
    """The data of an event cannot be carried as JSON. The message names the path in it."""


class UnsupportedDatabase(PgNotifyError):
    """A database alias is not PostgreSQL, or does not exist. Name one that is."""


class InvalidEpochTable(PgNotifyError):
    """The file of an epoch table cannot be used; the message says why and what to do."""


class PublishError(PgNotifyError):
    """An event could not be sent. The cause is chained."""


class FrameError(PgNotifyError):
    """A NOTIFY payload claims to be a frame of ours and is not a valid one."""


class ListenError(PgNotifyError):
    """A listener is not, or no longer, established. The listener tries again by itself."""


class CannotConnect(ListenError):
    """The server refused the connection or did not answer. The cause is chained."""


class StandbyServer(ListenError):
    """The server is a standby, where LISTEN does not exist. Name the primary."""


class ConnectionLost(ListenError):
    """An established connection broke or fell silent. The cause is chained."""
