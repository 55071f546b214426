"""Signed frames: Django's Signer over the wire channel and the frame."""

from __future__ import annotations

from django.core import signing

_SALT = "django_pgnotify.frame"


def sign(text: str) -> str:
    """The signature of ``text`` under SECRET_KEY."""
    return signing.Signer(salt=_SALT).signature(text)


def verify(text: str, signature: str) -> bool:
    """Whether ``signature`` is that of ``text`` under SECRET_KEY or one of its fallbacks."""
    signer = signing.Signer(salt=_SALT)
    try:
        return signer.unsign(f"{text}{signer.sep}{signature}") == text
    except signing.BadSignature:
        return False
