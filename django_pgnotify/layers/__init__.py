"""A channel layer for Django Channels that needs nothing but PostgreSQL."""

from .postgres import PostgresChannelLayer

__all__ = ["PostgresChannelLayer"]
